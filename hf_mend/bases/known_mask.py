"""Attention masks of which the host knows how much they mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


_SAME_VALUES = {torch.Tensor.to, torch.Tensor.bool, torch.Tensor.long, torch.Tensor.int}


class KnownMask(torch.Tensor):
    """
    An attention mask whose number of ones the host knows. Models ask whether a mask masks anything, which the host of
    a GPU waits for; this one answers from the host's own memory. In all else it is the tensor that it is made from.

    Attributes:
        ones (`int`): How many ones there are.
    """

    ones: int

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        own = args[0] if args and isinstance(args[0], KnownMask) else None
        if own is not None and len(args) == 1 and not kwargs:
            if func is torch.Tensor.all:
                return torch.tensor(own.ones == own.numel())
            if func is torch.Tensor.sum:
                return torch.tensor(own.ones)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            if own is not None and isinstance(found, torch.Tensor) and found.dim() == own.dim():
                whole = func is torch.Tensor.__getitem__ and found.shape == own.shape
                if func in _SAME_VALUES or whole:
                    return known_mask(found, own.ones)
                if func is torch.Tensor.__getitem__ and own.ones == own.numel():  # parts of it mask nothing either
                    return known_mask(found, found.numel())
            return found.as_subclass(torch.Tensor) if isinstance(found, KnownMask) else found


def known_mask(mask: torch.Tensor, ones: int) -> torch.Tensor:
    """
    Return an attention mask whose number of ones the host knows.

    Args:
        mask (`torch.Tensor`): Of ones and zeros.
        ones (`int`): How many ones there are.
    """
    known = mask.as_subclass(KnownMask)
    known.ones = ones
    return known


def mask_of_ones(like: torch.Tensor) -> torch.Tensor:
    """Return an attention mask that masks nothing, of another's shape."""
    return known_mask(torch.ones_like(like), like.numel())
