"""`AutoEditableModel`: the base model, its tokenizer and an editor from the editor's name alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from .config import CONFIG_NAME, EditorConfig
from .hub import check_is_repository, commit_of, find_files
from .model import EditableModel


class AutoEditableModel:
    """Loads an editor with the base model that its configuration names, as PEFT's `AutoPeftModel` does an adapter."""

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
        Loads base model, tokenizer and editor.

        Args:
            editor_name_or_path (`str` or `Path`): A folder that `save_pretrained` wrote, or a repository's id on the
                Hub.
            base_model_name_or_path (`str` or `Path`, *optional*): Where the base model is, if not where the editor's
                configuration says.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's, loaded from its place when left out.
            revision (`str`, *optional*): The editor's revision; the base model's is in the configuration.
            subfolder (`str`, *optional*): The editor's folder inside its repository.
            token, cache_dir, local_files_only: For both downloads, as in `hf_hub_download`.
            base_kwargs: For the base model: `device_map`, `dtype`, `quantization_config`, `offload_folder`,
                `attn_implementation`, `trust_remote_code` (off unless given here), and what else its
                `from_pretrained` takes.

        Raises:
            FileNotFoundError: There is no editor of that name.
            ValueError: The configuration names no base model or is damaged, it is from the Hub and names a path for a
                base, or the editor does not fit the base.

        Example:

        ```python
        model = AutoEditableModel.from_pretrained("me/my-editor", device_map="auto", dtype="auto")
        ```
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        files = find_files(editor_name_or_path, [CONFIG_NAME], subfolder=subfolder, revision=revision, **hub)
        config = EditorConfig.from_json_file(files[CONFIG_NAME])
        commit = commit_of(files[CONFIG_NAME])
        place = base_model_name_or_path or config.base_model_name_or_path
        if place is None:
            raise ValueError(
                f"{editor_name_or_path} does not say which base model it was made for; pass base_model_name_or_path"
            )
        if base_model_name_or_path is None and commit is not None:
            check_is_repository(str(place), f"the base model of {editor_name_or_path}")
        base_revision = None if base_model_name_or_path else config.revision
        shared = {name: value for name, value in hub.items() if value}
        if base_revision:
            shared["revision"] = base_revision
        auto: Any = AutoModelForSeq2SeqLM if config.task_type == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
        # Said, so that nobody is asked: the name of the base came from a file.
        base_kwargs.setdefault("trust_remote_code", False)
        base_model = auto.from_pretrained(place, **shared, **base_kwargs)
        if tokenizer is None:
            trust = base_kwargs["trust_remote_code"]
            tokenizer = AutoTokenizer.from_pretrained(place, **shared, trust_remote_code=trust)
        return EditableModel.from_pretrained(
            base_model, editor_name_or_path, tokenizer, subfolder=subfolder, revision=commit or revision, **hub
        )
