"""The context of edits: a base model, its edited layers and a method, as one thing."""

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
    The base model, its edited layers and the method of edits.

    Args:
        split ([`SplitModel`]): The base model, with its active edits, cut below its lowest edited layer.
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
        Return the factors of each row's gradient and the logits at the rows' positions:
        [`~hf_mend.bases.gradients.trace`].

        Args:
            rows ([`EncodedBatch`]): Prompts and targets.
            hidden ([`HiddenState`], *optional*): Their output of `split.run_below`; computed when missing.
            updates (`Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]`): The updates that the rows are under,
                in this order, as [`~hf_mend.edits.hook.applied`] takes them.
        """
        with applied(self.targets, *updates):
            return trace(self.split, self.targets, rows.inputs, rows.next_tokens, hidden)

    def logits(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> torch.Tensor:
        """Return the logits at the rows' positions, `(positions, vocab)`. The arguments are those of `trace`."""
        with applied(self.targets, *updates):
            return logits_of(self.split, rows, hidden)

    def answers(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> Answers:
        """Return the model's answers to the rows. The arguments are those of `trace`."""
        return score_targets(rows, self.logits(rows, hidden, updates))
