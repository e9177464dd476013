"""Texts of about the same length in a pass: forms of asking differ in length ten times, and padding takes time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..data.encoding import EncodedBatch


# Texts of fewer tokens, padding and all, are one pass. A part begins with a text shorter than this share of the last
# part's longest, where that part has a quarter of these tokens: a pass reads all weights again.
_FEW_TOKENS, _SHORTER = 256, 0.75


def parts_by_length(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """
    Return the numbers of some texts in parts of about the same length, in falling order of it: one part where they are
    few tokens, and on a GPU, which would rather have few passes. Processes that share a base out have to make the same
    passes, so that theirs are one part too.

    Args:
        lengths (`Sequence[int]`): The tokens of each text.
        device (`torch.device`): Where the passes run.
    """
    if wants_few_passes(device) or len(lengths) * max(lengths, default=0) < _FEW_TOKENS:
        return [[*range(len(lengths))]]
    parts: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[parts[-1][0]] if parts else 0
        if not parts or lengths[number] < _SHORTER * longest and len(parts[-1]) * longest >= _FEW_TOKENS / 4:
            parts.append([])
        parts[-1].append(number)
    return [[*range(len(lengths))]] if len(parts) == 1 else parts


def by_length(rows: EncodedBatch) -> Iterator[tuple[torch.Tensor | None, EncodedBatch]]:
    """
    The rows in parts of about the same length, where they are many tokens and would be padding for the greater part:
    forms of asking differ in length ten times.

    Yields:
        `tuple[torch.Tensor | None, EncodedBatch]`: The numbers of the part's rows, `None` for all of them in their
        order, and the part without the padding that it does not need.
    """
    lengths, device = rows.places.lengths, rows.positions.device
    parts = parts_by_length(lengths, device)
    if len(parts) == 1:
        yield None, rows
        return
    for part in parts:
        index = torch.tensor(sorted(part), device=device)
        width = lengths[part[0]]
        inputs = {name: value[index, :width] for name, value in rows.inputs.items()}
        subjects = None if rows.subjects is None else rows.subjects[index]
        answers = None if rows.answers is None else rows.answers[index, :width]
        next_tokens, positions = rows.next_tokens[index, :width], rows.positions[index, :width]
        yield index, EncodedBatch(inputs, next_tokens, positions, subjects, answers=answers)


def wants_few_passes(device: torch.device) -> bool:
    """
    Whether texts of unlike lengths had better run in one pass: on a GPU, where a short pass is as long as its kernels
    take to launch, and where processes that share a base out have to make the same passes.
    """
    return device.type != "cpu" or in_processes()


def in_processes() -> bool:
    """Whether this is one of several processes, which may share a base out."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
