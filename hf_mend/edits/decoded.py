"""The factors of the edits that acted last, as passes compute with them: in float32, on the device of the layer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch

from .low_rank import Update


# Layers' factors that are at hand; of thousands of edits few act at a time, and those at token after token.
_AT_HAND = 256

_recent: OrderedDict[tuple[int, str, torch.device], tuple[Mapping[str, Update], Update]] = OrderedDict()
_lock = threading.Lock()


def decoded(updates: Mapping[str, Update], name: str, device: torch.device) -> Update:
    """
    Return an edit's factors of a layer in float32 on a device.

    Args:
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): The edit's updates, which never change.
        name (`str`): The layer.
        device (`torch.device`): Where the layer runs.
    """
    key = (id(updates), name, device)
    with _lock:
        held = _recent.get(key)
        if held is not None:
            _recent.move_to_end(key)
            return held[1]
    with torch.inference_mode(False):
        u, v = (side.to(device, torch.float32) for side in updates[name])
    with _lock:
        _recent[key] = (updates, (u, v))  # the mapping too: as long as it is held, no other has its id
        while len(_recent) > _AT_HAND:
            _recent.popitem(last=False)
    return u, v
