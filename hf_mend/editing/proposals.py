"""Proposals of steps: from the factors of one gradient, or by a method's own search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..bases.fused import fetched, largest, of_one_shape, stacked
from ..bases.gradients import Factors
from ..bases.split import HiddenState
from ..data.encoding import EncodedBatch
from ..data.places import on_device
from ..edits.low_rank import Update
from ..methods import EditMethod, IterativeMethod
from .batch_state import BatchState, check_finite, per_row
from .context import EditingContext
from .look import BatchLook
from .scoring import Answers, placed_answers, score_and_fetch


# Rounds of a method that searches and joins; the later ones are for rows that miss their targets beside others.
_ROUNDS = 3

# Further steps that an edit with a scope may take where its user does not say how many.
_FURTHER_STEPS = 12

# Layer name -> `(u, v)` for each row, zero in the rows without a proposal; and the number of steps of each row.
Proposal = tuple[dict[str, Update], list[int]]


@dataclass(frozen=True)
class SearchOptions:
    """
    The options of a search.

    Args:
        max_steps (`int`, *optional*): The maximum number of steps of a row; 1 is one whole step, accepted as it is.
            When missing it is 1, and for an [`~hf_mend.methods.IterativeMethod`] its configuration's `num_steps`.
        force (`bool`, defaults to `True`): Make a step also where the model says the target already.
        check (`bool`, defaults to `True`): Score the edited model; without it there is one step.
        gradient (`bool`, defaults to `False`): Where a trained method's step leads a row no nearer to its target, go
            on with steps down the gradient itself. They are no more general than their texts: for edits with a scope.
    """

    max_steps: int | None = None
    force: bool = True
    check: bool = True
    gradient: bool = False


def default_options(
    method: EditMethod, scoped: bool, max_steps: int | None = None, force: bool = True, check: bool = True
) -> SearchOptions:
    """
    Return the options of a search by a method, for edits with a scope or without.

    Args:
        method ([`~hf_mend.methods.EditMethod`]): The method.
        scoped (`bool`): Whether the edits act only where they are asked for.
        max_steps (`int`, *optional*): The maximum number of steps; the method's own when missing, and some more where
            a row may go on down the gradient or is in many forms.
        force, check (`bool`): As for [`SearchOptions`].
    """
    gradient = scoped and not method.joins and not isinstance(method, IterativeMethod)
    further = _FURTHER_STEPS if gradient or (scoped and method.in_further_forms) else 0
    return SearchOptions(method.max_steps + further if max_steps is None else max_steps, force, check, gradient)


class Proposer(ABC):
    """
    Run the model on batches and propose steps for them.

    Args:
        context ([`EditingContext`]): The model and the method.
        options ([`SearchOptions`]): The options of the search.
        base_delta (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): The base delta, which acts beside an update
            from the first step on.
        progress (`Callable`, *optional*): Called with the number of rows whose first step is made.
    """

    def __init__(
        self,
        context: EditingContext,
        options: SearchOptions,
        base_delta: Mapping[str, Update],
        progress: Callable[[int], object] | None = None,
    ):
        self.context, self.options, self.base_delta = context, options, base_delta
        self.progress = progress or (lambda rows: None)

    @property
    @abstractmethod
    def rounds(self) -> int:
        """The maximum number of rounds of proposals."""

    @abstractmethod
    def begin(self, rows: EncodedBatch) -> BatchState:
        """Run a batch for the first time, without updates."""

    @abstractmethod
    def look(self, batch: BatchState) -> None:
        """Run a batch under its present updates, for a further step."""

    @abstractmethod
    def propose(self, batch: BatchState) -> Proposal:
        """Propose a step for the batch's wanted rows, on the model as it was at the last look."""

    def score(self, batch: BatchState, updates: Mapping[str, Update], among: torch.Tensor | None = None) -> Answers:
        """
        Return the model's answers to a batch under some updates.

        Args:
            batch ([`BatchState`]): The batch.
            updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): The updates.
            among (`torch.Tensor` of shape `(facts,)`, bool, *optional*): Which facts are asked; the answers to the
                others are their last ones. All when missing.

        Raises:
            ValueError: The proposal that they come from is not finite.
        """
        proposed, batch.proposed = batch.proposed, {}
        further = [largest(proposed)] if proposed else []
        part = batch.part(torch.ones_like(batch.wanted) if among is None else among, self.context.split)
        under = (self.base_delta, part.of(updates))
        answers, found = self.context.answers_and(further, part.rows, part.hidden, under, part.further)
        if found:
            check_finite("update", proposed, found[0])
        return answers if part.is_whole else placed_answers(part.facts, answers, batch.known)

    def look_again(self, batches: Sequence[BatchState]) -> None:
        """Score the batches whose updates have changed since the last look."""
        for batch in batches:
            if batch.answers is None:
                batch.set_answers(self.score(batch, batch.seen, batch.changed))

    def _state(
        self, rows: EncodedBatch, hidden: HiddenState, further: HiddenState | None, before: Answers
    ) -> BatchState:
        wanted = before.all_correct.logical_not() | self.options.force
        return BatchState(rows, hidden, before, wanted, further=further)


