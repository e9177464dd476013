"""Hooks and replaced forwards of one thread's passes, which those of other threads do not see."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import nn


Value = TypeVar("Value")

_stands_for: contextvars.ContextVar[int] = contextvars.ContextVar("stands_for", default=0)
_replacing = threading.RLock()


def this_thread() -> int:
    """Return the thread whose passes these are: in a backward pass that recomputes, the one that ran the forward."""
    return _stands_for.get() or threading.get_ident()


def as_this_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, to be called by any thread as if by this one, in its context: autograd has its own."""
    context = contextvars.copy_context()
    context.run(_stands_for.set, this_thread())

    def call(*args: Any, **kwargs: Any) -> Any:
        return context.copy().run(function, *args, **kwargs)

    return call


class OfThread:
    """
    A hook that acts in the passes of the thread that made it.

    Args:
        hook (`Callable`): The hook.
    """

    def __init__(self, hook: Callable[..., Any]):
        self.hook, self.thread = hook, this_thread()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        return self.hook(module, args, *rest) if this_thread() == self.thread else None


def is_hooked(module: nn.Module, hook: Any) -> bool:
    """Whether a module has this forward hook or forward pre-hook."""
    return any(one == hook for hooks in _hooks(module) for one in [*hooks.values()])


def unhook(module: nn.Module, hook: Any) -> None:
    """
    Remove a hook from a module, if it is there: found by itself, not by a handle, which an interrupt may have lost.
    """
    own: Any = module
    for hooks in _hooks(module):
        for number in [number for number, one in [*hooks.items()] if one == hook]:
            hooks.pop(number, None)
            for flags in (
                own._forward_hooks_with_kwargs,
                own._forward_hooks_always_called,
                own._forward_pre_hooks_with_kwargs,
            ):
                flags.pop(number, None)


@contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    """
    Hook a module within the context, for the passes of this thread.

    Args:
        register (`Callable`): The module's own method, such as `module.register_forward_hook`.
        hook (`Callable`): The hook.
        options: Of `register`.
    """
    module, own = register.__self__, OfThread(hook)  # type: ignore[attr-defined]
    try:
        register(own, **options)
        yield
    finally:
        try:
            unhook(module, own)
        except BaseException:  # an interrupt of the removal: left there, the hook would act in later passes
            unhook(module, own)
            raise


class StopForwardError(Exception):
    """End a forward pass early; never leaves the pass."""


@contextmanager
def set_within(variable: contextvars.ContextVar[Any], value: Value) -> Iterator[Value]:
    """Give a variable of this thread or asyncio task a value within the context, which begins with that value."""
    before = variable.get()
    try:
        variable.set(value)
        yield value
    finally:
        variable.set(before)


@contextmanager
def ends_early() -> Iterator[None]:
    """
    Let a pass within the context end by a [`StopForwardError`]. As that leaves a module, torch goes through the hooks
    there, and raises an error of its own in its place where another thread adds or removes one meanwhile.
    """
    try:
        yield
    except StopForwardError:
        pass
    except RuntimeError as error:
        before: BaseException | None = error
        while before is not None and not isinstance(before, StopForwardError):
            before = before.__context__
        if before is None:
            raise


# The module before which the pass of this thread or asyncio task ends.
_ends_before: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("ends_before", default=None)


def ending_before(module: nn.Module) -> AbstractContextManager[nn.Module]:
    """Say within the context that this thread's passes end before a module, which takes its arguments alone."""
    return set_within(_ends_before, module)


def ends_before(module: nn.Module) -> bool:
    """Whether the pass that this thread is in ends before a module, so that what it would run is not asked for."""
    return _ends_before.get() is module


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """
    Replace a module's `forward` within the context, for the passes of this thread. Accelerate's own replacement, if
    any, is restored after it.
    """
    thread = this_thread()
    try:
        with _replacing:
            now = module.__dict__.get("forward")
            forwards = now if isinstance(now, _Forwards) else _Forwards(module)
            forwards.of_thread.setdefault(thread, []).append(forward)
            module.__dict__["forward"] = forwards
        yield
    finally:
        try:
            _restore(module, thread, forward)
        except BaseException:
            _restore(module, thread, forward)
            raise


def present_forward(module: Any) -> Callable[..., Any]:
    """Return the `forward` that a module has for this thread."""
    now = module.forward
    return now.of_this_thread() if isinstance(now, _Forwards) else now


def clear_passes(model: nn.Module) -> None:
    """
    Remove all hooks and replaced forwards of this thread, which is in no pass: those that an interrupt left behind in
    the very moment in which they were to be removed.
    """
    thread = this_thread()
    for module in model.modules():
        for hooks in _hooks(module):
            for hook in [*hooks.values()]:
                if isinstance(hook, OfThread) and hook.thread == thread:
                    unhook(module, hook)
        _restore(module, thread)


class _Forwards:
    """A module's `forward` while some threads have replaced it."""

    def __init__(self, module: Any):
        self.replaced = module.__dict__.get("forward")
        self.own = module.forward
        self.of_thread: dict[int, list[Callable[..., Any]]] = {}

    def of_this_thread(self) -> Callable[..., Any]:
        mine = self.of_thread.get(this_thread())
        return mine[-1] if mine else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.of_this_thread()(*args, **kwargs)


def _restore(module: nn.Module, thread: int, forward: Callable[..., Any] | None = None) -> None:
    """Take back a thread's replacement of a forward, or all of them."""
    if not isinstance(module.__dict__.get("forward"), _Forwards):
        return
    with _replacing:
        now = module.__dict__.get("forward")
        if not isinstance(now, _Forwards):
            return
        mine = [one for one in now.of_thread.get(thread, []) if forward is not None and one is not forward]
        if mine:
            now.of_thread[thread] = mine
        else:
            now.of_thread.pop(thread, None)
        if now.of_thread:
            return
        if now.replaced is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = now.replaced


def _hooks(module: Any) -> list[dict[int, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks]
