"""One file a method; each maps factors to updates and never sees a model."""

from .base import EditMethod, get_method, register_method
from .mend import Mend


__all__ = ["EditMethod", "Mend", "get_method", "register_method"]
