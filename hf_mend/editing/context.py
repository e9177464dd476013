"""The context of edits: a base model, its edited layers and a method, as one thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from ..bases.fused import of_one_shape, stacked
from ..bases.gradients import Factors, trace
from ..bases.prefix import answers_behind, prefix_of
from ..bases.projection import is_large, logits_in_parts, projected, read_once
from ..bases.readout import Slots, narrowed
from ..bases.split import HiddenState, SplitModel, logits_of
from ..bases.targets import Target
from ..data.encoding import EncodedBatch
from ..edits.hook import applied
from ..edits.low_rank import Update
from ..methods import EditMethod
from .scoring import Answers, score_and_fetch, without_following


@dataclass(frozen=True)
class EditingContext:
    """
    The base model, its edited layers and the method of edits.

    Args:
        split ([`SplitModel`]): The base model, with its active edits, cut below its lowest edited layer.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Maps the factors of their gradients to updates.
        scoped (`bool`, defaults to `False`): Edits act only where they are asked for: at the tokens that predict a
            target's, of which alone their gradients then are, or, in an encoder-decoder model, at all of the decoder's
            in the rows that ask for them.
    """

    split: SplitModel
    targets: Sequence[Target]
    method: EditMethod
    scoped: bool = False

    @property
    def at_answers(self) -> bool:
        """Whether edits act at the tokens alone that predict a target's."""
        return self.scoped and not self.split.cuts_decoder_of_two

    @property
    def four_bit_error(self) -> float | None:
        """What edits may lose that are kept in four bits; `None` where they are not."""
        config = self.method.config
        return config.factor_error if self.scoped and config.factor_dtype == "int4" else None

    @torch.no_grad()
    def at_answers_alone(
        self, rows: EncodedBatch, hidden: HiddenState, further: HiddenState | None = None
    ) -> tuple[HiddenState, HiddenState | None]:
        """
        Run what stands before the rows' answers, where edits act at these alone, so that all passes that follow run
        nothing but the answers' tokens. Otherwise, and where the model cannot, the states are as they were.

        Args:
            rows ([`EncodedBatch`]): Prompts and targets.
            hidden ([`HiddenState`]): Their output of `split.run_below`.
            further ([`HiddenState`], *optional*): That of the rows' `further`.

        Returns:
            `tuple`: `hidden` and `further`, with the rows' answers alone.
        """
        prefix = prefix_of(self.split, rows, hidden) if self.at_answers else None
        if prefix is None:
            return hidden, further
        hidden = replace(hidden, answers=answers_behind(self.split, prefix, rows, hidden))
        if further is not None and rows.further is not None:
            further = replace(further, answers=answers_behind(self.split, prefix, rows.further, further))
        return hidden, further

    def trace(
        self,
        rows: EncodedBatch,
        hidden: HiddenState | None = None,
        updates: Sequence[Mapping[str, Update]] = (),
        narrow: nn.Module | None = None,
    ) -> tuple[Factors, torch.Tensor]:
        """
        Return the factors of each row's gradient and the logits at the rows' positions:
        [`~hf_mend.bases.gradients.trace`].

        Args:
            rows ([`EncodedBatch`]): Prompts and targets.
            hidden ([`HiddenState`], *optional*): Their output of `split.run_below`; computed when missing.
            updates (`Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]`): The updates that the rows are under,
                in this order, as [`~hf_mend.edits.hook.applied`] takes them.
            narrow (`nn.Module`, *optional*): A module that runs at the rows' positions alone, as the last MLP may.
        """
        rows, hidden, narrow = alone(rows, hidden, narrow)
        factors, logits = self._of_rows(rows, hidden, updates, narrow)
        return self._of_facts(rows, factors), logits

    def _of_rows(
        self,
        rows: EncodedBatch,
        hidden: HiddenState | None,
        updates: Sequence[Mapping[str, Update]],
        narrow: nn.Module | None,
    ) -> tuple[Factors, torch.Tensor]:
        """The factors of each row's gradient, whatever number of rows asks for one fact."""
        with self.applied(rows, *updates, narrow=narrow):
            inputs, places = self.split.inputs_of(rows), rows.places
            factors, logits = trace(self.split, self.targets, inputs, rows.next_tokens, hidden, places)
        inside = self._inside(narrow)
        if inside:
            slots = Slots(rows)
            for name in inside:
                x, delta = factors[name]
                factors[name] = (slots.widen(x), slots.widen(delta))
        return factors, logits

    def _of_facts(self, rows: EncodedBatch, factors: Factors) -> Factors:
        """The factors of each fact's gradient, from those of its rows."""
        places = rows.places
        tokens = places.positions if self.at_answers else places.read
        if any(x.shape[:2] != rows.positions.shape for x, _ in factors.values()):
            tokens = None  # a layer that ran on tokens of its own
        if not self.at_answers and rows.forms == 1:
            return Factors(factors, tokens)
        found = Factors({}, tokens)
        present = rows.positions[..., None]  # (rows, seq, 1)
        for names in of_one_shape(factors):
            for_all = [stacked([factors[name][side] for name in names]) for side in (0, 1)]  # (layers, rows, seq, d)
            if self.at_answers:
                for_all = [side * present.to(side.device) for side in for_all]
            # An edit's gradient is the sum over its forms: (layers, facts, forms * seq, d).
            x, delta = (side.reshape(len(names), rows.facts, -1, side.shape[-1]) for side in for_all)
            found.update({name: (x[i], delta[i]) for i, name in enumerate(names)})
        found.update({name: found.pop(name) for name in factors})  # in the order of the layers
        return found

    @contextmanager
    def applied(
        self, rows: EncodedBatch, *updates: Mapping[str, Update], narrow: nn.Module | None = None
    ) -> Iterator[None]:
        """
        Add updates to the layers' outputs within the context, at `rows.acting` alone where they act so; `narrow` is
        as for `trace`.
        """
        where = rows.acting if self.at_answers else None
        if where is not None and rows.answers is not None:
            narrow = None  # which would run where the answers are not
        inside = self._inside(narrow)
        wide = [target for target in self.targets if target.name not in inside]
        within = [target for target in self.targets if target.name in inside]
        # Within the narrowed module there are no other positions.
        with narrowed(narrow, rows), applied(wide, *updates, where=where), applied(within, *updates):
            yield

    def _inside(self, module: nn.Module | None) -> set[str]:
        """The targets that lie in a module."""
        modules = () if module is None else [*module.modules()]
        return {target.name for target in self.targets if any(target.module is one for one in modules)}

    def logits(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> torch.Tensor:
        """Return the logits at the rows' positions, `(positions, vocab)`. The arguments are those of `trace`."""
        rows, hidden, _ = alone(rows, hidden)
        split, places = self.split, rows.places
        with self.applied(rows, *updates):
            if is_large(split, places) and not torch.is_grad_enabled():
                inputs = split.inputs_of(rows)
                hidden = split.state_of(rows) if hidden is None else hidden
                head = read_once(split, inputs, hidden, places)
                if head is not None:
                    return logits_in_parts(projected(split, inputs, hidden, places, head), head)
            return logits_of(split, rows, hidden)

    def answers(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> Answers:
        """Return the model's answers to the rows. The arguments are those of `trace`."""
        return self.answers_and((), rows, hidden, updates)[0]

    def answers_and(
        self,
        further: Sequence[torch.Tensor],
        rows: EncodedBatch,
        hidden: HiddenState | None = None,
        updates: Sequence[Mapping[str, Update]] = (),
        behind: HiddenState | None = None,
    ) -> tuple[Answers, list[torch.Tensor]]:
        """
        Return the model's answers to the rows, and further tensors in the host's memory: it waits once for all of
        them. The other arguments are those of `trace`.

        Args:
            behind ([`HiddenState`], *optional*): The output of `run_below` for the rows' `further`, from which the
                same pass tells what follows the targets too.
        """
        if behind is None or rows.further is None:
            return score_and_fetch(rows, self.logits(rows, hidden, updates), further)
        answers, found = score_and_fetch(rows.further, self.logits(rows.further, behind, updates), further)
        return without_following(answers), found


State = TypeVar("State", bound=HiddenState | None)


def alone(
    rows: EncodedBatch, hidden: State, narrow: nn.Module | None = None
) -> tuple[EncodedBatch, State | HiddenState, nn.Module | None]:
    """
    Return the rows' answers alone and their state, where that has them, and no module to narrow: all that runs then
    are positions, and the few tokens between them.
    """
    if hidden is None or hidden.answers is None:
        return rows, hidden, narrow
    answers, state = hidden.answers
    return answers, state, None
