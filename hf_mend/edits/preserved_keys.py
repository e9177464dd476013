"""Preserved keys: inputs of edits at which later edits leave the layers' outputs as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch


class PreservedKeys:
    """
    The layers' inputs at the tokens of earlier edits, as keys whose values later edits preserve.

    Args:
        by_edit (`Mapping[str, Mapping[str, torch.Tensor]]`): An edit's id -> layer name -> `(tokens, d_in)`.
    """

    def __init__(self, by_edit: Mapping[str, Mapping[str, torch.Tensor]] | None = None):
        self.by_edit = {edit_id: dict(keys) for edit_id, keys in (by_edit or {}).items()}
        self._merged: tuple[list[str], dict[str, torch.Tensor]] = ([], {})  # some ids, and their keys in fewer rows

    def copy(self) -> PreservedKeys:
        """Return a copy that changes independently of this one. The tensors are shared."""
        copied = PreservedKeys(self.by_edit)
        copied._merged = self._merged
        return copied

    def of(self, edit_ids: Sequence[str], waiting: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """
        Return the keys of these edits, as far as they are stored: layer name -> `(rows, d_in)`. Where there are many,
        fewer rows with the same `sum x x^T`. Discard all others, except those of the edits that are `waiting` to be
        enabled or restored.
        """
        self.by_edit = {one: self.by_edit[one] for one in (*edit_ids, *waiting) if one in self.by_edit}
        stored = [edit_id for edit_id in edit_ids if edit_id in self.by_edit]
        ids, merged = self._merged
        if stored[: len(ids)] != ids:
            ids, merged = [], {}
        if new := [self.by_edit[edit_id] for edit_id in stored[len(ids) :]]:
            merged = {name: _fewer_rows(torch.cat([one[name] for one in [merged, *new] if one])) for name in new[0]}
        self._merged = (stored, merged)
        return merged


def _fewer_rows(x: torch.Tensor) -> torch.Tensor:
    """Return rows, `(rows, width)`, with the same `x^T x`: as many as columns where there were half as many again."""
    if 2 * x.shape[0] <= 3 * x.shape[1]:
        return x
    return torch.linalg.qr(x.double(), mode="r").R.to(x.dtype)
