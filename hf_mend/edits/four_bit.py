"""
Edits in four bits: the factors of an edit that acts at few tokens bear a coarse grid, and thousands take little room.

An edit's layers are decomposed (SVD), the directions that all of them together can spare are left out, and the rest
are kept as codes of four bits, with a scale of eight bits for each 64 values of a row. A row of `d` values takes
`d / 2` bytes of codes, of which each holds a value of the row's first half and one of its second, and `d / 64` of
scales, which stand behind them. A scale is a power of the fourth root of two, so that there is none that is not
finite, and no bytes that stand for no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .low_rank import Update


# The names of the tensors in files of edits, in place of a layer's name: this and a number.
FOUR_BIT_TENSORS = "four_bit."

_GROUP = 64  # values of one scale
_LARGEST = 7  # of a code, whose values go from -8 on
_STEPS = 4  # of scales between powers of two
_ONE = 223  # the byte of a scale of 1; that of byte 0 is 0
_NOTHING = 1e-11  # the share of what is there by rounding alone
_NARROWER = (0, 1, 2, 3, 4)  # steps that a scale is tried below the one that cuts nothing off


@dataclass(frozen=True)
class FourBitPart:
    """
    The factors of layers of the same widths.

    Args:
        ranks (`dict[str, int]`): Layer name -> its number of rows, which stand one layer after the other.
        u (`torch.Tensor` of shape `(rank, bytes)`, uint8), v (`torch.Tensor` of shape `(rank, bytes)`, uint8): The
            rows' codes and scales.
    """

    ranks: dict[str, int]
    u: torch.Tensor
    v: torch.Tensor


class FourBitUpdates(Mapping[str, Update]):
    """
    An edit's updates, layer name -> `(u, v)` in float32, kept in four bits.

    Args:
        parts (`Sequence[FourBitPart]`): The layers, those of the same widths together.
    """

    def __init__(self, parts: Sequence[FourBitPart]):
        self.parts = tuple(parts)
        # At hand: opening a store asks the edits for their layers, thousands of them.
        self._ranks = {n: r for part in parts for n, r in part.ranks.items()}

    def __getitem__(self, name: str) -> Update:
        for part in self.parts:
            if name in part.ranks:
                start, stop = _place(part.ranks, name)
                return from_four_bits(part.u[start:stop]), from_four_bits(part.v[start:stop])
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, name: object) -> bool:  # Mapping's own would decode it
        return name in self._ranks

    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the shapes of each layer's `u` and `v`, without decoding them."""
        found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for part in self.parts:
            d_in, d_out = _width(part.u.shape[1]), _width(part.v.shape[1])
            for name, rank in part.ranks.items():
                found[name] = (rank, d_in), (rank, d_out)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return sum(part.u.nbytes + part.v.nbytes for part in self.parts)

    def describe(self) -> list[dict[str, int]]:
        """Describe the layers in plain JSON values."""
        return [part.ranks for part in self.parts]

    def tensors(self) -> dict[str, Update]:
        """Return the tensors in pairs, as files hold an edit's factors."""
        return {f"{FOUR_BIT_TENSORS}{number}": (part.u, part.v) for number, part in enumerate(self.parts)}

    @classmethod
    def from_file(
        cls, described: Sequence[Mapping[str, int]], pairs: Mapping[str, Update], where: str
    ) -> FourBitUpdates:
        """
        Rebuild them from the outputs of [`describe`], which [`is_four_bit_description`] has checked, and [`tensors`].

        Raises:
            ValueError: The tensors do not fit the description.
        """
        parts = []
        for number, ranks in enumerate(described):
            u, v = pairs.get(f"{FOUR_BIT_TENSORS}{number}") or (torch.zeros(0, 0), torch.zeros(0, 0))
            rows = sum(ranks.values())
            if not (_are_codes(u, rows) and _are_codes(v, rows)):
                raise ValueError(
                    f"{where}: the edit's codes have the shapes {tuple(u.shape)} and {tuple(v.shape)} in {u.dtype}, "
                    f"expected {rows} rows of four-bit factors; the file was altered, restore it from a copy"
                )
            parts.append(FourBitPart(dict(ranks), u, v))
        if len(set().union(*described)) != sum(map(len, described)):
            raise ValueError(f"{where}: an edit has a layer twice; the file was altered, restore it from a copy")
        return cls(parts)


def is_four_bit_description(value: Any) -> bool:
    """Whether a value has the form of [`FourBitUpdates.describe`]'s output."""
    if not isinstance(value, list) or not all(isinstance(ranks, dict) for ranks in value):
        return False
    every = [rank for ranks in value for rank in ranks.values()]
    return {*map(type, every)} <= {int} and 0 <= min(every, default=0) <= max(every, default=0) < 2**31


def bears_four_bits(updates: Mapping[str, Update]) -> bool:
    """Whether updates can be kept in four bits: two codes are a byte, so that widths are even."""
    return all(side.shape[-1] % 2 == 0 for pair in updates.values() for side in pair)


