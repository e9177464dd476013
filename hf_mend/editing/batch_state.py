"""The state of the search for updates in a batch of rows, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..bases.fused import fetched, largest
from ..bases.gradients import Factors
from ..bases.split import HiddenState, SplitModel
from ..data.encoding import EncodedBatch
from ..data.places import on_device
from ..edits.four_bit import FourBitUpdates
from ..edits.low_rank import Update
from .part import Part, part_of
from .scoring import Answers


@dataclass
class FoundUpdates:
    """
    The updates found for a batch of requests.

    Args:
        updates (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes `(rows, rank, d_in)`
            and `(rows, rank, d_out)`.
        before, after ([`Answers`]): The model's answers without and with them; `after` is `None` without the check.
        steps (`list[int]`): Gradient steps of each row.
        inputs (`dict[str, torch.Tensor]`): Layer name -> `(rows, rank, d_in)`, the layers' inputs at the rows' tokens,
            from a method that joins.
        kept (`list[FourBitUpdates | None]`): Each row's update in four bits, `None` for one that is kept as it is;
            empty where all are.
        rows ([`EncodedBatch`]): The texts, a row a request, or one for each form of it.
        hidden ([`HiddenState`]): Their output of `run_below`.
        further ([`HiddenState`], *optional*): That of their `further`.
        used (`dict[str, list[list[int]]]`): Layer name -> of each row, which of `rank` are not zero.
        norms (`dict[str, list[float]]`): Layer name -> the Frobenius norm of each row's update.
    """

    updates: dict[str, Update]
    before: Answers
    after: Answers | None
    steps: list[int]
    rows: EncodedBatch
    hidden: HiddenState
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    used: dict[str, list[list[int]]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    kept: list[FourBitUpdates | None] = field(default_factory=list)
    further: HiddenState | None = None


@dataclass
class BatchState:
    """
    Rows that run in one pass, and the updates found for them so far.

    Args:
        rows ([`EncodedBatch`]): Prompts and targets, a row a request, or one for each form of it.
        hidden ([`HiddenState`]): Their output of `run_below`.
        before ([`Answers`]): The model's answers without the updates.
        wanted (`torch.Tensor` of shape `(rows,)`, bool): The rows that want a further step.
        on_gradient (`torch.Tensor` of shape `(rows,)`, bool): The rows whose next steps go down the gradient itself.
        steps (`list[int]`): The number of steps of each row.
        answers ([`Answers`], *optional*): The model's answers under `seen`; `None` until they are scored.
        known ([`Answers`]): The last answers that were scored.
        changed (`torch.Tensor` of shape `(rows,)`, bool): The rows whose updates have changed since then.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): The factors of the last look's gradients, where the
            method uses them.
        proposed (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): The last proposal, until it is known to be finite.
        inputs (`dict[str, torch.Tensor]`): Layer name -> inputs of the first step, `(rows, seq, d_in)`, of a method
            that joins.
        keys (`dict[str, torch.Tensor]`): Layer name -> the updates' `u`, `(rows, rank, d_in)`.
        residuals (`dict[str, torch.Tensor]`): Layer name -> the updates' `v`, `(rows, rank, d_out)`: of a method that
            joins, the value residuals wanted at `inputs`, summed over the steps.
        seen (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): The updates that the rows are under, as
            [`~hf_mend.edits.hook.applied`] takes them.
        kept (`list[FourBitUpdates | None]`): As in [`FoundUpdates`].
        on_host (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): The updates in the host's memory, where they are.
        further ([`HiddenState`], *optional*): The output of `run_below` for the rows' `further`.
        last_part ([`Part`], *optional*): The facts that ran by themselves last.
    """

    rows: EncodedBatch
    hidden: HiddenState
    before: Answers
    wanted: torch.Tensor
    on_gradient: torch.Tensor = field(init=False)
    changed: torch.Tensor = field(init=False)
    known: Answers = field(init=False)
    steps: list[int] = field(default_factory=list)
    answers: Answers | None = None
    factors: Factors = field(default_factory=Factors)
    proposed: dict[str, Update] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: dict[str, Update] = field(default_factory=dict)
    kept: list[FourBitUpdates | None] = field(default_factory=list)
    on_host: dict[str, Update] = field(default_factory=dict)
    further: HiddenState | None = None
    last_part: Part | None = None

    def __post_init__(self) -> None:
        self.on_gradient = torch.zeros_like(self.wanted)
        self.steps = [0] * self.rows.facts
        self.set_answers(self.before)

    @property
    def updates(self) -> dict[str, Update]:
        """Layer name -> each row's own update, `(u, v)`."""
        return {name: (self.keys[name], residuals) for name, residuals in self.residuals.items()}

    @property
    def current_answers(self) -> Answers:
        """The model's answers under `seen`, from the last look."""
        assert self.answers is not None
        return self.answers

    def set_answers(self, answers: Answers) -> None:
        """Note the model's answers under `seen`."""
        self.answers = self.known = answers
        self.changed = torch.zeros_like(self.wanted)

    def forget_answers(self, changed: torch.Tensor | bool = False) -> None:
        """Note that the answers are no longer known, as some rows' updates have changed, `(rows,)`, or all."""
        self.answers, self.changed = None, self.changed | changed

    def part(self, among: torch.Tensor, split: SplitModel) -> Part:
        """
        Return some of the facts by themselves, as [`part_of`] does.

        Args:
            among (`torch.Tensor` of shape `(facts,)`, bool): Which.
            split ([`SplitModel`]): The model.
        """
        facts = among.nonzero()[:, 0]
        if self.last_part is None or not torch.equal(self.last_part.facts, facts):
            self.last_part = part_of(split, self.rows, self.hidden, self.further, facts)
        return self.last_part

    def append(self, updates: Mapping[str, Update], steps: Sequence[int]) -> None:
        """Add a step of a method that does not join: its updates stand beside the earlier ones."""
        joined = side_by_side(self.updates, updates)
        self.keys = {name: u for name, (u, _) in joined.items()}
        self.residuals = {name: v for name, (_, v) in joined.items()}
        self.seen = joined
        self.forget_answers(True)
        self._count(steps)

    def accumulate(self, wanted: Mapping[str, Update], steps: Sequence[int]) -> None:
        """Add a step of a method that joins: its residuals are summed, at the inputs of the first step."""
        for name, (x, residual) in wanted.items():
            self.inputs.setdefault(name, x)
            self.residuals[name] = self.residuals[name] + residual if name in self.residuals else residual
        self.changed = self.changed | (torch.tensor(steps) > 0)
        self._count(steps)

    def _count(self, steps: Sequence[int]) -> None:
        self.steps = [count + more for count, more in zip(self.steps, steps, strict=True)]


