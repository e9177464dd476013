"""What the host knows of a batch, so that nothing has to be asked of the device that has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Places:
    """
    Where the positions of a batch are, as numbers: a mask would have to be counted first, for which the host waits.

    Args:
        positions (`torch.Tensor` of shape `(positions,)`): The positions, counted through all rows.
        labels (`torch.Tensor` of shape `(positions,)`): The token that each must predict, 0 where there is none.
        read (`torch.Tensor` of shape `(tokens,)`, *optional*): The tokens that are no padding, counted likewise;
            `None` where all are, or where encoder and decoder have tokens of their own.
        counts (`list[int]`): The number of positions of each row.
        said (`list[list[int]]`): The tokens that each row's positions must predict, -100 where there is none.
        pads_right (`bool`): Whether what is no padding stands at the beginning of each row.
        spans (`list[tuple[int, int]]`): Of each row the first position, or the first that predicts an answer where
            what follows it is asked for, and the token behind the last.
        lengths (`list[int]`): The tokens of each row that are no padding; none of an encoder-decoder model's.
    """

    positions: torch.Tensor
    labels: torch.Tensor
    read: torch.Tensor | None
    counts: list[int]
    said: list[list[int]]
    pads_right: bool
    spans: list[tuple[int, int]]
    lengths: list[int]

    @classmethod
    def of(
        cls,
        positions: torch.Tensor,
        next_tokens: torch.Tensor,
        mask: torch.Tensor | None,
        device: torch.device,
        answers: torch.Tensor | None = None,
    ) -> Places:
        """Find the places of a batch that lies in the host's memory."""
        flat = positions.reshape(-1).nonzero()[:, 0]
        labels, counts = next_tokens.reshape(-1)[flat], positions.sum(-1).tolist()
        said = [part.tolist() for part in labels.split(counts)]
        read = None if mask is None or bool(mask.all()) else mask.reshape(-1).nonzero()[:, 0]
        pads_right = mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all())
        some = positions if answers is None else positions | answers
        first = some.int().argmax(-1)  # 0 where a row has none
        last = torch.where(some.any(-1), some.shape[1] - some.flip(-1).int().argmax(-1), 0)
        spans = [*zip(first.tolist(), last.tolist(), strict=True)]
        lengths = [] if mask is None else mask.sum(-1).tolist()
        return cls(flat, labels.clamp(min=0), read, counts, said, pads_right, spans, lengths).to(device)

    def to(self, device: torch.device | str) -> Places:
        """Return the places with their tensors on a device."""
        read = None if self.read is None else on_device(self.read, device)
        return replace(
            self, positions=on_device(self.positions, device), labels=on_device(self.labels, device), read=read
        )

    def of_rows(self, rows: Sequence[int], width: int) -> Places:
        """
        Return the places of some of the rows, in a batch of their own.

        Args:
            rows (`Sequence[int]`): Their numbers.
            width (`int`): The tokens of a row, padding and all.
        """
        counts = torch.tensor(self.counts)
        ends, moves = counts.cumsum(0).tolist(), [(i - row) * width for i, row in enumerate(rows)]
        chosen = [number for row in rows for number in range(ends[row] - self.counts[row], ends[row])]
        index = on_device(torch.tensor(chosen, dtype=torch.long), self.positions.device)
        moved = torch.tensor(moves).repeat_interleave(counts[[*rows]])
        positions = self.positions.index_select(0, index) + on_device(moved, self.positions.device)
        lengths = [self.lengths[row] for row in rows] if self.lengths else []
        read = None  # of other padding, the networks run on it too
        if self.read is not None and self.pads_right and min(lengths) < width:
            tokens = [i * width + place for i, length in enumerate(lengths) for place in range(length)]
            read = on_device(torch.tensor(tokens), self.read.device)
        return replace(
            self,
            positions=positions,
            labels=self.labels.index_select(0, index),
            read=read,
            counts=[self.counts[row] for row in rows],
            said=[self.said[row] for row in rows],
            spans=[self.spans[row] for row in rows],
            lengths=lengths,
        )

    def at(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values at the positions, `(rows, seq, ...)` -> `(positions, ...)`."""
        index = self.positions.to(values.device)
        return values.reshape(-1, *values.shape[2:]).index_select(0, index)


def on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor of the host on a device; nothing waits until it is there."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors of one dtype one behind the other, as they are: autocast would change some, and refuse others."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat([*tensors])
