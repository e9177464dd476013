"""Names that were changed: the old ones work for one more release, and warn with the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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


class MovedModules(MetaPathFinder, Loader):
    """
    Finds modules by the names that they had before, for `sys.meta_path`.

    Args:
        names (`Mapping[str, str]`): Each module's old qualified name with the new one.
    """

    def __init__(self, names: Mapping[str, str]):
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return how to load a module of one of the old names, and `None` for all others."""
        return ModuleSpec(fullname, self) if fullname in self.names else None

    def exec_module(self, module: ModuleType) -> None:
        """Let the module under the old name have all that the one under the new name has."""
        old = module.__name__
        warnings.warn(_message(f"the module {old}", self.names[old]), FutureWarning, stacklevel=2)
        module.__dict__["__getattr__"] = functools.partial(getattr, import_module(self.names[old]))


def moved_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """
    Return a package's `__getattr__` for names that were its own when it was a module.

    Args:
        package (`str`): The package.
        modules (`Mapping[str, str]`): Each name with the module of the package that has it now.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        new = f"{package}.{modules[name]}"
        _warn(f"{package}.{name}", f"{new}.{name}")
        return getattr(import_module(new), name)

    return find


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
    warnings.warn(_message(old, new), FutureWarning, stacklevel=3)


def _message(old: str, new: str) -> str:
    return f"{old} is now called {new}; the old name goes with the next release"
