"""What acts in a model's passes: the edits that were its own when a pass began."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..bases.compiled import check_uncompiled, uncompiled
from ..bases.targets import Target
from ..bases.threads import clear_passes, is_hooked
from .edit import Edit
from .hook import Gate, Hook, added_where_asked, plus
from .preserved_keys import PreservedKeys
from .snapshot import Snapshot
from .view import View, views


_NOTHING = Snapshot([])
# The function that runs a module's hooks.
_CALL = nn.Module._call_impl.__code__


def acting_edits(model: nn.Module) -> set[str]:
    """Return the ids of the edits that act in a model, whichever [`ActsInPasses`] put them there."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return {edit_id for hook in hooks if isinstance(hook, ActsOnLayer) for edit_id in hook.edit_ids}


class ActsOnLayer:
    """
    The forward hook by which a model's edits act on a layer. It is no closure: a deep copy of the model has edits of
    its own, and a pickle those that it was saved with.

    Args:
        active ([`ActsInPasses`]): The edits.
        name (`str`): The layer.
    """

    def __init__(self, active: ActsInPasses, name: str):
        self.active, self.name = active, name

    @property
    def edit_ids(self) -> list[str]:
        """Ids of the edits."""
        acting = self.active.acting.active
        return [edit.id for edit in acting if self.name in edit.updates and not edit.is_base_delta]

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        now = self.active.acting
        layer_sum = now.sums.get(self.name)
        if layer_sum is not None and layer_sum.edits:
            output = plus(output, layer_sum(args[0], output.device))
        where = self.active.gate.acting() if now.scoped and self.active.gate is not None else None
        return output if where is None else added_where_asked(where, now.scoped, self.name, args[0], output)


