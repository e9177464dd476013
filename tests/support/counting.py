"""Counts, on a CPU, of what a call asks of a device: kernels, and how often the host waits for a value."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# They find another name for the same memory, or take new memory: no kernel runs.
_NO_KERNEL = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "detach", "empty", "empty_like", "empty_strided",
    "lift_fresh", "new_empty", "new_empty_strided",
}  # fmt: skip
# The size of what they return, or what they return, is known once they have run.
_WAITS = {"_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero", "unique_consecutive", "unique_dim"}


class Counting:
    """
    Count the kernels and the waits of what runs within the context, as if the model were on a device of its own.

    On the device are the modules' parameters and buffers, what is moved with `.to(device)` or made with `device=`, and
    what is computed from any of these. The host waits where it reads such a value: `item`, `tolist`, `if`, `.cpu()`,
    `.to("cpu")`, a mask as an index.

    Args:
        modules (`nn.Module`): What is on the device.

    Attributes:
        kernels (`int`): The number of kernels.
        waits (`int`): The number of waits.
        of_each (`Counter`): The name of each operation and of each wait -> its number.
    """

    def __init__(self, *modules: nn.Module):
        self.of_each: Counter[str] = Counter()
        self.kernels = self.waits = 0
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                _mark(tensor)

    def __enter__(self) -> Counting:
        self._modes = ExitStack()
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Transfers(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def wait(self, name: str) -> None:
        self.waits += 1
        self.of_each[f"wait: {name}"] += 1


def _mark(tensor: torch.Tensor) -> torch.Tensor:
    tensor._is_on_the_device = True  # type: ignore[attr-defined]
    return tensor


def _is_marked(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and getattr(value, "_is_on_the_device", False)


class _Operations(TorchDispatchMode):
    def __init__(self, counting: Counting):
        super().__init__()
        self.counting = counting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        out = func(*args, **kwargs)
        if any(map(_is_marked, given)):
            name = func._schema.name.split("::")[1]
            by_mask = any(_is_marked(one) and one.dtype in (torch.bool, torch.uint8) for one in _indices(args))
            if name in _WAITS or name.startswith("index") and by_mask:
                self.counting.wait(name)
            if not func.is_view and name not in _NO_KERNEL:
                self.counting.kernels += 1
                self.counting.of_each[name] += 1
            for one in tree_leaves(out):
                if isinstance(one, torch.Tensor):
                    _mark(one)
        return out


def _indices(args: tuple[Any, ...]) -> list[Any]:
    return list(args[1]) if len(args) > 1 and isinstance(args[1], (list, tuple)) else []


class _Transfers(TorchFunctionMode):
    def __init__(self, counting: Counting):
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func is torch.Tensor.cpu or func is torch.Tensor.to and "cpu" in args[1:]
        if to_host or func in (torch.Tensor.tolist, torch.Tensor.numpy):
            if not _is_marked(args[0]):
                return func(*args, **kwargs)
            self.counting.wait(func.__name__)
            with torch._C._DisableTorchDispatch():  # what the host has is not on the device
                return func(args[0].detach().clone(), *args[1:], **kwargs)
        out = func(*args, **kwargs)
        if kwargs.get("device") is not None and isinstance(out, torch.Tensor) and not _is_marked(out):
            self.counting.kernels += "empty" not in func.__name__
            return _mark(out)
        moved = func is torch.Tensor.to and any(isinstance(one, torch.device) for one in [*args[1:], *kwargs.values()])
        if moved and not _is_marked(out):
            with torch._C._DisableTorchDispatch():
                out = _mark(out.detach().clone())
        return out
