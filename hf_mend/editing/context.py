"""What edits are made with: a base model, its edited layers and a method, as one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..bases.gradients import Factors, trace
from ..bases.split import HiddenState, SplitModel, logits_of
from ..bases.targets import Target
from ..data.encoding import EncodedBatch
from ..edits.hook import applied
from ..edits.low_rank import Update
from ..methods import EditMethod
from .scoring import Answers, score_targets


@dataclass(frozen=True)
class EditingContext:
    """
    What edits are made with.

    Args:
        split ([`SplitModel`]): The base model, with whatever edits it carries, cut below its lowest edited layer.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Maps the factors of their gradients to updates.
    """

    split: SplitModel
    targets: Sequence[Target]
    method: EditMethod

    def trace(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> tuple[Factors, torch.Tensor]:
        """
        The factors of each row's gradient and the logits at the rows' positions: [`~hf_mend.bases.gradients.trace`].

        Args:
            rows ([`EncodedBatch`]): Prompts and targets.
            hidden ([`HiddenState`], *optional*): What `split.run_below` gave for them; computed when missing.
            updates (`Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]`): What the rows are under, in this
                order, as [`~hf_mend.edits.hook.applied`] takes it.
        """
        with applied(self.targets, *updates):
            return trace(self.split, self.targets, rows.inputs, rows.next_tokens, hidden)

    def logits(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> torch.Tensor:
        """The logits at the rows' positions, `(positions, vocab)`; the arguments are those of `trace`."""
        with applied(self.targets, *updates):
            return logits_of(self.split, rows, hidden)

    def answers(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> Answers:
        """What the model says to the rows; the arguments are those of `trace`."""
        return score_targets(rows, self.logits(rows, hidden, updates))
