"""Caches of keys and values: how a model takes one, and how one serves several passes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch


def cache_name(model: Any) -> str | None:
    """Return the argument by which a model's `forward` takes a cache, `None` where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def takes_positions(model: Any) -> bool:
    """Whether a model's `forward` is told where its tokens stand in the text."""
    return "position_ids" in inspect.signature(model.forward).parameters


def continued(cache: Any) -> Any:
    """Return a cache that a pass may go on from: what the pass adds does not come into the one that is given."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


def rows_of_cache(cache: Any, index: slice | torch.Tensor) -> Any:
    """Return the keys and values of some of the rows."""
    found = continued(cache)
    for layer in found.layers:
        layer.keys, layer.values = layer.keys[index], layer.values[index]
    return found
