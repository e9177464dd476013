"""Some facts of a batch by themselves: a search goes on with those that do not say their targets yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..bases.gradients import Factors
from ..bases.prefix import pays
from ..bases.split import HiddenState, SplitModel
from ..data.encoding import EncodedBatch
from ..data.places import on_device
from ..edits.low_rank import Update


@dataclass(frozen=True)
class Part:
    """
    Some facts of a batch.

    Args:
        facts (`torch.Tensor` of shape `(facts,)`): Their numbers in it, in the host's memory.
        rows ([`EncodedBatch`]): Their texts.
        hidden ([`HiddenState`]): These texts' output of `run_below`.
        further ([`HiddenState`], *optional*): That of their `further`.
        is_whole (`bool`): Whether it is all of the batch.
    """

    facts: torch.Tensor
    rows: EncodedBatch
    hidden: HiddenState
    further: HiddenState | None
    is_whole: bool

    def of(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        """Return the updates that these facts are under: their own, or the one of all."""
        if self.is_whole:
            return dict(updates)
        return {name: (u, v) if u.dim() == 2 else (self._at(u), self._at(v)) for name, (u, v) in updates.items()}

    def _at(self, side: torch.Tensor) -> torch.Tensor:
        return side.index_select(0, on_device(self.facts, side.device))

    def in_place(self, factors: Factors, whole: EncodedBatch) -> Factors:
        """
        Return these facts' factors among those of the whole batch; the others' are zero.

        Args:
            factors ([`~hf_mend.bases.gradients.Factors`]): Theirs.
            whole ([`EncodedBatch`]): The batch.
        """
        if self.is_whole:
            return factors
        found = Factors(tokens=self._tokens(factors, whole.forms))
        for name, (x, delta) in factors.items():
            found[name] = self._among(x, whole.facts), self._among(delta, whole.facts)
        return found

    def _among(self, side: torch.Tensor, facts: int) -> torch.Tensor:
        zeros = torch.zeros(facts, *side.shape[1:], dtype=side.dtype, device=side.device)
        return zeros.index_copy_(0, on_device(self.facts, side.device), side)

    def _tokens(self, factors: Factors, forms: int) -> torch.Tensor | None:
        """The numbers of the tokens that may have a gradient, counted through all of the batch."""
        if factors.tokens is None:
            return None
        width = next(iter(factors.values()))[0].shape[1]  # of a fact, in all its forms
        fact, place = factors.tokens // width, factors.tokens % width
        return on_device(self.facts, fact.device)[fact] * width + place


def part_of(
    split: SplitModel, rows: EncodedBatch, hidden: HiddenState, further: HiddenState | None, facts: torch.Tensor
) -> Part:
    """
    Return some facts of a batch, or all of it where a pass of fewer would not pay.

    Args:
        split ([`SplitModel`]): The model.
        rows ([`EncodedBatch`]): The batch.
        hidden ([`HiddenState`]): Its output of `run_below`.
        further ([`HiddenState`], *optional*): That of its `further`.
        facts (`torch.Tensor` of shape `(facts,)`): The facts' numbers, in the host's memory.
    """
    left_out = (rows.facts - len(facts)) * rows.forms * rows.next_tokens.shape[1]
    if not len(facts) or not left_out or not pays(split.device, left_out, split.parameters):
        return Part(torch.arange(rows.facts), rows, hidden, further, True)
    if further is not None and rows.further is not None:
        further = further.of_facts(facts, rows.further)
    return Part(facts, rows.of_facts(facts), hidden.of_facts(facts, rows), further, False)
