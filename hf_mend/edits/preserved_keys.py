"""The inputs of edits at which later edits are to leave the layers' outputs as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch


class PreservedKeys:
    """
    The layers' inputs at the tokens of edits that are there, kept as keys whose values later edits preserve.

    Args:
        by_edit (`Mapping[str, Mapping[str, torch.Tensor]]`): An edit's id -> layer name -> `(tokens, d_in)`.
    """

    def __init__(self, by_edit: Mapping[str, Mapping[str, torch.Tensor]] | None = None):
        self.by_edit = {edit_id: dict(keys) for edit_id, keys in (by_edit or {}).items()}
        self._merged: tuple[list[str], dict[str, torch.Tensor]] = ([], {})  # those of some ids, in fewer rows

    def copy(self) -> PreservedKeys:
        """The same keys, to go a way of their own; the tensors are shared."""
        copied = PreservedKeys(self.by_edit)
        copied._merged = self._merged
        return copied

    def of(self, edit_ids: Sequence[str], waiting: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """
        The keys of these edits, as far as they are known: layer name -> `(rows, d_in)`. Where there are many, fewer
        rows with the same `sum x x^T`. Discard all others, except those of the edits that are `waiting` to come back.
        """
        self.by_edit = {one: self.by_edit[one] for one in (*edit_ids, *waiting) if one in self.by_edit}
        known = [edit_id for edit_id in edit_ids if edit_id in self.by_edit]
        ids, merged = self._merged
        if known[: len(ids)] != ids:
            ids, merged = [], {}
        if new := [self.by_edit[edit_id] for edit_id in known[len(ids) :]]:
            merged = {name: _fewer_rows(torch.cat([one[name] for one in [merged, *new] if one])) for name in new[0]}
        self._merged = (known, merged)
        return merged


def _fewer_rows(x: torch.Tensor) -> torch.Tensor:
    """`(rows, width)` with the same `x^T x`, and as many rows as columns where there were half as many again."""
    if 2 * x.shape[0] <= 3 * x.shape[1]:
        return x
    return torch.linalg.qr(x.double(), mode="r").R.to(x.dtype)
