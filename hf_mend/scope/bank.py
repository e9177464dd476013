"""The keys of all edits that act, in one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..edits.edit import Edit
from .network import key_scores


# Tokens whose scores with all keys are in memory at once, by the number of keys.
_SCORES_AT_ONCE = 1 << 24


class KeyBank:
    """
    Find the edit that a text asks for.

    Args:
        edits (`Sequence[Edit]`): The edits, each with a scope.
    """

    def __init__(self, edits: Sequence[Edit]):
        self.ids = [edit.id for edit in edits]
        scopes = [edit.scope for edit in edits if edit.scope is not None]
        self._owner = torch.tensor([i for i, one in enumerate(scopes) for _ in one.keys], dtype=torch.long)
        self._keys = torch.cat([one.keys.float() for one in scopes]) if scopes else torch.zeros(0, 0)
        self._thresholds = torch.cat([one.thresholds.float() for one in scopes]) if scopes else torch.zeros(0)
        excluding = [(i, one.excluded.float()) for i, one in enumerate(scopes) if len(one.excluded)]
        self._excluded = {i: excluded for i, excluded in excluding}

    def __len__(self) -> int:
        return len(self.ids)

    def _to(self, device: torch.device) -> None:
        if self._keys.device != device:
            self._keys, self._thresholds = self._keys.to(device), self._thresholds.to(device)
            self._owner = self._owner.to(device)
            self._excluded = {i: keys.to(device) for i, keys in self._excluded.items()}

    def choose(self, queries: torch.Tensor, strictness: float = 0.0) -> torch.Tensor:
        """
        Return the number of the edit that each text asks for, -1 where it asks for none.

        Args:
            queries (`torch.Tensor` of shape `(texts, width)`): The texts' keys.
            strictness (`float`, defaults to 0.0): What is added to every threshold.
        """
        if not self.ids:
            return queries.new_full((len(queries),), -1, dtype=torch.long)
        self._to(queries.device)
        size = max(1, _SCORES_AT_ONCE // len(self._keys))
        return torch.cat([self._choose(part, strictness) for part in queries.split(size)])

    def _choose(self, queries: torch.Tensor, strictness: float) -> torch.Tensor:
        scores = key_scores(queries, self._keys)  # (texts, keys)
        over = scores - self._thresholds
        for number, excluded in self._excluded.items():
            # An excluded text that is at least as near as the key keeps the edit out.
            own = self._owner == number
            nearest = key_scores(queries, excluded).max(-1).values
            over[:, own] = torch.where(scores[:, own] > nearest[:, None], over[:, own], -2.0)
        best = over.max(-1)
        return torch.where(best.values >= strictness, self._owner[best.indices], -1)

    def scores(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return each edit's score with a text, and the threshold of the key that it is nearest to passing.

        Args:
            query (`torch.Tensor` of shape `(width,)`): The text's key.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Two of shape `(edits,)`.
        """
        self._to(query.device)
        scores = key_scores(query[None], self._keys)[0]
        found, thresholds = [], []
        for number in range(len(self.ids)):
            own = (self._owner == number).nonzero()[:, 0]
            best = own[(scores[own] - self._thresholds[own]).argmax()]
            found.append(scores[best])
            thresholds.append(self._thresholds[best])
        return torch.stack(found), torch.stack(thresholds)

    def nearest(self, edit_id: str, keys: torch.Tensor) -> tuple[str | None, float]:
        """
        Return the id of the other edit that has a key most like one of an edit's, and how alike they are.

        Args:
            edit_id (`str`): The edit's id.
            keys (`torch.Tensor` of shape `(keys, width)`): Its keys.
        """
        others = torch.tensor([one != edit_id for one in self.ids])[self._owner.cpu()]
        if not others.any():
            return None, 0.0
        scores = (
            key_scores(keys.to(self._keys.device), self._keys)
            .max(0)
            .values.masked_fill(~others.to(self._keys.device), -1.0)
        )
        best = int(scores.argmax())
        return self.ids[int(self._owner[best])], float(scores[best])
