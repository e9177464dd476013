"""
`torch.compile` and edits. What is compiled does not see hooks that come later, so that edits run beside it, not in it;
blocks without hooks may be compiled for the passes of a call that makes edits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import CompileConfig
from transformers.utils import logging

from .threads import replaced_forward, set_within


logger = logging.get_logger(__name__)

# Where blocks are compiled, texts are padded to a multiple of so many tokens: a graph is of one length.
LENGTHS = 16

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


_of_call: ContextVar[CompiledBlocks | None] = ContextVar("of_call", default=None)


def compiling(blocks: CompiledBlocks | None) -> AbstractContextManager[CompiledBlocks | None]:
    """Let this thread's passes within the context run compiled blocks: those of a call that makes edits."""
    return set_within(_of_call, blocks)


def compiled_blocks() -> CompiledBlocks | None:
    """Return the compiled blocks that this thread's passes run, if any."""
    return _of_call.get()


def kept(values: torch.Tensor) -> torch.Tensor:
    """Return values of a pass as they stay when the next one runs: a CUDA graph writes where it wrote before."""
    return values if _of_call.get() is None else values.clone()


class CompiledBlocks:
    """
    The blocks of a model as `torch.compile` makes them, for passes without a cache: one graph serves all blocks of a
    class. A block that has a hook within it, or a forward of its own, runs as it is: an edited one, or one that
    Accelerate offloads.

    Args:
        options (`CompileConfig`): As `generate` takes it; its arguments go to `torch.compile`.

    Raises:
        RuntimeError: `torch.compile` knows no such backend or mode; the message is its own.
    """

    def __init__(self, options: CompileConfig):
        self.options = options
        given = options.to_dict()
        self._given = {name: given[name] for name in ("fullgraph", "dynamic", "backend", "mode", "options")}
        torch.compile(nn.Identity(), **self._given)  # which looks at them
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self.failed = False

    def __reduce__(self) -> tuple[type, tuple[CompileConfig]]:
        return CompiledBlocks, (self.options,)  # graphs belong to a process

    @contextmanager
    def used(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """
        Run these blocks compiled within the context, for a pass of this thread, whose gradients are taken before the
        next one; see [`kept`].
        """
        if self.failed:
            yield
            return
        torch.compiler.cudagraph_mark_step_begin()
        with ExitStack() as stack:
            for block in blocks:
                if not _is_touched(block):
                    stack.enter_context(replaced_forward(block, self._of(block)))
            yield

    def _of(self, block: nn.Module) -> Callable[..., Any]:
        if block not in self._forwards:
            self._forwards[block] = self._compiled(block.forward)
        return self._forwards[block]

    def _compiled(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward as compiled, which runs as it is from the first failure on."""
        compiled = torch.compile(plain, **self._given)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return plain(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.failed = True
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                logger.warning(f"blocks cannot be compiled ({reason}); they run as they are, which is as exact")
                return plain(*args, **kwargs)

        return forward


def _is_touched(block: nn.Module) -> bool:
    """Whether something acts in a block that a graph would not see when it changes; its own hooks run around it."""
    hooked = (m._forward_hooks or m._forward_pre_hooks for m in block.modules() if m is not block)
    return any("forward" in module.__dict__ for module in block.modules()) or any(hooked)
