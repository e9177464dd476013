"""The acceptance of proposed steps: of each row by itself, or of a group together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..edits.low_rank import Update
from .batch_state import BatchState, per_row, side_by_side
from .proposals import Proposal, Proposer
from .scoring import Answers, chosen_answers


# The model says a target for sure when each of its tokens has this negative log-likelihood or less, in nats.
_SURE = 0.1
# The number of times that a step is halved which leads no nearer to its target, and where the target is to be said
# in several forms: a step that is right for one of them may be far too large for another.
_HALVINGS, _HALVINGS_OF_FORMS = 3, 6
# Rows whose targets have more tokens, in all their forms, go no further than their method leads: each step costs more.
_LONGEST = 256


class AcceptAll:
    """
    Accept every proposal. Rows that do not say their targets afterwards want a further step.

    Args:
        batches (`Sequence[BatchState]`): The batches.
        proposer ([`Proposer`]): Proposes steps and scores them.
    """

    reverted = False  # whether the last `judge` reverted a step that the rows are still under

    def __init__(self, batches: Sequence[BatchState], proposer: Proposer):
        self.batches, self.proposer, self.method = batches, proposer, proposer.context.method
        self.wanted = [batch.wanted for batch in batches]

    @property
    def going_on(self) -> bool:
        """Whether any row wants a step, or tries one."""
        return any(bool(batch.wanted.any()) for batch in self.batches)

    @property
    def corrections(self) -> Sequence[Callable[[], bool]]:
        """Functions to call after the last steps are made and scored. Each returns whether it reverted a step."""
        return ()

    def accept(self, number: int, proposal: Proposal) -> None:
        """Accept the proposal for the batch of that number, in whole or in part."""
        batch = self.batches[number]
        if self.method.joins:
            batch.accumulate(*proposal)
        else:
            batch.append(*proposal)

    def judge(self) -> None:
        """Decide, after a look, which of the last steps stay and which rows want more."""
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            batch.wanted = wanted & ~batch.current_answers.all_correct


class AcceptByRow(AcceptAll):
    """
    Accept of each row's step the whole, the half, the quarter or the eighth that does best, or nothing where none
    brings the row nearer to its target: an editor has learned its steps on targets of a few tokens, and overshoots on
    others. With the option `gradient`, a row that takes nothing of its method's step goes on down the gradient itself.
    """

    def accept(self, number: int, proposal: Proposal) -> None:
        batch, (updates, _) = self.batches[number], proposal

        def answers(shares: torch.Tensor, among: torch.Tensor) -> Answers:
            return self.proposer.score(batch, side_by_side(batch.updates, _scaled(updates, shares)), among)

        shares, after = best_shares(answers, batch.current_answers, batch.wanted)
        batch.append(_scaled(updates, shares), (shares > 0).int().tolist())
        batch.set_answers(after)
        moved = shares > 0
        if self.proposer.options.gradient:
            short = torch.tensor([len(tokens) <= _LONGEST for tokens in after.correct])
            turning = batch.wanted & ~moved & ~batch.on_gradient & short
            batch.on_gradient = batch.on_gradient | turning
            moved = moved | turning
        batch.wanted = moved & ~after.all_correct

    def judge(self) -> None:
        """Do nothing: `accept` decides."""


def best_shares(
    answers: Callable[[torch.Tensor, torch.Tensor], Answers], previous: Answers, wanted: torch.Tensor
) -> tuple[torch.Tensor, Answers]:
    """
    Return the share of a step that each row takes, and the model's answers then.

    Args:
        answers (`Callable`): The shares, `(rows,)`, and which rows are asked, `(rows,)` -> the model's answers; what
            it gives for the others does not count.
        previous ([`Answers`]): The model's answers without the step.
        wanted (`torch.Tensor` of shape `(rows,)`, bool): The rows that want the step.
    """
    shares = wanted.float()
    best = chosen_answers(wanted, answers(shares, wanted), previous)
    for share in (0.5, 0.25, 0.125):
        open_rows = wanted & ~best.all_correct
        if not open_rows.any():
            break
        found = answers(torch.where(open_rows, share, shares), open_rows)
        better = open_rows & torch.tensor([found.rank(i) > best.rank(i) for i in range(len(wanted))])
        shares = torch.where(better, share, shares)
        best = chosen_answers(better, found, best)
    pairs = zip(best.log_probability, previous.log_probability, strict=True)
    worse = wanted & ~best.all_correct & torch.tensor([now <= then for now, then in pairs])
    return torch.where(worse, 0.0, shares), chosen_answers(worse, previous, best)


def _scaled(updates: dict[str, Update], shares: torch.Tensor) -> dict[str, Update]:
    """Multiply each row's update by the row's share."""
    if bool((shares == 1).all()):
        return updates
    return {name: (u, v * per_row(shares.to(v.dtype), v)) for name, (u, v) in updates.items()}


@dataclass
class _Progress:
    """The progress of a batch's rows towards their targets."""

    level: torch.Tensor  # (rows,): log-probability of the target at `best`
    tried: torch.Tensor  # (rows,): number of tries of the last step without progress
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # the residuals without a step that is being tried
    # The row's residuals when its group said most targets, the number of targets said then (-1 before any step), and
    # the steps until then.
    top: dict[str, torch.Tensor] = field(default_factory=dict)
    top_said: torch.Tensor = field(default_factory=lambda: torch.tensor(-1.0, dtype=torch.float32))
    top_steps: torch.Tensor = field(default_factory=lambda: torch.tensor(0))


