"""Base models by name, the packaged one among them, with or without an editor."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .config import CONFIG_NAME, EditorConfig
from .edits import edits_from_tensors
from .files import EDITS_NAME, read_json_object, read_tensors
from .hub import find_files
from .model import EditableModel
from .smollm2 import SMOLLM2_ID, load_smollm2


def load_model(
    editor: str | None = None,
    base_model: str | None = None,
    *,
    revision: str | None = None,
    config: EditorConfig | None = None,
    **options: Any,
) -> EditableModel:
    """
    An editable model by the names of its parts.

    Args:
        editor (`str`, *optional*): Hub id or folder of a trained editor.
        base_model (`str`, *optional*): See [`load_base`]; the one that the editor names when left out.
        revision (`str`, *optional*): The editor's.
        config ([`EditorConfig`], *optional*): Of a new editor, where no trained one is named. Without either the
            model is edited without training.
        options: For [`load_base`].

    Raises:
        FileNotFoundError: There is no such editor.
        ValueError: An option's value is not known, or the editor is damaged or does not fit the base.
    """
    if editor is None:
        base, tokenizer = load_base(base_model, **options)
        return EditableModel(base, config, tokenizer)
    files = find_files(editor, [CONFIG_NAME], revision=revision)
    named = EditorConfig.from_json_file(files[CONFIG_NAME])
    base, tokenizer = load_base(
        base_model or named.base_model_name_or_path, revision=None if base_model else named.revision, **options
    )
    return EditableModel.from_pretrained(base, editor, tokenizer, revision=revision)


def load_edited(edits: str, base_model: str | None = None, **options: Any) -> EditableModel:
    """
    A model with saved edits, and no trained editor: it is good for all but further edits.

    Args:
        edits (`str`): Folder or Hub id of the edits.
        base_model (`str`, *optional*), options: See [`load_base`].

    Raises:
        FileNotFoundError: There are no such edits.
        ValueError: The edits are damaged or do not fit the model.
    """
    path = find_files(edits, [EDITS_NAME])[EDITS_NAME]
    tensors, metadata = read_tensors(path)
    layers = {name for edit in edits_from_tensors(tensors, metadata, path) for name in edit.updates}
    fingerprint = read_json_object(metadata.get("base_fingerprint", "{}"), path)
    base, tokenizer = load_base(base_model, **options)
    config = EditorConfig(target_modules=sorted({*fingerprint.get("layers", {}), *layers}), rank=1, whiten=False)
    model = EditableModel(base, config, tokenizer)
    model.load_edits(path.parent)
    return model


def load_base(
    name: str | None = None,
    *,
    revision: str | None = None,
    device_map: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A base model and its tokenizer.

    Args:
        name (`str`, *optional*): Hub id, folder, or `"smollm2"`, which is also the default: the packaged model.
        revision (`str`, *optional*): The model's revision on the Hub.
        device_map, dtype, trust_remote_code: As for `from_pretrained`.
        quantization (`str`, *optional*): `"4bit"` or `"8bit"`, by bitsandbytes.

    Raises:
        ValueError: An option's value is not known.
        ImportError: The packaged model is asked for and its package is missing.
        OSError: There is no such model.
    """
    kwargs: dict[str, Any] = {}
    if dtype is not None:
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {dtype!r}, expected auto, float32, bfloat16 or float16")
        kwargs["dtype"] = dtype
    if device_map is not None:
        kwargs["device_map"] = device_map
    if quantization is not None:
        kwargs["quantization_config"] = _quantization(quantization)
    if name is None or name == "smollm2":
        return load_smollm2(**kwargs)
    if name == SMOLLM2_ID:
        try:
            return load_smollm2(**kwargs)
        except ImportError:  # not installed: from the Hub, then
            pass
    code = {"trust_remote_code": True} if trust_remote_code else {}
    config = AutoConfig.from_pretrained(name, revision=revision, **code)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(name, revision=revision, **code, **kwargs)
    return model, AutoTokenizer.from_pretrained(name, revision=revision, **code)


def _quantization(name: str) -> Any:
    from transformers import BitsAndBytesConfig

    if name not in ("4bit", "8bit"):
        raise ValueError(f"--quantization is {name!r}, expected 4bit or 8bit")
    return BitsAndBytesConfig(load_in_4bit=name == "4bit", load_in_8bit=name == "8bit")