def in_four_bits(updates: Mapping[str, Update], error: float) -> list[FourBitUpdates]:
    """
    Return the updates of each of some edits in four bits.

    Args:
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes
            `(edits, rank, d_in)` and `(edits, rank, d_out)`, even widths.
        error (`float`): What may be left out of an edit, as a share of the squared Frobenius norm of all of its
            layers: the smallest singular values of them together.
    """
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name, (u, v) in updates.items():
        groups.setdefault((u.shape[1], u.shape[2], v.shape[2]), []).append(name)
    found = []
    for names in groups.values():
        u, v = (torch.stack([updates[name][side] for name in names]).cpu() for side in (0, 1))
        found.append((names, *_directions(u.float(), v.float())))  # (layers, edits, rank, ...)
    if not found:
        return []
    used = _used([sizes for _, _, _, sizes in found], error)
    codes = [(names, to_four_bits(u), to_four_bits(v)) for names, u, v, _ in found]
    edits = []
    for edit in range(found[0][1].shape[1]):
        parts = []
        for (names, u, v), kept in zip(codes, used, strict=True):
            chosen = kept[:, edit]  # (layers, rank)
            ranks = dict(zip(names, chosen.sum(-1).tolist(), strict=True))
            parts.append(FourBitPart(ranks, u[:, edit][chosen], v[:, edit][chosen]))
        edits.append(FourBitUpdates(parts))
    return edits


def _directions(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same products as pairs of like size, `(..., rank, d)` each, by falling singular value, and those."""
    q_in, r_in = torch.linalg.qr(u.transpose(-1, -2))  # (..., d_in, k), (..., k, rank)
    q_out, r_out = torch.linalg.qr(v.transpose(-1, -2))
    left, sizes, right = torch.linalg.svd(r_in @ r_out.transpose(-1, -2), full_matrices=False)
    u, v = (q_in @ left).transpose(-1, -2), right @ q_out.transpose(-1, -2)
    # There is a code more below zero than above, so that a direction's sign counts: it is to be always the same.
    sign = torch.where(u.gather(-1, u.abs().argmax(-1, keepdim=True)) > 0, -1.0, 1.0)
    scale = sizes.sqrt()[..., None]
    return scale * sign * u, scale * sign * v, sizes


def _used(sizes: Sequence[torch.Tensor], error: float) -> list[torch.Tensor]:
    """Return which singular values, `(layers, edits, rank)`, are kept: of each edit the largest of all its layers."""
    every = torch.cat([one.transpose(0, 1).flatten(1) for one in sizes], 1).double()  # (edits, layers * rank)
    ordered, places = every.sort(dim=1)
    shares = ordered.square().cumsum(1) / ordered.square().sum(1, keepdim=True).clamp(min=1e-300)
    needed = (shares > max(error, _NOTHING)) & (ordered > 0)
    kept = torch.zeros_like(needed).scatter(1, places, needed)
    parts = kept.split([one.shape[0] * one.shape[2] for one in sizes], 1)
    return [
        part.unflatten(1, (one.shape[0], one.shape[2])).transpose(0, 1) for part, one in zip(parts, sizes, strict=True)
    ]


def to_four_bits(rows: torch.Tensor) -> torch.Tensor:
    """Return the nearest rows of codes and scales, `(..., bytes)`, to some rows `(..., d)`."""
    width = rows.shape[-1]
    groups = _padded(rows.float(), -width % _GROUP).unflatten(-1, (-1, _GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    whole = (largest / _LARGEST).log2().mul(_STEPS).ceil().add(_ONE).clamp(1, 255)
    whole = torch.where(largest > 0, whole, 0.0)
    best = errors = codes = None
    for narrower in _NARROWER:
        scale = torch.where(whole > 0, (whole - narrower).clamp(min=1), 0.0)
        values = (groups / _of_byte(scale).clamp(min=torch.finfo(torch.float32).tiny)).round()
        values = values.clamp(-_LARGEST - 1, _LARGEST)
        error = (values * _of_byte(scale) - groups).square().sum(-1, keepdim=True)
        if best is None or errors is None or codes is None:
            best, errors, codes = scale, error, values
        better = error < errors
        best, codes = torch.where(better, scale, best), torch.where(better, values, codes)
        errors = torch.minimum(error, errors)
    assert best is not None and codes is not None
    values = (codes + 8).to(torch.uint8).flatten(-2)[..., :width]
    first, second = values.split(width // 2, -1)
    return torch.cat([first | (second << 4), best[..., 0].to(torch.uint8)], -1)


def from_four_bits(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows, `(..., d)` in float32, of some rows of codes and scales."""
    width = _width(rows.shape[-1])
    codes, scales = rows.split([width // 2, rows.shape[-1] - width // 2], -1)
    values = torch.cat([codes & 15, codes >> 4], -1).float() - 8
    scales = _of_byte(scales.float())
    if width % _GROUP == 0:
        return (values.unflatten(-1, (-1, _GROUP)) * scales[..., None]).flatten(-2)
    return values * scales.repeat_interleave(_GROUP, -1)[..., :width]


def _padded(rows: torch.Tensor, more: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, more)) if more else rows


def _of_byte(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, ((scale - _ONE) / _STEPS).exp2(), 0.0)


def _are_codes(side: torch.Tensor, rows: int) -> bool:
    """Whether a tensor may be so many rows of codes and scales."""
    if side.dtype != torch.uint8 or side.dim() != 2:
        return False
    count, width = side.shape
    return count == rows and _bytes(_width(width)) == width


def _bytes(width: int) -> int:
    return width // 2 + -(-width // _GROUP)


@lru_cache(maxsize=1024)
def _width(bytes_a_row: int) -> int:
    """Return the width of a row that takes so many bytes."""
    groups = -(-bytes_a_row // (_GROUP // 2 + 1))
    return 2 * max(0, bytes_a_row - groups)


def _place(ranks: Mapping[str, int], layer: str) -> tuple[int, int]:
    """Return the first of a layer's rows and the one behind its last."""
    start = 0
    for name, rank in ranks.items():
        if name == layer:
            break
        start += rank
    return start, start + ranks[layer]
