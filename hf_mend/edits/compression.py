"""Compression of many edits into one of a given rank, by singular value decomposition."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from ..data.display import html_table
from .edit import Edit, active_edits, stacked
from .low_rank import truncated


@dataclass
class Compression:
    """
    The result of a compression.

    Args:
        id (`str`): Id of the edit that replaces the others.
        edits (`list[str]`): Ids of the edits whose sum it is.
        rank (`int`): The highest rank of a layer.
        ranks_before (`dict[str, int]`): Layer name -> the sum of the edits' ranks.
        errors (`dict[str, float]`): Layer name -> Frobenius norm of the truncated part, divided by that of the sum.
    """

    id: str
    edits: list[str]
    rank: int
    ranks_before: dict[str, int]
    errors: dict[str, float]

    def __repr__(self) -> str:
        return f"Compression({self.id!r}, {len(self.edits)} edits, rank {self.rank}, error {self.error:.3g})"

    def _repr_html_(self) -> str:
        rows = [(name, rank, f"{self.errors[name]:.3g}") for name, rank in self.ranks_before.items()]
        return html_table(repr(self), rows, ("layer", "rank before", "error"))

    @property
    def error(self) -> float:
        """The largest of the layers' errors."""
        return max(self.errors.values(), default=0.0)


def compressed(edits: Sequence[Edit], rank: int, keep: bool = True) -> tuple[list[Edit], Compression]:
    """
    Reduce the active edits of a model to one, each layer's sum to the nearest matrix of a rank (Eckart and Young
    1936).

    Args:
        edits (`Sequence[Edit]`): The model's edits.
        rank (`int`): The highest rank of a layer.
        keep (`bool`, defaults to `True`): Keep the edits that the new one replaces, so that its undo restores them.

    Returns:
        `tuple`: The model's edits after it, and a report.

    Raises:
        ValueError: No edit acts, one acts only where it is asked for, or the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more")
    acting = active_edits(edits)
    scoped = [edit.id for edit in acting if edit.scope is not None]
    if scoped:
        raise ValueError(
            f"{len(scoped)} of the edits act only where they are asked for ({scoped[0]!r} is one), so they have no "
            "sum to compress; they cost nothing where they do not act, so leave them as they are"
        )
    sums = stacked(acting)
    if not any(len(u) for u, _ in sums.values()):
        raise ValueError("there is no edit to compress; make one first")
    found = {name: truncated(update, rank) for name, update in sums.items()}
    # Includes the edits that an earlier compression replaced: they are parts of this one now.
    replaces = [one for edit in acting for one in (edit.id, *edit.replaces)]
    parts = [{"id": edit.id, "prompt": edit.prompt, "target": edit.target} for edit in acting]
    whole = Edit(
        uuid.uuid4().hex[:12],
        "",
        "",
        {name: update for name, (update, _) in found.items()},
        {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "parts": json.dumps(parts, ensure_ascii=False),
        },
        replaces=replaces,
    )
    others = [edit for edit in edits if keep or not edit.enabled or edit.is_base_delta]
    report = Compression(
        whole.id,
        [edit.id for edit in acting],
        max(len(u) for u, _ in whole.updates.values()),
        {name: len(u) for name, (u, _) in sums.items()},
        {name: error for name, (_, error) in found.items()},
    )
    return [*others, whole], report
