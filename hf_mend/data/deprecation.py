"""Names that were changed: the old ones work for one more release, and warn with the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar


_Thing = TypeVar("_Thing", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[_Thing], _Thing]:
    """
    A decorator that lets a function or a dataclass take arguments by the names that they had before.

    Args:
        names (`str`): Each old name with the new one, `old="new"`.

    Raises:
        TypeError: (In the call.) An argument is given under both names.

    Example:

    ```python
    @renamed_arguments(edits_together="group_size")
    def train(group_size=1): ...
    ```
    """

    def decorate(thing: _Thing) -> _Thing:
        if not isinstance(thing, type):
            return _with_old_arguments(thing, thing.__name__, names)
        cls: Any = thing
        cls.__init__ = _with_old_arguments(cls.__init__, cls.__name__, names)
        cls.renamed = {**getattr(cls, "renamed", {}), **names}
        for old, new in names.items():
            setattr(cls, old, property(_reader(cls.__name__, old, new)))
        return thing

    return decorate


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """
    A method under the name that it had before.

    Args:
        old (`str`): That name.
        new (`str`): The name of the method that it calls.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    call.__name__ = old
    call.__doc__ = f"Deprecated: the name that `{new}` had before, for one more release."
    return call


def renamed_in(thing: Any) -> Mapping[str, str]:
    """The old names of a dataclass's fields, each with the new one."""
    names: Mapping[str, str] = getattr(thing, "renamed", {})
    return names


def _with_old_arguments(function: Any, owner: str, names: Mapping[str, str]) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for old in names.keys() & kwargs.keys():
            if names[old] in kwargs:
                raise TypeError(f"{owner} got {old!r} and {names[old]!r}, which are one argument; give the latter")
            _warn(f"{owner}: {old}", names[old])
            kwargs[names[old]] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call


def _reader(owner: str, old: str, new: str) -> Callable[[Any], Any]:
    def read(self: Any) -> Any:
        _warn(f"{owner}.{old}", new)
        return getattr(self, new)

    return read


def _warn(old: str, new: str) -> None:
    message = f"{old} is now called {new}; the old name goes with the next release"
    warnings.warn(message, FutureWarning, stacklevel=3)
