"""What an [`EditableModel`] sends to the Hub: its editor, its edits, or its edits as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo

from .cards import update_card, use_section
from .files import EDITS_NAME, WEIGHTS_NAME, files_like
from .transfer import push_written


if TYPE_CHECKING:
    from ..edits.edit import Edit


class PushesToHub:
    """The methods of [`EditableModel`] that write to the Hub. All go in one commit, and leave the model as it is."""

    save_pretrained: Any
    save_edits: Any
    save_lora: Any

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        card_data: Mapping[str, Any] | None = None,
    ) -> CommitInfo:
        """
        Uploads the editor: what `save_pretrained` writes. Of a card that is there already, only the marked sections
        are replaced.

        Args:
            repo_id (`str`): The repository, `"user/name"` or `"name"`; made if it does not exist.
            commit_message (`str`, *optional*): First line of the commit.
            commit_description (`str`, *optional*): The rest of it.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str` or `bool`, *optional*): The user's token; the one that is logged in by default.
            revision (`str`, *optional*): Branch to commit to, made if it does not exist.
            create_pr (`bool`, defaults to `False`): Open a pull request instead.
            subfolder (`str`, *optional*): Folder in the repository.
            dtype, max_shard_size, card_data: As for [`~EditableModel.save_pretrained`].

        Returns:
            `CommitInfo`: The commit, or the pull request, as huggingface_hub gives it.

        Raises:
            HfHubHTTPError: The Hub refused; the message says what to do. The editor stays in memory, and in a folder
                that a warning names.
            OSError: The Hub could not be reached; the same.

        Example:

        ```python
        model.push_to_hub("me/my-editor", private=True)
        ```
        """

        def write(folder: Path) -> None:
            self.save_pretrained(folder, dtype=dtype, max_shard_size=max_shard_size, card_data=card_data)
            update_card(folder, {"use": use_section(repo_id)})

        return push_written(
            write,
            "editor",
            repo_id,
            replaces=files_like(WEIGHTS_NAME),
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            subfolder=subfolder,
        )

    def push_edits_to_hub(self, repo_id: str, **push_kwargs: Any) -> CommitInfo:
        """
        Uploads the edits that the model carries: what `save_edits` writes.

        Args:
            repo_id (`str`): The repository; made if it does not exist.
            push_kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`,
                `subfolder`, as for [`~EditableModel.push_to_hub`], which also says what is raised.
        """
        return push_written(self.save_edits, "edits", repo_id, replaces=files_like(EDITS_NAME), **push_kwargs)

    def push_lora_to_hub(
        self, repo_id: str, edits: Sequence[Edit] | None = None, uniform_rank: bool = False, **push_kwargs: Any
    ) -> CommitInfo:
        """
        Uploads edits as a LoRA adapter, which `PeftModel.from_pretrained(base, repo_id)` loads.

        Args:
            repo_id (`str`): The repository; made if it does not exist.
            edits, uniform_rank: As for [`~EditableModel.save_lora`].
            push_kwargs: As for [`~EditableModel.push_edits_to_hub`].

        Raises:
            ValueError: There is no edit.
        """

        def write(folder: Path) -> None:
            self.save_lora(folder, edits, uniform_rank)

        return push_written(write, "LoRA adapter", repo_id, replaces=(), **push_kwargs)
