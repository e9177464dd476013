"""Models that `torch.compile` has compiled, which do not see hooks that come later: edits run beside it, not in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn


Function = TypeVar("Function", bound=Callable[..., Any])


def check_uncompiled(model: nn.Module) -> None:
    """
    Check that no part of a model was compiled in place, by `compile()` or by a compiled `forward`.

    Args:
        model (`nn.Module`): The model.

    Raises:
        ValueError: One was; the message names it.
    """
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        in_place = getattr(module, "_compiled_call_impl", None) is not None
        if in_place or hasattr(forward, "_torchdynamo_orig_callable"):
            raise ValueError(
                f"{name or type(module).__name__!r} was compiled in place and would not see the edits; load the base "
                "model without compile(), and compile what merge_and_unload() returns"
            )


def uncompiled(function: Function) -> Function:
    """
    Decorate a function that runs as it is, and is no part of any graph, where it is called from what is compiled: what
    it reads changes from call to call, without a new compilation.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
