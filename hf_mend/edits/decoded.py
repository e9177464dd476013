"""The factors of the edits that acted last, as passes compute with them: in float32, on the device of the layer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch

from .low_rank import Update


# Bytes of factors that are at hand; of thousands of edits few act at a time, and those at token after token.
_AT_HAND = 1 << 27


class _Recent:
    """The factors used last, by their edit's updates, layer and device."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple[int, str, torch.device], tuple[Mapping[str, Update], Update]] = OrderedDict()
        self.nbytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[int, str, torch.device]) -> Update | None:
        with self.lock:
            if key not in self.held:
                return None
            self.held.move_to_end(key)
            return self.held[key][1]

    def put(self, key: tuple[int, str, torch.device], updates: Mapping[str, Update], update: Update) -> None:
        with self.lock:
            if key not in self.held:
                self.nbytes += _size(update)
            self.held[key] = (updates, update)  # the mapping too: as long as it is held, no other has its id
            while self.nbytes > _AT_HAND and len(self.held) > 1:
                self.nbytes -= _size(self.held.popitem(last=False)[1][1])


_recent = _Recent()


def decoded(updates: Mapping[str, Update], name: str, device: torch.device) -> Update:
    """
    Return an edit's factors of a layer in float32 on a device.

    Args:
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): The edit's updates, which never change.
        name (`str`): The layer.
        device (`torch.device`): Where the layer runs.
    """
    key = (id(updates), name, device)
    held = _recent.get(key)
    if held is None:
        with torch.inference_mode(False):
            u, v = (side.to(device, torch.float32) for side in updates[name])
        held = (u, v)
        _recent.put(key, updates, held)
    return held


def _size(update: Update) -> int:
    return sum(side.nbytes for side in update)
