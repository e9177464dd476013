"""What a thread, or an asyncio task, sees of a model's edits within a context."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .snapshot import Snapshot


# Weak references: what an interrupt keeps from being left is gone with the `with` statement that entered it.
_views: ContextVar[tuple[weakref.ref[View], ...]] = ContextVar("views", default=())


class View:
    """
    A context in which a thread, or an asyncio task, sees other edits of a model than the rest of the program does.

    Args:
        of: The [`~hf_mend.edits.active.ActiveEdits`].
        draft (`bool`, defaults to `False`): Changes of the edits made in this context stay in it.
        disabled (`bool`, defaults to `False`): No edit acts.
        of_call (`bool`, defaults to `False`): What is disabled around this context acts in it: a call that makes edits
            looks at them.
    """

    def __init__(self, of: Any, draft: bool = False, disabled: bool = False, of_call: bool = False):
        self.of, self.draft, self.disabled, self.of_call = of, draft, disabled, of_call
        self.snapshot: Snapshot | None = None  # the edits seen; `None`: those that are seen outside
        self.is_open = True
        self.reference = weakref.ref(self)

    def __enter__(self) -> View:
        _views.set((*_open(), self.reference))
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        _views.set(_open())


def views(of: Any) -> list[View]:
    """Return the contexts of some edits that this thread or task is in, the innermost first."""
    references = _views.get()
    if not references:
        return []
    found = [one() for one in reversed(references)]
    return [one for one in found if one is not None and one.is_open and one.of is of]


def _open() -> tuple[weakref.ref[View], ...]:
    return tuple(one for one in _views.get() if (view := one()) is not None and view.is_open)
