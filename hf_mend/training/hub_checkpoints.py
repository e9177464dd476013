"""Upload of an editor's checkpoints to the Hub during training."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..config import CONFIG_NAME
from ..hub.atomic import link_or_copy
from ..hub.cards import CARD_NAME, get_metadata, set_metadata
from ..hub.editor_files import FILES_BESIDE_CONFIG, REPLACED_FILES
from ..hub.transfer import PushOptions, matching_files, push_folder


logger = logging.get_logger(__name__)

EDITOR_FILES = [CONFIG_NAME, *FILES_BESIDE_CONFIG]
_API = HfApi(library_name="hf_mend")  # one object, whose uploads run one after another


class PushesCheckpoints:
    """The uploads of [`EditorTrainer`], in place of those of `Trainer`, under the same training arguments."""

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    hub_model_id: Any
    push_in_progress: Any
    is_world_process_zero: Any
    init_hf_repo: Any
    save_model: Any
    _finish_current_push: Any

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent's method knows only a base model's file names, uploads other files of the output folder (a cache
        # of hidden states, pickled arguments), and does not report a failure.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        folder, message = Path(checkpoint_folder), f"Training in progress, {at}"
        jobs = [self._push_later(folder, EDITOR_FILES, REPLACED_FILES, self._options(message))]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            jobs.append(
                self._push_later(folder, ["*"], ["*"], self._options(f"{message}, checkpoint", subfolder=name))
            )
        earlier = self.push_in_progress.jobs if busy else []
        self.push_in_progress = PushInProgress([*earlier, *jobs])  # type: ignore[arg-type]

    def _options(
        self, message: str, token: str | None = None, revision: str | None = None, subfolder: str | None = None
    ) -> PushOptions:
        return PushOptions(
            commit_message=message,
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
            subfolder=subfolder,
        )

    def _push_later(
        self, folder: Path, patterns: Sequence[str], replaces: Sequence[str], options: PushOptions
    ) -> Future[Any]:
        """Upload some of a folder's files in their present state, in the background; warn if the upload fails."""
        out = Path(str(self.args.output_dir)).absolute()
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.push-", dir=out.parent))
        for path in matching_files(folder, patterns):  # the folder may be deleted or rewritten meanwhile
            copied = stage / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, copied)
        job = _API.run_as_future(push_folder, stage, self.hub_model_id, options, replaces=replaces)

        def done(job: Future[Any]) -> None:
            shutil.rmtree(stage, ignore_errors=True)
            if not job.cancelled() and job.exception() is not None:
                logger.warning(
                    f"{folder} was not pushed to {self.hub_model_id}: {job.exception()}\nThe folder is whole, "
                    "training goes on, and the next push has what this one lacks"
                )

        job.add_done_callback(done)
        return job

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save the editor to the output folder and upload it. Arguments are those of `Trainer.push_to_hub`.

        Returns:
            `CommitInfo`, or with `blocking=False` a `Future` of one.

        Raises:
            OSError: The Hub refused the upload or could not be reached. The editor is whole in the output folder.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        options = self._options(commit_message or "End of training", token, revision)
        folder = Path(str(self.args.output_dir))
        if blocking:
            name = str(self.hub_model_id)
            return push_folder(folder, name, options, patterns=EDITOR_FILES, replaces=REPLACED_FILES)
        return self._push_later(folder, EDITOR_FILES, REPLACED_FILES, options)

    def create_model_card(  # with the nine parameters of Trainer.create_model_card
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Add language, license, tags and dataset to the metadata of the editor's card, which saving has written. The
        other arguments describe a base model's card and are not used.
        """
        path = Path(str(self.args.output_dir)) / CARD_NAME
        if not self.is_world_process_zero() or not path.is_file():
            return
        old_tags = get_metadata(path).get("tags") or []
        new_tags = [tags] if isinstance(tags, str) else tags or []
        given = {
            "language": language,
            "license": license,
            "datasets": [dataset] if isinstance(dataset, str) else dataset,
            "tags": [*old_tags, *(tag for tag in new_tags if tag not in old_tags)],
        }
        set_metadata(path, {name: value for name, value in given.items() if value is not None})