class FromGradient(Proposer):
    """
    Propose the output of the method's `forward` on a gradient's factors. For a method that `sizes_steps`, scale it to
    the step that would bring a row's loss to zero were the loss linear (Polyak 1987, "Introduction to Optimization").
    So are the steps of rows that go down the gradient itself.
    """

    @property
    def rounds(self) -> int:
        return (self.options.max_steps or 1) if self.options.check else 1

    def begin(self, rows: EncodedBatch) -> BatchState:
        context = self.context
        hidden, further = context.at_answers_alone(rows, *context.split.run_below_further(rows))
        factors, logits = context.trace(rows, hidden, (self.base_delta,))
        if self.base_delta:
            logits = context.logits(rows, hidden)
        before, (values,) = score_and_fetch(rows, logits, [largest(factors)])
        check_finite("gradient", factors, values)
        batch = self._state(rows, hidden, further, before)
        batch.factors = factors
        if batch.wanted.all():
            context.method.observe_edits(factors)
        else:
            chosen = batch.wanted.nonzero()[:, 0]
            context.method.observe_edits(
                {name: (_at(x, chosen), _at(delta, chosen)) for name, (x, delta) in factors.items()}
            )
        self.progress(rows.facts)
        return batch

    def look(self, batch: BatchState) -> None:
        # Where a look judges the last steps, it is of the rows that made one.
        part = batch.part(batch.changed if batch.answers is None else batch.wanted, self.context.split)
        factors, logits = self.context.trace(part.rows, part.hidden, (self.base_delta, part.of(batch.seen)))
        each = []
        for names in of_one_shape(factors):
            for side in (0, 1):  # (layers, facts, tokens, width) -> (facts,)
                values = stacked([factors[name][side] for name in names])
                each.append(values.abs().amax((0, 2, 3)))
        answers, largest_of_facts = score_and_fetch(part.rows, logits, each)
        if batch.answers is None:
            batch.set_answers(answers if part.is_whole else placed_answers(part.facts, answers, batch.known))
        # Rows that overflow by their last step, on a float16 base, get no further one: that one is made smaller.
        sound = torch.tensor(batch.current_answers.finite)
        sound[part.facts] &= torch.stack(largest_of_facts).isfinite().all(0)
        batch.factors = placed = part.in_place(factors, batch.rows)
        if not sound.all():
            batch.factors = Factors({name: (_rows(x, sound), _rows(d, sound)) for name, (x, d) in placed.items()})

    def propose(self, batch: BatchState) -> Proposal:
        method = self.context.method
        updates = method(batch.factors)
        shares = batch.wanted.float()
        if method.sizes_steps:
            # The fall of a row's loss by its whole step, were it linear.
            falls = [(batch.factors[name][1].to(d) * d).sum((1, 2)) for name, (_, d) in updates.items()]
            fall = -torch.stack(fetched(falls)).sum(0)
            log_probability = torch.tensor(batch.current_answers.log_probability, dtype=torch.float32)
            shares = torch.where(batch.wanted & (fall > 0), -log_probability / fall, 0.0)
        if batch.on_gradient.any():
            updates = _with_gradient_steps(batch, updates)
        moves = shares > 0
        if not bool((shares == 1).all()):
            updates = {
                name: (u, torch.where(per_row(moves, v), v * per_row(shares.to(v.dtype), v), 0.0))
                for name, (u, v) in updates.items()
            }
        if method.joins:  # which solves equations with them
            check_finite("update", updates)
        else:
            batch.proposed = updates
        return updates, moves.int().tolist()


