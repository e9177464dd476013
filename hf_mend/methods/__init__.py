"""One file a method; each maps factors to updates and never sees a model."""

from .base import EditMethod, get_method, register_method, state_shapes
from .enn import EditableNetwork
from .fine_tuning import BoundedFineTuning, FineTuning, FineTuningWithPenalty
from .iterative import IterativeMethod, Look, Seen
from .ke import KnowledgeEditor
from .lora import LoraPerEdit
from .malmen import Malmen
from .memit import Memit
from .mend import Mend
from .rome import Rome
from .training_free import UltraEdit, WhitenedGradient, training_free_config


__all__ = [
    "BoundedFineTuning",
    "EditMethod",
    "EditableNetwork",
    "FineTuning",
    "FineTuningWithPenalty",
    "IterativeMethod",
    "KnowledgeEditor",
    "Look",
    "LoraPerEdit",
    "Malmen",
    "Memit",
    "Mend",
    "Rome",
    "Seen",
    "UltraEdit",
    "WhitenedGradient",
    "get_method",
    "register_method",
    "state_shapes",
    "training_free_config",
]
