"""An attention mask that is known on the host to mask nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


_KEEP_VALUES = {torch.Tensor.to, torch.Tensor.bool, torch.Tensor.long, torch.Tensor.int, torch.Tensor.__getitem__}


class Unpadded(torch.Tensor):
    """
    An attention mask of ones. Models ask whether a mask masks anything, which the host of a GPU waits for; this one
    answers from the host's own memory. In all else it is the tensor that it is made from.

    Example:

    ```python
    mask = torch.ones(2, 5, dtype=torch.long).as_subclass(Unpadded)
    ```
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Unpadded):
            if func is torch.Tensor.all:
                return torch.tensor(True)
            if func is torch.Tensor.sum:
                return torch.tensor(args[0].numel())
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            # Parts of it mask nothing either, nor does it in another dtype.
            same = func in _KEEP_VALUES and isinstance(args[0], Unpadded) and isinstance(found, torch.Tensor)
            if same and found.dim() == args[0].dim():
                return found.as_subclass(Unpadded)
            return found.as_subclass(torch.Tensor) if isinstance(found, Unpadded) else found
