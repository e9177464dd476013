"""Calls that several processes make together: each finds the edits of its share, and all carry those of every one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..bases.threads import set_within
from ..edits.edit import Edit
from ..edits.four_bit import FourBitUpdates


Found = TypeVar("Found")


@dataclass(frozen=True)
class Together:
    """
    This process among those that make a call together. What it finds goes to the others where all of them ask for it:
    each has to come by the same places in the same order.

    Args:
        number (`int`, defaults to 0): Its number, from 0 on.
        count (`int`, defaults to 1): The number of processes.
    """

    number: int = 0
    count: int = 1

    def own(self, numbers: Sequence[int]) -> list[int]:
        """Return the share of this process of some requests."""
        return list(numbers[self.number :: self.count])

    def every(self, found: Found) -> list[Found]:
        """Return what each process has found, in the order of the processes."""
        if self.count == 1:
            return [found]
        every: list[Found] = [found] * self.count
        torch.distributed.all_gather_object(every, found)
        every[self.number] = found  # as it is here, and not a copy
        return every

    def joined(self, found: Sequence[Found]) -> list[Found]:
        """Return what all processes have found, as one list."""
        return [one for part in self.every(list(found)) for one in part]

    def edits(self, edits: dict[int, Edit]) -> dict[int, Edit]:
        """Return the edits of all processes, by request; those of the others are in the host's memory."""
        if self.count == 1:
            return edits
        every = self.every({i: _on_host(edit) for i, edit in edits.items()})
        return {i: edit for part in every for i, edit in part.items()} | edits


def _on_host(edit: Edit) -> Edit:
    if isinstance(edit.updates, FourBitUpdates):
        return edit
    return replace(edit, updates={name: (u.cpu(), v.cpu()) for name, (u, v) in edit.updates.items()})


_together: ContextVar[Together] = ContextVar("together", default=Together())  # noqa: B039, which is frozen


def made_together(number: int, count: int) -> AbstractContextManager[Together]:
    """
    Share the edits of each call within the context out over the processes of a launch, all of which must make the same
    calls on copies of one model. Each gets the results of all, and carries all edits, as if it had made them.

    Args:
        number (`int`): The number of this process, from 0 on.
        count (`int`): The number of processes.
    """
    return set_within(_together, Together(number, count))


def processes_of_call() -> Together:
    """Return this process among those that make its calls together."""
    return _together.get()