class AcceptByGroup(AcceptAll):
    """
    Accept the steps of all rows of a group, which act together, and judge each by the next step's pass. Steps that led
    nearer to their targets stay, others are tried again at half their length, and in the end a group returns to the
    step at which it said most targets.

    Args:
        batches, proposer: As for [`AcceptAll`].
        group_size (`int`, *optional*): The number of neighbouring rows of a batch in one group; all rows of all
            batches when missing.
    """

    def __init__(self, batches: Sequence[BatchState], proposer: Proposer, group_size: int | None):
        super().__init__(batches, proposer)
        self.group_size = group_size
        self.progress = [
            _Progress(
                torch.tensor(batch.before.log_probability, dtype=torch.float32),
                torch.zeros(batch.rows.facts, dtype=torch.float32),
            )
            for batch in batches
        ]

    @property
    def going_on(self) -> bool:
        return super().going_on or any(bool(progress.tried.any()) for progress in self.progress)

    @property
    def corrections(self) -> Sequence[Callable[[], bool]]:
        return (self._step_back,) if self.method.sizes_steps else (self._step_back, self._back_to_top)

    def accept(self, number: int, proposal: Proposal) -> None:
        super().accept(number, proposal)
        progress, (wanted, steps) = self.progress[number], proposal
        progress.tried = torch.where(torch.tensor(steps) > 0, 1.0, progress.tried)
        for name, (_, residual) in wanted.items():
            progress.best.setdefault(name, torch.zeros_like(residual))

    def judge(self) -> None:
        self.reverted = False
        if not self.method.sizes_steps:
            self._keep_top()
        for batch, progress in zip(self.batches, self.progress, strict=True):
            self._judge_batch(batch, progress)

    def _judge_batch(self, batch: BatchState, progress: _Progress) -> None:
        """
        Keep the steps that led nearer to their targets, try others again at half their length, a few times, and mark
        the rows that want more.
        """
        level = torch.tensor(batch.current_answers.log_probability, dtype=torch.float32)
        worse = (progress.tried > 0) & ~(level > progress.level)
        again = worse & (progress.tried <= (_HALVINGS if batch.rows.forms == 1 else _HALVINGS_OF_FORMS))
        for name, residual in batch.residuals.items():
            best = torch.where(per_row(worse, residual), progress.best[name], residual)
            progress.best[name] = best
            batch.residuals[name] = torch.where(per_row(again, residual), (best + residual) / 2, best)
        progress.level = torch.where(worse, progress.level, level)
        progress.tried = torch.where(again, progress.tried + 1, 0.0)
        batch.changed = batch.changed | worse
        settled = ~_unsure(batch) if self.method.sizes_steps else batch.current_answers.all_correct
        batch.wanted = ~worse & ~settled & torch.tensor(batch.steps).bool()
        self.reverted = self.reverted or bool(worse.any())

    def _step_back(self) -> bool:
        """Revert rows that are less sure of their targets in the end to their best step."""
        found = False
        for batch, progress in zip(self.batches, self.progress, strict=True):
            level = torch.tensor(batch.current_answers.log_probability, dtype=torch.float32)
            missed = _unsure(batch) & torch.tensor(batch.steps).bool() & (level < progress.level)
            for name, residual in batch.residuals.items():
                batch.residuals[name] = torch.where(per_row(missed, residual), progress.best[name], residual)
            batch.changed = batch.changed | missed
            found = found or bool(missed.any())
        return found

    def _said_by_group(self) -> list[torch.Tensor]:
        """Return, for each row, the number of targets that its group says, counted by their probabilities."""
        said = [
            torch.tensor(batch.current_answers.log_probability, dtype=torch.float32).exp() for batch in self.batches
        ]
        if self.group_size is None:
            return [sum(values.sum() for values in said) + torch.zeros_like(values) for values in said]
        groups = [torch.arange(len(values)) // self.group_size for values in said]
        return [
            torch.zeros(int(group[-1]) + 1, dtype=torch.float32).index_add(0, group, values)[group]
            for group, values in zip(groups, said, strict=True)
        ]

    def _keep_top(self) -> None:
        """
        Store the residuals of each group that says more than ever before. Rows are judged one by one, each among the
        others' residuals of that step; the best step for each may be bad for all.
        """
        for batch, progress, said in zip(self.batches, self.progress, self._said_by_group(), strict=True):
            better = said > progress.top_said
            for name, residual in batch.residuals.items():
                top = progress.top.get(name, torch.zeros_like(residual))
                progress.top[name] = torch.where(per_row(better, residual), residual, top)
            progress.top_said = torch.where(better, said, progress.top_said)
            progress.top_steps = torch.where(better, torch.tensor(batch.steps), progress.top_steps)

    def _back_to_top(self) -> bool:
        """Revert groups that said more at an earlier step to that step."""
        found = False
        for batch, progress, said in zip(self.batches, self.progress, self._said_by_group(), strict=True):
            worse = said < progress.top_said
            for name, residual in batch.residuals.items():
                if name in progress.top:
                    batch.residuals[name] = torch.where(per_row(worse, residual), progress.top[name], residual)
            batch.changed = batch.changed | worse
            batch.steps = torch.where(worse, progress.top_steps, torch.tensor(batch.steps)).tolist()
            found = found or bool(worse.any())
        return found


def _unsure(batch: BatchState) -> torch.Tensor:
    """Return which rows do not say their targets for sure, `(rows,)`."""
    return torch.tensor([value < -_SURE for value in batch.current_answers.min_log_probability])
