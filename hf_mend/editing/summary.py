"""What is asked of the updates that a search found: finite or not, how large, and of which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..bases.fused import fetched, largest, of_one_shape, stacked
from ..data.places import on_device
from ..edits.low_rank import Update
from .batch_state import check_finite


@dataclass(frozen=True)
class Summary:
    """
    Args:
        updates (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): The updates, those of one shape side by side in
            memory.
        used (`dict[str, list[list[int]]]`): Layer name -> of each row, which factors are not zero.
        norms (`dict[str, list[float]]`): Layer name -> the Frobenius norm of each row's update.
    """

    updates: dict[str, Update]
    used: dict[str, list[list[int]]]
    norms: dict[str, list[float]]


def summarised(batches: Sequence[Mapping[str, Update]]) -> list[Summary]:
    """
    Return of each batch which of its updates' factors are used, and the updates' Frobenius norms. The host waits once
    for all of it.

    Args:
        batches (`Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]`): Of each batch, layer name -> `(u, v)`.

    Raises:
        ValueError: An update is not finite.
    """
    wanted: list[torch.Tensor] = []
    as_one: list[dict[str, Update]] = []
    for updates in batches:
        own: dict[str, Update] = {}
        for names in of_one_shape(updates):
            u, v = (stacked([updates[name][side] for name in names]) for side in (0, 1))  # (layers, rows, rank, width)
            own.update({name: (u[i], v[i]) for i, name in enumerate(names)})
            wanted += [(v != 0).any(-1) & (u != 0).any(-1), _squared_norms(u, v)]
        as_one.append({name: own[name] for name in updates})  # in the order of the layers
        wanted.append(largest(own))
    found = iter(fetched(wanted))
    summaries = []
    for updates in as_one:
        used: dict[str, list[list[int]]] = {}
        norms: dict[str, list[float]] = {}
        for names in of_one_shape(updates):
            masks, squares = next(found), next(found)
            for name, mask, of_rows in zip(names, masks, squares.clamp(min=0).sqrt(), strict=True):
                used[name] = [row.nonzero()[:, 0].tolist() for row in mask]
                norms[name] = of_rows.tolist()
        check_finite("update", updates, next(found))
        summaries.append(Summary(updates, used, {name: norms[name] for name in updates}))
    return summaries


def _squared_norms(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return `|v^T u|^2 = tr((u u^T)(v v^T))` of each update, without forming it."""
    u, v = u.double(), v.double()
    return ((u @ u.transpose(-1, -2)) * (v @ v.transpose(-1, -2))).sum((-1, -2))


def in_bfloat16(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return updates in bfloat16, those of one shape side by side in memory as they were."""
    found: dict[str, Update] = {}
    for names in of_one_shape(updates):
        u, v = (stacked([updates[name][side] for name in names]).bfloat16() for side in (0, 1))
        found.update({name: (u[i], v[i]) for i, name in enumerate(names)})
    return {name: found[name] for name in updates}


def rows_updates(
    updates: Mapping[str, Update], used: Mapping[str, Sequence[Sequence[int]]], row: int
) -> dict[str, Update]:
    """
    Return the update of one row, without the factors that are zero, in memory of its own.

    Args:
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of all rows.
        used (`Mapping[str, Sequence[Sequence[int]]]`): Layer name -> of each row, which factors are not zero.
        row (`int`): The row.
    """
    found: dict[str, Update] = {}
    for names in of_one_shape(updates):
        chosen = [used[name][row] for name in names]
        counts = [len(one) for one in chosen]
        sides = []
        for side in (0, 1):
            whole = stacked([updates[name][side] for name in names])  # (layers, rows, rank, width)
            _, rows, rank, width = whole.shape
            places = [(layer * rows + row) * rank + i for layer, one in enumerate(chosen) for i in one]
            index = on_device(torch.tensor(places, dtype=torch.long), whole.device)
            sides.append(whole.reshape(-1, width).index_select(0, index).split(counts))
        found.update(zip(names, zip(*sides, strict=True), strict=True))
    return {name: found[name] for name in updates}
