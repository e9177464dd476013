"""The files of an editor beside its configuration, and the one that tells transformers who loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .cards import CARD_NAME
from .files import SCOPE_NAME, WEIGHTS_NAME, files_like, read_json_file
from .plots import CURVE_NAME, METRICS_NAME


MODEL_CONFIG_NAME = "config.json"
# Patterns of the files, and of those that a later editor has to replace or delete.
FILES_BESIDE_CONFIG = [*files_like(WEIGHTS_NAME), SCOPE_NAME, CARD_NAME, CURVE_NAME, METRICS_NAME, MODEL_CONFIG_NAME]
REPLACED_FILES = [*files_like(WEIGHTS_NAME), SCOPE_NAME]
# transformers without hf_mend knows no such type, and the error that it raises names the type.
_MODEL_TYPE = "hf_mend_editor_for_AutoEditableModel"


def write_model_config(folder: str | Path) -> None:
    """
    Write `config.json` for those who load an editor as a model: transformers looks for that file first, and names what
    stands in it. A base model's own in the same folder stays.

    Args:
        folder (`str` or `Path`): The editor's folder.
    """
    path = Path(folder) / MODEL_CONFIG_NAME
    if not path.exists():
        path.write_text(json.dumps({"model_type": _MODEL_TYPE}, indent=2) + "\n", encoding="utf-8")


def is_of_editor(path: str | Path) -> bool:
    """Whether a file is what [`write_model_config`] writes, and no base model's configuration."""
    path = Path(path)
    try:
        return path.name == MODEL_CONFIG_NAME and read_json_file(path).get("model_type") == _MODEL_TYPE
    except (OSError, ValueError):
        return False


class EditorAsModelConfig(PreTrainedConfig):
    """What transformers finds where an editor is loaded as a model: an error that says what loads it."""

    model_type = _MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: Always.
        """
        name = str(kwargs.get("name_or_path") or "the editor")
        raise ValueError(
            f"{name!r} is an editor, no model of its own: AutoEditableModel.from_pretrained({name!r}) of hf_mend "
            "loads it with its base model"
        )


def known_to_transformers() -> None:
    """Let transformers' Auto classes and pipelines say what loads an editor, in place of advice to upgrade."""
    AutoConfig.register(_MODEL_TYPE, EditorAsModelConfig, exist_ok=True)