class FromSearch(Proposer):
    """
    Propose what an [`~hf_mend.methods.IterativeMethod`] finds for each row by itself, under the row's present updates.
    """

    @property
    def rounds(self) -> int:
        return _ROUNDS if self.context.method.joins and self.options.check else 1

    def begin(self, rows: EncodedBatch) -> BatchState:
        context = self.context
        hidden, further = context.at_answers_alone(rows, *context.split.run_below_further(rows))
        batch = self._state(rows, hidden, further, context.answers(rows, hidden))
        if not batch.wanted.any():
            self.progress(rows.facts)
        return batch

    def look(self, batch: BatchState) -> None:
        self.look_again([batch])

    def propose(self, batch: BatchState) -> Proposal:
        method, max_steps = self.context.method, self.options.max_steps
        assert isinstance(method, IterativeMethod)
        wanted = batch.wanted.nonzero()[:, 0]
        look = BatchLook(self.context, batch.rows, batch.hidden, wanted, batch.seen)
        found, counts = method.find(look, method.max_steps if max_steps is None else max_steps)
        check_finite("update", found)
        steps = [0] * len(batch.rows)
        for i, count in zip(wanted.tolist(), counts, strict=True):
            steps[i] = count
        if not any(batch.steps):
            self.progress(len(batch.rows))
        whole = {name: (_in_place(u, wanted, batch), _in_place(v, wanted, batch)) for name, (u, v) in found.items()}
        return whole, steps


def _with_gradient_steps(batch: BatchState, updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return a method's updates, in the rows that go down the gradient itself replaced by that step."""
    sizes = []
    for x, delta in batch.factors.values():  # |sum_t delta_t x_t^T|^2, without forming it
        sizes.append(((x @ x.mT) * (delta @ delta.mT)).sum((1, 2)))
    size = torch.stack(fetched(sizes)).sum(0)
    log_probability = torch.tensor(batch.current_answers.log_probability, dtype=torch.float32)
    step = torch.where(size > 0, log_probability / size, 0.0)
    found = {}
    for name, (u, v) in updates.items():
        x, delta = batch.factors[name]
        residuals = delta.to(v) * per_row(step.to(v.dtype), v)
        found[name] = _instead(batch.on_gradient, x.to(u), u), _instead(batch.on_gradient, residuals, v)
    return found


def _instead(rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return one side of `own` in some rows and of `other` in the rest, the smaller rank filled up with zeros."""
    rank = max(own.shape[1], other.shape[1])
    own, other = (torch.nn.functional.pad(side, (0, 0, 0, rank - side.shape[1])) for side in (own, other))
    return torch.where(per_row(rows, own), own, other)


def _at(side: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return one side of the factors of some rows."""
    return side.index_select(0, on_device(chosen, side.device))


def _rows(side: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return one side of the rows' factors, zero in the rows that are not chosen."""
    return torch.where(per_row(chosen, side), side, 0.0)


def _in_place(side: torch.Tensor, wanted: torch.Tensor, batch: BatchState) -> torch.Tensor:
    """Place one side of the wanted rows' updates among all rows; other rows get zeros."""
    if len(wanted) == len(batch.rows):
        return side
    whole = side.new_zeros(len(batch.rows), *side.shape[1:])
    whole[wanted.to(side.device)] = side
    return whole
