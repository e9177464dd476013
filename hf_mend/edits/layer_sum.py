"""The sum of a layer's edits, in the form that is cheaper to apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .low_rank import Update, dense, side_path


# A dense sum is copied after this many edits, and after its square, so that taking back one of the last edits does not
# sum up all the others again.
_COPY_EVERY = 32


def dense_is_cheaper(rank: int, d_in: int, d_out: int) -> bool:
    """Whether a matrix costs less than two thin ones of this rank, in memory as in multiplications a token."""
    return rank * (d_in + d_out) > d_in * d_out


class LayerSum:
    """
    The sum of a layer's edits, in the form that is cheaper to apply.

    Two stacked thin matrices of `rank * (d_in + d_out)` values, until a dense one has fewer: then the matrix, `d_in *
    d_out` values, and up to two copies of it in CPU memory as of earlier edits. Both grow with each edit and are never
    allocated anew for one edit.

    The values depend on the list of edits alone, not on edits that were there before: edits are added one by one in
    their order and none is ever subtracted, so that an undo is exact to the bit. An undo goes back to a copy and adds
    the edits that followed: of `n` edits, an undo of the last costs up to 32 additions, of the oldest `n`. All of this
    happens in the next pass, on the device of the layer.

    Args:
        d_in (`int`): Width of the layer's input.
        d_out (`int`): Width of its output.
    """

    def __init__(self, d_in: int, d_out: int):
        self.d_in, self.d_out = d_in, d_out
        self.edits: list[Update] = []
        self._dtype = torch.float32
        self._rank = 0
        self._summed = 0  # number of the edits that the tensors hold
        self._thin: Update | None = None  # with room to grow: (capacity, d_in), (capacity, d_out)
        self._used = 0  # rows of them
        self._matrix: torch.Tensor | None = None  # (d_out, d_in)
        self._copies: dict[int, tuple[int, torch.Tensor]] = {}  # distance -> number of edits, the matrix of those

    @property
    def is_dense(self) -> bool:
        """Whether the sum is a matrix, not two stacked thin ones."""
        return dense_is_cheaper(self._rank, self.d_in, self.d_out)

    @property
    def nbytes(self) -> int:
        """Bytes of the sum, beside the edits' own factors."""
        tensors = [*(self._thin or ()), *(copy for _, copy in self._copies.values())]
        return sum(t.nbytes for t in tensors) + (0 if self._matrix is None else self._matrix.nbytes)

    def replace(self, edits: Sequence[Update]) -> None:
        """Set the edits to sum up, `(u, v)` of shapes `(rank, d_in)` and `(rank, d_out)`."""
        edits = [pair for pair in edits if len(pair[0])]
        common = 0
        for mine, theirs in zip(self.edits[: self._summed], edits, strict=False):
            if mine[0] is not theirs[0] or mine[1] is not theirs[1]:
                break
            common += 1
        was_dense = self.is_dense
        self.edits, self._rank = edits, sum(len(u) for u, _ in edits)
        self._dtype = torch.float64 if any(u.dtype == torch.float64 for u, _ in edits) else torch.float32
        if self.is_dense != was_dense:
            self._forget()
        elif common < self._summed:
            self._rewind(common)

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        """
        Return the edits' addition to the layer's output.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): The layer's input.
            device (`torch.device`): Where the layer runs.

        Returns:
            `torch.Tensor` of shape `(..., d_out)`, in float32, or float64 if an edit is.
        """
        self._sum_up(device)
        x = x.to(device)
        if self._matrix is not None:
            return nn.functional.linear(x.to(self._matrix.dtype), self._matrix)
        assert self._thin is not None
        u, v = self._thin
        return side_path(x, (u[: self._used], v[: self._used]))

    def matrix(self, device: torch.device) -> torch.Tensor:
        """Return the sum as a matrix `(d_out, d_in)`."""
        self._sum_up(device)
        if self._matrix is not None:
            return self._matrix
        assert self._thin is not None
        u, v = self._thin
        return dense((u[: self._used], v[: self._used]))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _sum_up(self, device: torch.device) -> None:
        """Bring the tensors up to date."""
        held = self._matrix if self._thin is None else self._thin[0]
        if held is not None and (held.device != device or held.dtype != self._dtype):
            self._forget()
        if self._summed == len(self.edits):
            return
        add = self._add_dense if self.is_dense else self._add_thin
        try:
            for u, v in self.edits[self._summed :]:
                add(u.to(device, self._dtype), v.to(device, self._dtype))
                self._summed += 1
        except BaseException:  # an interrupt must not leave an edit added and not counted
            self._forget()
            raise

    def _add_thin(self, u: torch.Tensor, v: torch.Tensor) -> None:
        rows = self._used + len(u)
        if self._thin is None or rows > len(self._thin[0]):
            # Never past the rank where a matrix takes over.
            capacity = max(rows, min(2 * rows, self.d_in * self.d_out // (self.d_in + self.d_out)))
            grown = u.new_empty(capacity, self.d_in), v.new_empty(capacity, self.d_out)
            if self._thin is not None:
                for new, old in zip(grown, self._thin, strict=True):
                    new[: self._used] = old[: self._used]
            self._thin = grown
        for side, rows_of_edit in zip(self._thin, (u, v), strict=True):
            side[self._used : rows] = rows_of_edit
        self._used = rows

    def _add_dense(self, u: torch.Tensor, v: torch.Tensor) -> None:
        if self._matrix is None:
            self._matrix = u.new_zeros(self.d_out, self.d_in)
        for distance in (_COPY_EVERY, _COPY_EVERY**2):
            if self._summed and self._summed % distance == 0:
                old = self._copies.get(distance)
                copy = torch.empty_like(self._matrix, device="cpu") if old is None else old[1]
                self._copies[distance] = (self._summed, copy.copy_(self._matrix))
        self._matrix.addmm_(v.T, u)  # in place, which autocast leaves alone

    def _rewind(self, count: int) -> None:
        """Take the tensors back to their values after the first `count` edits, or fewer."""
        if self._matrix is None:
            self._summed, self._used = count, sum(len(u) for u, _ in self.edits[:count])
            return
        self._copies = {distance: copy for distance, copy in self._copies.items() if copy[0] <= count}
        if self._copies:
            self._summed, copy = max(self._copies.values(), key=lambda copy: copy[0])
            self._matrix.copy_(copy)
        else:
            self._summed = 0
            self._matrix.zero_()

    def _forget(self) -> None:
        self._summed = self._used = 0
        self._thin = self._matrix = None
        self._copies = {}
