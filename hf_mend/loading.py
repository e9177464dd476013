"""Base models by name, the packaged one among them, with or without an editor."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .auto import AutoEditableModel
from .config import CONFIG_NAME, EditorConfig
from .edits import edits_from_tensors
from .files import EDITS_NAME, read_json_object, read_tensors
from .hub import find_files
from .model import EditableModel
from .smollm2 import SMOLLM2_ID, is_packaged, load_smollm2


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
    if base_model is None:
        named = EditorConfig.from_json_file(find_files(editor, [CONFIG_NAME], revision=revision)[CONFIG_NAME])
        if named.base_model_name_or_path != SMOLLM2_ID or not is_packaged():
            return AutoEditableModel.from_pretrained(editor, revision=revision, **_for_transformers(**options))
    base, tokenizer = load_base(base_model, **options)
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


def load_base(name: str | None = None, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A base model and its tokenizer.

    Args:
        name (`str`, *optional*): Hub id, folder, or `"smollm2"`, which is also the default: the packaged model.
        options: `device_map`, `dtype` (a name), `trust_remote_code` (off by default), as for `from_pretrained`;
            `quantization`, `"4bit"` or `"8bit"`, by bitsandbytes.

    Raises:
        ValueError: An option's value is not known.
        ImportError: The packaged model is asked for and its package is missing.
        OSError: There is no such model.
    """
    kwargs = _for_transformers(**options)
    code = {"trust_remote_code": kwargs.pop("trust_remote_code")}
    if name is None or name == "smollm2":
        return load_smollm2(**kwargs)
    config = AutoConfig.from_pretrained(name, **code)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(name, **code, **kwargs), AutoTokenizer.from_pretrained(name, **code)


def _for_transformers(
    device_map: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The options as `from_pretrained` takes them."""
    # Said even where it is off: left out, transformers would ask whoever sits at the terminal, or the pipe.
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if dtype is not None:
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"the dtype is {dtype!r}, expected auto, float32, bfloat16 or float16")
        kwargs["dtype"] = dtype
    if device_map is not None:
        kwargs["device_map"] = device_map
    if quantization is not None:
        if quantization not in ("4bit", "8bit"):
            raise ValueError(f"the quantization is {quantization!r}, expected 4bit or 8bit")
        bits = {"load_in_4bit": quantization == "4bit", "load_in_8bit": quantization == "8bit"}
        kwargs["quantization_config"] = BitsAndBytesConfig(**bits)
    return kwargs
