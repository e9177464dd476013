"""Uploads of an [`EditableModel`] to the Hub: its editor, its edits, or its edits as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo

from .cards import update_card, use_section
from .editor_files import REPLACED_FILES
from .files import EDITS_NAME, files_like
from .transfer import push_written


if TYPE_CHECKING:
    from ..edits.edit import Edit


class PushesToHub:
    """
    The methods of [`EditableModel`] that write to the Hub. Each makes one commit and leaves the model unchanged. Their
    `push_kwargs` are the fields of [`~hf_mend.hub.transfer.PushOptions`].
    """

    save_pretrained: Any
    save_edits: Any
    save_lora: Any

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        card_data: Mapping[str, Any] | None = None,
        edits: bool | None = None,
        tags: str | Sequence[str] = (),
        **push_kwargs: Any,
    ) -> CommitInfo:
        """
        Upload what `save_pretrained` writes. Of a card on the Hub, only the marked sections are replaced.

        Args:
            repo_id (`str`): The repository, `"user/name"` or `"name"`; made if it does not exist.
            dtype, max_shard_size, card_data, edits: As for [`~EditableModel.save_pretrained`].
            tags (`str` or `Sequence[str]`): Tags of the card, beside those in `card_data`.
            push_kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`,
                `subfolder`; see [`~hf_mend.hub.transfer.PushOptions`].

        Returns:
            `CommitInfo`: The commit, or the pull request, as huggingface_hub returns it.

        Raises:
            HfHubHTTPError: The Hub refused the upload; the message says what to do. The editor stays in memory, and in
                a folder that a warning names.
            OSError: The Hub could not be reached. The editor stays in the same places.

        Example:

        ```python
        model.push_to_hub("me/my-editor", private=True)
        ```
        """

        data = dict(card_data or {})
        if tags:
            data["tags"] = [*data.get("tags", ()), *([tags] if isinstance(tags, str) else tags)]

        def write(folder: Path) -> None:
            options = {"dtype": dtype, "max_shard_size": max_shard_size, "card_data": data}
            self.save_pretrained(folder, edits=edits, **options)
            update_card(folder, {"use": use_section(repo_id)})

        replaces = [*REPLACED_FILES, *(files_like(EDITS_NAME) if edits else ())]
        return push_written(write, "editor", repo_id, replaces=replaces, **push_kwargs)

    def push_edits_to_hub(self, repo_id: str, **push_kwargs: Any) -> CommitInfo:
        """
        Upload the edits that the model carries, in the files that `save_edits` writes.

        Args:
            repo_id (`str`): The repository; made if it does not exist.
            push_kwargs: As for [`~EditableModel.push_to_hub`], whose errors are raised too.
        """
        return push_written(self.save_edits, "edits", repo_id, replaces=files_like(EDITS_NAME), **push_kwargs)

    def push_lora_to_hub(
        self, repo_id: str, edits: Sequence[Edit | str] | None = None, uniform_rank: bool = True, **push_kwargs: Any
    ) -> CommitInfo:
        """
        Upload edits as a LoRA adapter, which `PeftModel.from_pretrained(base, repo_id)` loads.

        Args:
            repo_id (`str`): The repository; made if it does not exist.
            edits, uniform_rank: As for [`~EditableModel.save_lora`].
            push_kwargs: As for [`~EditableModel.push_to_hub`], whose errors are raised too.

        Raises:
            ValueError: The model carries no edit.
        """

        def write(folder: Path) -> None:
            self.save_lora(folder, edits, uniform_rank)

        return push_written(write, "LoRA adapter", repo_id, replaces=(), **push_kwargs)
