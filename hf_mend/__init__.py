"""Edit language models: train small editor networks that turn one correction's gradient into a low-rank edit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .auto import AutoEditableModel
    from .cache import HiddenStateCache
    from .collection import Edits
    from .compression import Compression
    from .config import EditorConfig
    from .data import EditDataset, EditRecord
    from .edits import Edit
    from .metrics import evaluate_records, summarize
    from .model import EditableModel, get_editable_model
    from .readers import read_counterfact, read_edits, read_questions, write_edits
    from .requests import EditResult
    from .store import EditStore
    from .trainer import EditorTrainer, EditorTrainingArguments


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
    "evaluate_records",
    "get_editable_model",
    "read_counterfact",
    "read_edits",
    "read_questions",
    "summarize",
    "write_edits",
]

# Names are imported on first use, so that `hf-mend --help` does not wait for torch. A name must not be a module's too:
# importing that module would put it in the name's place.
_MODULES = {
    "auto": ["AutoEditableModel"],
    "cache": ["HiddenStateCache"],
    "collection": ["Edits"],
    "compression": ["Compression"],
    "config": ["EditorConfig"],
    "data": ["EditDataset", "EditRecord"],
    "edits": ["Edit"],
    "metrics": ["evaluate_records", "summarize"],
    "model": ["EditableModel", "get_editable_model"],
    "readers": ["read_counterfact", "read_edits", "read_questions", "write_edits"],
    "requests": ["EditResult"],
    "store": ["EditStore"],
    "trainer": ["EditorTrainer", "EditorTrainingArguments"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
