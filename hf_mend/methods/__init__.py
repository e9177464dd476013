"""
Editing methods, one file each, options included. A method maps factors to updates and never sees a model.

A new method is a class with its configuration, registered by [`register_method`]: no other file is touched. Methods of
this package are imported here, which registers them.
"""

from .base import EditMethod, check_cost, get_method, new_method, register_method, state_shapes
from .enn import EditableNetwork, EditableNetworkConfig
from .fine_tuning import (
    BoundedFineTuning,
    BoundedFineTuningConfig,
    FineTuning,
    FineTuningConfig,
    FineTuningWithPenalty,
    FineTuningWithPenaltyConfig,
)
from .iterative import IterativeConfig, IterativeMethod, Look, Seen
from .ke import KnowledgeEditor, KnowledgeEditorConfig
from .lora import LoraPerEdit, LoraPerEditConfig
from .malmen import Malmen, MalmenConfig
from .memit import Memit, MemitConfig
from .mend import Mend, MendConfig
from .rome import Rome, RomeConfig
from .training_free import (
    UltraEdit,
    UltraEditConfig,
    WhitenedGradient,
    WhitenedGradientConfig,
    training_free_config,
)


__all__ = [
    "BoundedFineTuning",
    "BoundedFineTuningConfig",
    "EditMethod",
    "EditableNetwork",
    "EditableNetworkConfig",
    "FineTuning",
    "FineTuningConfig",
    "FineTuningWithPenalty",
    "FineTuningWithPenaltyConfig",
    "IterativeConfig",
    "IterativeMethod",
    "KnowledgeEditor",
    "KnowledgeEditorConfig",
    "Look",
    "LoraPerEdit",
    "LoraPerEditConfig",
    "Malmen",
    "MalmenConfig",
    "Memit",
    "MemitConfig",
    "Mend",
    "MendConfig",
    "Rome",
    "RomeConfig",
    "Seen",
    "UltraEdit",
    "UltraEditConfig",
    "WhitenedGradient",
    "WhitenedGradientConfig",
    "get_method",
    "new_method",
    "register_method",
    "check_cost",
    "state_shapes",
    "training_free_config",
]