def side_by_side(first: dict[str, Update], second: Mapping[str, Update]) -> dict[str, Update]:
    """Return the sum of two batches of updates, their ranks added. The first may be empty."""
    if not first:
        return dict(second)
    return {
        name: (torch.cat([u, second[name][0]], 1), torch.cat([v, second[name][1]], 1))
        for name, (u, v) in first.items()
    }


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape one value a row, `(rows,)`, to broadcast over `(rows, seq, width)`."""
    return on_device(values, like.device)[:, None, None]


def check_finite_answers(answers: Answers) -> None:
    """
    Raises:
        ValueError: The model's logits under the edits are not finite.
    """
    if not all(answers.finite):
        raise ValueError(
            "with the edit the model's logits hold NaN or infinity, so nothing was edited; let the step be made "
            "smaller (max_steps above 1, or a smaller edit_lr), or load a float16 base in bfloat16"
        )


def check_finite(what: str, pairs: Mapping[str, Update], values: torch.Tensor | None = None) -> None:
    """
    Check that some factors are finite.

    Args:
        what (`str`): What they are of.
        pairs (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> the factors.
        values (`torch.Tensor`, *optional*): Their [`~hf_mend.bases.fused.largest`], in the host's memory; asked for
            when missing.

    Raises:
        ValueError: A value is not finite.
    """
    if values is None:
        (values,) = fetched([largest(pairs)])
    if bool(values.isfinite().all()):
        return
    name = next(name for name, pair in pairs.items() if not all(torch.isfinite(side).all() for side in pair))
    raise ValueError(
        f"the {what} of layer {name!r} holds NaN or infinity, so nothing was edited; check that the base model's own "
        "outputs are finite (a float16 base may overflow: load it in bfloat16)"
    )
