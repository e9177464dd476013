"""The sum of a layer's edits, in the form that is cheaper to apply."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .growing import GrowingRows
from .low_rank import Update, dense, side_path


# A dense sum is copied after this many edits, and after its square, so that taking back one of the last edits does not
# sum up all the others again.
_COPY_EVERY = 32

# Sums are made one at a time, by whichever pass needs one first; the others wait for it.
_summing = threading.RLock()


def dense_is_cheaper(rank: int, d_in: int, d_out: int) -> bool:
    """Whether a matrix costs less than two thin ones of this rank, in memory as in multiplications a token."""
    return rank * (d_in + d_out) > d_in * d_out


@dataclass(frozen=True, eq=False)
class _Sum:
    """The first `count` edits, added up on one device; none of it ever changes."""

    count: int = 0
    thin: tuple[GrowingRows, GrowingRows] | None = None  # (rank, d_in), (rank, d_out)
    matrix: torch.Tensor | None = None  # (d_out, d_in)
    # distance -> number of edits, the matrix of those in CPU memory
    copies: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)

    def is_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        held = self.matrix if self.thin is None else self.thin[0].rows
        return held is None or (held.device == device and held.dtype == dtype)

    @property
    def pair(self) -> Update:
        assert self.thin is not None
        return self.thin[0].rows, self.thin[1].rows


class LayerSum:
    """
    The sum of a layer's edits, in the form that is cheaper to apply. It never changes: passes of any number of threads
    may use it while [`replaced`] and [`extended`] make the sums of other edits from it.

    Two stacked thin matrices of `rank * (d_in + d_out)` values, until a dense one has fewer: then the matrix, `d_in *
    d_out` values, and up to two copies of it in CPU memory as of earlier edits. Thin ones grow in place, behind the
    rows of the sums that were there before.

    The values depend on the list of edits alone, not on edits that were there before: edits are added one by one in
    their order and none is ever subtracted, so that an undo is exact to the bit. An undo goes back to a copy and adds
    the edits that followed: of `n` edits, an undo of the last costs up to 32 additions, of the oldest `n`. All of this
    happens in the next pass, on the device of the layer.

    Args:
        d_in (`int`): Width of the layer's input.
        d_out (`int`): Width of its output.
        edits (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): The edits to sum up, `(u, v)` of shapes `(rank, d_in)`
            and `(rank, d_out)`.
    """

    def __init__(self, d_in: int, d_out: int, edits: Sequence[Update] = ()):
        self.d_in, self.d_out = d_in, d_out
        self.edits: list[Update] = [pair for pair in edits if pair[0].shape[0]]
        self._dtype = torch.float32
        self._rank = 0
        self._count_in(self.edits)
        self._sum = _Sum()  # of as many of the edits as are added up

    def _count_in(self, edits: Sequence[Update]) -> None:
        self._rank += sum(u.shape[0] for u, _ in edits)
        if any(u.dtype == torch.float64 for u, _ in edits):
            self._dtype = torch.float64

    @property
    def is_dense(self) -> bool:
        """Whether the sum is a matrix, not two stacked thin ones."""
        return dense_is_cheaper(self._rank, self.d_in, self.d_out)

    @property
    def nbytes(self) -> int:
        """Bytes of the sum, beside the edits' own factors."""
        now = self._sum
        tensors = [*(copy for _, copy in now.copies.values()), *([] if now.matrix is None else [now.matrix])]
        return sum(t.nbytes for t in tensors) + sum(rows.nbytes for rows in now.thin or ())

    def extended(self, edits: Sequence[Update]) -> LayerSum:
        """Return the sum with further edits behind these."""
        more = [pair for pair in edits if pair[0].shape[0]]
        if not more:
            return self
        new = LayerSum(self.d_in, self.d_out)
        new.edits, new._dtype, new._rank = [*self.edits, *more], self._dtype, self._rank
        new._count_in(more)
        if new.is_dense == self.is_dense:
            new._sum = self._sum
        return new

    def replaced(self, edits: Sequence[Update]) -> LayerSum:
        """Return the sum of other edits. Of those that it begins with too, nothing is added up again."""
        new = LayerSum(self.d_in, self.d_out, edits)
        common, now = 0, self._sum
        for mine, theirs in zip(self.edits[: now.count], new.edits, strict=False):
            if mine[0] is not theirs[0] or mine[1] is not theirs[1]:
                break
            common += 1
        if new.is_dense == self.is_dense:
            new._sum = now if common == now.count else _rewound(now, common, new.edits)
        return new

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        """
        Return the edits' addition to the layer's output.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): The layer's input.
            device (`torch.device`): Where the layer runs.

        Returns:
            `torch.Tensor` of shape `(..., d_out)`, in float32, or float64 if an edit is.
        """
        now = self._summed_up(device)
        x = x.to(device)
        if now.matrix is not None:
            return nn.functional.linear(x.to(now.matrix.dtype), now.matrix)
        return side_path(x, now.pair)

    def matrix(self, device: torch.device) -> torch.Tensor:
        """Return the sum as a matrix `(d_out, d_in)`."""
        now = self._summed_up(device)
        return dense(now.pair) if now.matrix is None else now.matrix

    def _summed_up(self, device: torch.device) -> _Sum:
        """Return the sum of all edits on a device, where it is kept."""
        now = self._sum
        if now.count == len(self.edits) and now.is_on(device, self._dtype):
            return now
        with _summing, torch.inference_mode(False), torch.no_grad():
            now = self._sum  # another thread's pass may have made it meanwhile
            if not now.is_on(device, self._dtype):
                now = _Sum()
            pairs = [(u.to(device, self._dtype), v.to(device, self._dtype)) for u, v in self.edits[now.count :]]
            if pairs:
                now = self._with_dense(now, pairs) if self.is_dense else self._with_thin(now, pairs)
            self._sum = now
            return now

    def _with_thin(self, now: _Sum, pairs: Sequence[Update]) -> _Sum:
        # Never past the rank where a matrix takes over.
        most = self.d_in * self.d_out // (self.d_in + self.d_out)
        if now.thin is None:
            u, v = pairs[0]
            empty = GrowingRows(u.new_empty(0, self.d_in)), GrowingRows(v.new_empty(0, self.d_out))
        else:
            empty = now.thin
        sides = [rows.extended([pair[i] for pair in pairs], most) for i, rows in enumerate(empty)]
        return _Sum(now.count + len(pairs), (sides[0], sides[1]))

    def _with_dense(self, now: _Sum, pairs: Sequence[Update]) -> _Sum:
        u, v = pairs[0]
        # One new matrix, whatever the number of edits: passes of others may be using the old one.
        matrix = u.new_zeros(self.d_out, self.d_in) if now.matrix is None else now.matrix.clone()
        count, copies = now.count, dict(now.copies)
        for u, v in pairs:
            for distance in (_COPY_EVERY, _COPY_EVERY**2):
                if count and count % distance == 0:
                    copies[distance] = (count, matrix.to("cpu", copy=True))
            self._add_dense(matrix, u, v)
            count += 1
        return _Sum(count, None, matrix, copies)

    def _add_dense(self, matrix: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> None:
        matrix.addmm_(v.T, u)  # in place, which autocast leaves alone


def _rewound(now: _Sum, count: int, edits: Sequence[Update]) -> _Sum:
    """Return a sum as it was after the first `count` edits, or fewer."""
    if now.matrix is None:
        if now.thin is None:
            return _Sum()
        rank = sum(len(u) for u, _ in edits[:count])
        return _Sum(count, (now.thin[0].first(rank), now.thin[1].first(rank)))
    copies = {distance: copy for distance, copy in now.copies.items() if copy[0] <= count}
    if not copies:
        return _Sum()
    known, copy = max(copies.values(), key=lambda copy: copy[0])
    return replace(now, count=known, matrix=copy.to(now.matrix.device), copies=copies)
