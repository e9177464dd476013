"""Edit language models: train small editor networks that turn one correction's gradient into a low-rank edit."""

from .auto import AutoEditableModel
from .cache import HiddenStateCache
from .config import EditorConfig
from .data import EditDataset, EditRecord, read_counterfact, read_questions
from .edits import Edit
from .metrics import evaluate_records, summarize
from .model import EditableModel, get_editable_model
from .requests import EditResult
from .trainer import EditorTrainer, EditorTrainingArguments


__version__ = "0.1.0"

__all__ = [
    "AutoEditableModel",
    "Edit",
    "EditDataset",
    "EditRecord",
    "EditResult",
    "EditableModel",
    "EditorConfig",
    "EditorTrainer",
    "EditorTrainingArguments",
    "HiddenStateCache",
    "evaluate_records",
    "get_editable_model",
    "read_counterfact",
    "read_questions",
    "summarize",
]
