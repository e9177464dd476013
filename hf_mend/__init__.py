"""Edit language models: train small editor networks that turn one correction's gradient into a low-rank edit."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .data.deprecation import MovedModules


if TYPE_CHECKING:
    from .auto import AutoEditableModel
    from .config import EditorConfig
    from .data.readers import read_counterfact, read_edits, read_questions, write_edits
    from .data.records import EditDataset, EditRecord
    from .editing.edit_result import EditResult
    from .edits.collection import Edits
    from .edits.compression import Compression
    from .edits.edit import Edit
    from .edits.store import EditStore
    from .evaluation.evaluate import evaluate
    from .evaluation.metrics import evaluate_records, summarize
    from .methods import register_method, training_free_config
    from .model import EditableModel, get_editable_model
    from .training.arguments import EditorTrainingArguments
    from .training.cache import HiddenStateCache
    from .training.scope_training import ScopeTrainingArguments, train_scope
    from .training.trainer import EditorTrainer


__version__ = "0.1.0"

__all__ = [
    "AutoEditableModel",
    "Compression",
    "Edit",
    "EditDataset",
    "EditRecord",
    "EditResult",
    "EditStore",
    "EditableModel",
    "EditorConfig",
    "EditorTrainer",
    "EditorTrainingArguments",
    "Edits",
    "HiddenStateCache",
    "ScopeTrainingArguments",
    "evaluate",
    "evaluate_records",
    "get_editable_model",
    "read_counterfact",
    "read_edits",
    "read_questions",
    "register_method",
    "summarize",
    "train_scope",
    "training_free_config",
    "write_edits",
]

# Names are imported on first use, so that `hf-mend --help` does not wait for torch. A name must not be a module's too:
# importing that module would put it in the name's place.
_MODULES = {
    "auto": ["AutoEditableModel"],
    "config": ["EditorConfig"],
    "data.readers": ["read_counterfact", "read_edits", "read_questions", "write_edits"],
    "data.records": ["EditDataset", "EditRecord"],
    "editing.edit_result": ["EditResult"],
    "edits.collection": ["Edits"],
    "edits.compression": ["Compression"],
    "edits.edit": ["Edit"],
    "edits.store": ["EditStore"],
    "evaluation.evaluate": ["evaluate"],
    "evaluation.metrics": ["evaluate_records", "summarize"],
    "methods": ["register_method", "training_free_config"],
    "model": ["EditableModel", "get_editable_model"],
    "training.arguments": ["EditorTrainingArguments"],
    "training.cache": ["HiddenStateCache"],
    "training.scope_training": ["ScopeTrainingArguments", "train_scope"],
    "training.trainer": ["EditorTrainer"],
}
# Where the modules of 0.1.0 are now.
_MOVED = {
    "adapters": "bases.merge_adapters",
    "cache": "training.cache",
    "cards": "hub.cards",
    "checks": "data.checks",
    "collection": "edits.collection",
    "compression": "edits.compression",
    "evaluation_checks": "evaluation.checks",
    "files": "hub.files",
    "fingerprint": "bases.fingerprint",
    "generation": "evaluation.generation",
    "lora": "edits.lora",
    "losses": "training.losses",
    "metrics": "evaluation.metrics",
    "plots": "hub.plots",
    "readers": "data.readers",
    "records": "edits.log",
    "reports": "evaluation.reports",
    "requests": "editing.requests",
    "scores": "evaluation.scores",
    "sharing": "hub.sharing",
    "smollm2": "demo.smollm2",
    "store": "edits.store",
    "targets": "bases.targets",
    "trainer": "training.trainer",
}
sys.meta_path.append(MovedModules({f"{__name__}.{old}": f"{__name__}.{new}" for old, new in _MOVED.items()}))
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
