"""The keys of all edits that act, in one matrix."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..data.places import on_device
from ..edits.edit import Edit
from ..edits.growing import GrowingRows
from .network import key_scores, may_pass


# Tokens whose scores with all keys are in memory at once, by the number of keys.
_SCORES_AT_ONCE = 1 << 24
# Less than any score is past any threshold.
_OUT = -2.0


class KeyBank:
    """
    Find the edit that a text asks for.

    Args:
        edits (`Sequence[Edit]`): The edits, each with a scope.
    """

    def __init__(self, edits: Sequence[Edit]):
        self.ids: list[str] = []
        self._owner = GrowingRows(torch.zeros(0, dtype=torch.long))
        self._thresholds = GrowingRows(torch.zeros(0))
        self._keys: GrowingRows | None = None
        self._excluded: dict[int, torch.Tensor] = {}
        # A device -> keys, thresholds and owners there. What asks of one edit reads the host's own.
        self._elsewhere: dict[torch.device, list[GrowingRows]] = {}
        self._add(edits)

    def _add(self, edits: Sequence[Edit]) -> None:
        first = len(self.ids)
        scopes = [edit.scope for edit in edits if edit.scope is not None]
        self.ids = [*self.ids, *(edit.id for edit in edits)]
        if not scopes:
            return
        keys = [one.keys.float() for one in scopes]
        before = GrowingRows(keys[0].new_zeros(0, keys[0].shape[1])) if self._keys is None else self._keys
        self._keys = before.extended(_on(keys, before))
        thresholds = [one.thresholds.float() for one in scopes]
        self._thresholds = self._thresholds.extended(_on(thresholds, self._thresholds))
        owner = [torch.full((len(one.keys),), first + i, dtype=torch.long) for i, one in enumerate(scopes)]
        self._owner = self._owner.extended(_on(owner, self._owner))
        excluded = {first + i: one.excluded.float() for i, one in enumerate(scopes) if len(one.excluded)}
        if excluded:
            self._excluded = self._excluded | excluded

    def extended(self, edits: Sequence[Edit]) -> KeyBank:
        """Return the bank of these edits and further ones; this one stays as it is."""
        new = copy.copy(self)
        new._add(edits)
        return new

    def __len__(self) -> int:
        return len(self.ids)

    def _on(self, device: torch.device) -> _Keys:
        """Return the keys on a device, where they stay: those of further edits come behind them."""
        assert self._keys is not None
        own = [self._keys, self._thresholds, self._owner]
        held = own
        if self._keys.rows.device != device:
            held = self._elsewhere.get(device) or [GrowingRows(one.rows[:0].to(device)) for one in own]
            count = len(held[0].rows)
            if count < len(self._keys.rows):
                more = [on_device(one.rows[count:], device) for one in own]
                held = [one.extended([rows]) for one, rows in zip(held, more, strict=True)]
                self._elsewhere = {**self._elsewhere, device: held}
        keys, thresholds, owner = (one.rows for one in held)
        return _Keys(keys, thresholds, owner, self._excluded)

    def choose(self, queries: torch.Tensor, strictness: float = 0.0, only: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the number of the edit that each text asks for, -1 where it asks for none.

        Args:
            queries (`torch.Tensor` of shape `(texts, width)`): The texts' keys.
            strictness (`float`, defaults to 0.0): What is added to every threshold.
            only (`torch.Tensor` of shape `(texts,)`, *optional*): The number of the one edit that each may ask for.
        """
        if not self.ids:
            return queries.new_full((len(queries),), -1, dtype=torch.long)
        held = self._on(queries.device)
        size = max(1, _SCORES_AT_ONCE // len(held.keys))
        parts = queries.split(size)
        allowed = [None] * len(parts) if only is None else only.to(queries.device).split(size)
        return torch.cat([held.choose(*pair, strictness) for pair in zip(parts, allowed, strict=True)])

    def margins(self, queries: torch.Tensor, own: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return how far texts are past the thresholds: of their own edits, and of the nearest others.

        Args:
            queries (`torch.Tensor` of shape `(texts, width)`): The texts' keys.
            own (`Sequence[str]`): Of each text, the id of its own edit.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Two of shape `(texts,)`; -2 where there is no such edit, or a text is
            excluded.
        """
        none = queries.new_full((len(queries),), _OUT)
        if not self.ids:
            return none, none.clone()
        held, numbers = self._on(queries.device), {one: number for number, one in enumerate(self.ids)}
        mine = torch.tensor([numbers.get(one, -1) for one in own], device=queries.device)
        size = max(1, _SCORES_AT_ONCE // len(held.keys))
        found = []
        for part, numbered in zip(queries.split(size), mine.split(size), strict=True):
            over, owner = held.over(part, slice(None))
            is_own = owner == numbered[:, None]
            found.append(
                (over.masked_fill(~is_own, _OUT).max(-1).values, over.masked_fill(is_own, _OUT).max(-1).values)
            )
        return torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])

    def scores(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return each edit's score with a text, and the threshold of the key that it is nearest to passing.

        Args:
            query (`torch.Tensor` of shape `(width,)`): The text's key.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Two of shape `(edits,)`.
        """
        held = self._on(query.device)
        scores = key_scores(query[None], held.keys)[0]
        found, thresholds = [], []
        for number in range(len(self.ids)):
            own = (held.owner == number).nonzero()[:, 0]
            best = own[(scores[own] - held.thresholds[own]).argmax()]
            found.append(scores[best])
            thresholds.append(held.thresholds[best])
        return torch.stack(found), torch.stack(thresholds)

    def nearest(self, edit_id: str, keys: torch.Tensor) -> tuple[str | None, float]:
        """
        Return the id of the other edit that has a key most like one of an edit's, and how alike they are.

        Args:
            edit_id (`str`): The edit's id.
            keys (`torch.Tensor` of shape `(keys, width)`): Its keys, in the host's memory.
        """
        if self._keys is None:
            return None, 0.0
        held = self._on(self._keys.rows.device)
        own = [number for number, one in enumerate(self.ids) if one == edit_id]
        others = ~torch.isin(held.owner, torch.tensor(own, dtype=torch.long))
        if not others.any():
            return None, 0.0
        scores = key_scores(keys, held.keys).max(0).values.masked_fill(~others, -1.0)
        best = int(scores.argmax())
        return self.ids[int(held.owner[best])], float(scores[best])


@dataclass(frozen=True, eq=False)
class _Keys:
    """All keys on one device: `(keys, width)`, `(keys,)`, `(keys,)`, and an edit's number -> its excluded keys."""

    keys: torch.Tensor
    thresholds: torch.Tensor
    owner: torch.Tensor
    excluded: Mapping[int, torch.Tensor]

    def choose(self, queries: torch.Tensor, only: torch.Tensor | None, strictness: float) -> torch.Tensor:
        # Of tens of thousands of keys a few are worth a whole look.
        near = may_pass(queries, self.keys, self.thresholds + strictness).nonzero()[:, 0]
        if not len(near):
            return queries.new_full((len(queries),), -1, dtype=torch.long)
        over, owner = self.over(queries, near)
        if only is not None:
            over = over.masked_fill(owner != only[:, None], _OUT)
        best = over.max(-1)
        return torch.where(best.values >= strictness, owner[best.indices], -1)

    def over(self, queries: torch.Tensor, keys: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how far texts are past the thresholds of some keys, `(texts, keys)`, and the keys' edits."""
        owner, scores = self.owner[keys], key_scores(queries, self.keys[keys])
        over = scores - self.thresholds[keys]
        for number, excluded in self.excluded.items():
            # An excluded text that is at least as near as the key keeps the edit out.
            own = owner == number
            nearest = key_scores(queries, excluded.to(queries.device)).max(-1).values
            over[:, own] = torch.where(scores[:, own] > nearest[:, None], over[:, own], _OUT)
        return over, owner


def _on(tensors: Sequence[torch.Tensor], rows: GrowingRows) -> list[torch.Tensor]:
    return [one.to(rows.rows.device) for one in tensors]
