"""One file a method; each maps factors to updates and never sees a model."""

from .base import EditMethod, get_method, register_method, state_shapes
from .malmen import Malmen
from .mend import Mend
from .training_free import UltraEdit, WhitenedGradient, training_free_config


__all__ = [
    "EditMethod",
    "Malmen",
    "Mend",
    "UltraEdit",
    "WhitenedGradient",
    "get_method",
    "register_method",
    "state_shapes",
    "training_free_config",
]
