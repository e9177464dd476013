"""Rows of a matrix that grows at its end, while those who have it see it as it was."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch


_growing = threading.RLock()


class GrowingRows:
    """
    Some rows, which never change. More are written behind them in the same memory, where there is room and nobody has
    written before, so that appending costs as much as what is appended.

    Args:
        rows (`torch.Tensor` of shape `(count, ...)`): The rows.
    """

    def __init__(self, rows: torch.Tensor):
        self._memory, self._count = rows, len(rows)
        self._written = [len(rows)]  # of the memory, by all that share it

    @property
    def rows(self) -> torch.Tensor:
        """The rows."""
        return self._memory[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, with its room for more."""
        return self._memory.nbytes

    def first(self, count: int) -> GrowingRows:
        """Return the first of the rows."""
        return self._sharing(self._memory, count, self._written)

    def extended(self, more: Sequence[torch.Tensor], most: int | None = None) -> GrowingRows:
        """
        Return these rows and more.

        Args:
            more (`Sequence[torch.Tensor]`): The further rows, in parts.
            most (`int`, *optional*): The most rows to make room for.
        """
        count = self._count + sum(map(len, more))
        with _growing, torch.inference_mode(False):
            fits = self._written[0] == self._count and count <= len(self._memory)
            memory, written = self._memory, self._written
            if not fits:
                room = max(count, 2 * count if most is None else min(2 * count, most))
                memory = self._memory.new_empty(room, *self._memory.shape[1:])
                memory.data[: self._count] = self.rows
                written = [self._count]
            written[0] = count  # first: what an interrupt leaves half written is nobody's
        place, data = self._count, memory.data  # which autograd takes for another tensor than the rows before
        for part in more:
            data[place : place + len(part)] = part
            place += len(part)
        return self._sharing(memory, count, written)

    def to(self, device: torch.device) -> GrowingRows:
        """Return the rows on a device."""
        return self if self._memory.device == device else GrowingRows(self.rows.to(device))

    @staticmethod
    def _sharing(memory: torch.Tensor, count: int, written: list[int]) -> GrowingRows:
        new = GrowingRows(memory)
        new._count, new._written = count, written
        return new