class ActsInPasses:
    """
    The edits of a model, as its passes see them.

    What acts is a [`~hf_mend.edits.snapshot.Snapshot`], which never changes; the next one is made beside it and comes
    into its place by one assignment. A pass keeps to the one that it began with, so that its answer is that of one
    state, and the hooks that it needs stay until it ends. Without edits and such passes there are no hooks.

    Args:
        targets (`Sequence[Target]`): The layers that an editor changes.
        base_model (`nn.Module`, *optional*): The model.
    """

    def __init__(self, targets: Sequence[Target], base_model: nn.Module | None = None):
        self._base_model = base_model
        self.gate: Gate | None = None
        self._installed = Snapshot(list(targets))
        self._layer_hooks: dict[str, Hook] = {}
        self._pass_hooks: list[Hook] = []
        if base_model is not None:
            self._pass_hooks = [
                Hook(base_model, self._begin_pass),
                Hook(base_model, self._end_pass, before=False, options={"always_call": True}),
            ]
        self._start()

    def _start(self) -> None:
        """Set what no copy or pickle takes along."""
        self.lock = threading.RLock()
        self._hooking = threading.RLock()
        self._open: set[weakref.ref[View]] = set()  # contexts and passes
        self._own_pass = _OfThread()
        self._untidy = False

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("lock", "_hooking", "_open", "_own_pass", "_untidy")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        # A copy has the edits that are seen where it is made: none, where they are disabled.
        return state | {"_installed": replace(self.acting, targets=self._now.targets)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # ---- what acts ----

    @property
    def targets(self) -> Sequence[Target]:
        """The layers that an editor changes, and others that the edits do."""
        return self._now.targets

    @property
    def preserved_keys(self) -> PreservedKeys:
        """The inputs of the edits that a joining method made."""
        return self._now.preserved_keys

    @property
    def snapshot(self) -> Snapshot:
        """What acts unless it is disabled: in a draft, the draft's."""
        return self._now

    @property
    def edits(self) -> list[Edit]:
        """The edits: in a draft, those of the draft."""
        return self._now.edits

    @property
    def active(self) -> list[Edit]:
        """The edits that act, unless they are disabled."""
        return self._now.active

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' sums, beside the edits' own factors."""
        return sum(one.nbytes for one in self._now.sums.values())

    @property
    def acting(self) -> Snapshot:
        """What acts in this thread's pass."""
        seen = views(self)
        for view in seen:
            if view.disabled:
                return _NOTHING
            if view.of_call:
                break
        for view in seen:
            if view.snapshot is not None:
                return view.snapshot
        return self._installed if seen or not self._began_unseen() else _NOTHING

    @property
    def _now(self) -> Snapshot:
        """The edits that a change made here would change."""
        draft = self._draft()
        return self._installed if draft is None or draft.snapshot is None else draft.snapshot

    def _draft(self) -> View | None:
        return next((view for view in views(self) if view.draft), None)

    def _acting_bank(self) -> Any:
        return self.acting.bank

    # ---- contexts ----

    @contextmanager
    def _seen(self, view: View, snapshot: Snapshot | None = None) -> Iterator[None]:
        try:
            self._open.add(view.reference)  # first: from here on, the hooks of what acts stay
            view.snapshot = self.acting if snapshot is None else snapshot
            if snapshot is not None:
                self._hook(snapshot)
            with view:
                yield
        finally:
            self._close(view)

    def _close(self, view: View) -> None:
        view.is_open = False
        self._open.discard(view.reference)
        if self._untidy:
            self._tidy()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let what acts stay the same within the context, in this thread or task: an answer is that of one state."""
        with self._seen(View(self)):
            yield

    @contextmanager
    def seeing(self, snapshot: Snapshot) -> Iterator[None]:
        """Let what acted at another time act within the context, in this thread or task."""
        with self._seen(View(self), snapshot):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all edits within the context, in this thread or task."""
        with View(self, disabled=True):
            yield

    @contextmanager
    def draft(self, of_call: bool = False) -> Iterator[None]:
        """
        Keep changes of the edits that are made within the context to it, and to this thread or task.

        Args:
            of_call (`bool`, defaults to `False`): Let edits act within it that are disabled around it.
        """
        now = self._now
        with self._seen(
            View(self, draft=True, of_call=of_call), replace(now, preserved_keys=now.preserved_keys.copy())
        ):
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let no other thread change the edits within the context. After an error, nothing of a pass is left."""
        with self.lock, self.cleared_after_error():
            yield

    @contextmanager
    def cleared_after_error(self) -> Iterator[None]:
        """Leave nothing of a pass of this thread, which is in none outside of the context, after an error in it."""
        try:
            yield
        except BaseException:
            self._clear()
            raise

    def _clear(self) -> None:
        if self._base_model is not None:
            clear_passes(self._base_model)
        self._tidy()

    # ---- hooks ----

    def _hooks_of(self, snapshot: Snapshot) -> list[Hook]:
        hooks = []
        for target in snapshot.layers():
            if target.name not in self._layer_hooks:
                self._layer_hooks[target.name] = Hook(target.module, ActsOnLayer(self, target.name), before=False)
            hooks.append(self._layer_hooks[target.name])
        if hooks and self.gate is not None and snapshot.scoped:
            hooks = [*self.gate.hooks(), *hooks]
        return [*self._pass_hooks, *hooks] if hooks else []

    @property
    def is_hooked(self) -> bool:
        """Whether the model has hooks, by which edits act, or did for what is not over yet."""
        return any(is_hooked(hook.module, hook.hook) for hook in self._pass_hooks)

    def _hook(self, snapshot: Snapshot) -> None:
        with self._hooking:
            hooks = self._hooks_of(snapshot)
            if hooks and self._base_model is not None and not self.is_hooked:
                check_uncompiled(self._base_model)  # it may have been compiled since it was wrapped
            for hook in hooks:
                hook.add()

    def _tidy(self) -> None:
        """Remove the hooks that nothing needs, neither what is installed nor a context or pass that began before."""
        with self._hooking:
            self._untidy = True
            self._open.difference_update([one for one in [*self._open] if (view := one()) is None or not view.is_open])
            open_views = [view for one in [*self._open] if (view := one()) is not None]
            if any(view.snapshot is None for view in open_views):
                return  # it is not known yet what it sees
            seen = [view.snapshot for view in open_views if view.snapshot is not None]
            own, needed = self._hooks_of(self._installed), [hook for one in seen for hook in self._hooks_of(one)]
            every = [*self._pass_hooks, *([] if self.gate is None else self.gate.hooks()), *self._layer_hooks.values()]
            for hook in every:
                if not any(hook.is_same(one) for one in [*own, *needed]):
                    hook.remove()
            self._untidy = any(not any(hook.is_same(one) for one in own) for hook in needed)

    # ---- the hooks of a pass of the base model that did not begin as one of this model ----

    @uncompiled
    def _begin_pass(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        own = self._own_pass.view
        if own is not None:  # of a pass that an interrupt ended
            self._own_pass.view = None
            own.__exit__()
            self._close(own)
        if not views(self):
            view = View(self)
            self._open.add(view.reference)
            view.snapshot = self._installed
            self._own_pass.view = view.__enter__()

    @uncompiled
    def _end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        view, self._own_pass.view = self._own_pass.view, None
        if view is not None:
            view.__exit__()
            self._close(view)

    def _began_unseen(self) -> bool:
        """Whether this thread is in a pass of the model that began before it had hooks, when there were no edits."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is self._base_model:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


class _OfThread(threading.local):
    """A thread's own pass of the base model."""

    view: View | None = None
