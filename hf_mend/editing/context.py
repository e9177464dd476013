"""The context of edits: a base model, its edited layers and a method, as one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
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
        with self.applied(rows, *updates):
            factors, logits = trace(self.split, self.targets, rows.inputs, rows.next_tokens, hidden)
        if self.at_answers:  # (facts * forms, seq, d)
            present = rows.positions[..., None]  # (rows, seq, 1)
            factors = {
                name: (x * present.to(x.device), delta * present.to(delta.device))
                for name, (x, delta) in factors.items()
            }
        if rows.forms > 1:  # an edit's gradient is the sum over its forms: (facts, forms * seq, d)
            factors = {
                name: (x.reshape(rows.facts, -1, x.shape[-1]), delta.reshape(rows.facts, -1, delta.shape[-1]))
                for name, (x, delta) in factors.items()
            }
        return factors, logits

    def applied(self, rows: EncodedBatch, *updates: Mapping[str, Update]) -> AbstractContextManager[None]:
        """Add updates to the layers' outputs within the context, at `rows.positions` alone where they act so."""
        return applied(self.targets, *updates, where=rows.positions if self.at_answers else None)

    def logits(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> torch.Tensor:
        """Return the logits at the rows' positions, `(positions, vocab)`. The arguments are those of `trace`."""
        with self.applied(rows, *updates):
            return logits_of(self.split, rows, hidden)

    def answers(
        self, rows: EncodedBatch, hidden: HiddenState | None = None, updates: Sequence[Mapping[str, Update]] = ()
    ) -> Answers:
        """Return the model's answers to the rows. The arguments are those of `trace`."""
        return score_targets(rows, self.logits(rows, hidden, updates))
