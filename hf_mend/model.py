"""`EditableModel`: a base model, an editor, and the edits the model carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .bases.fingerprint import check_base, check_edits_base, check_same_base, fingerprint_of
from .bases.sharded import load_whole_state, whole_state
from .bases.split import SplitModel
from .bases.targets import find_targets
from .bases.unwrap import keep_gradients, plain_base
from .bases.weights import device_of, is_placed
from .config import CONFIG_NAME, EditorConfig
from .data.encoding import Encoder
from .data.records import EditRecord
from .editing.calibration_text import observe_calibration_text
from .editing.context import EditingContext
from .editing.pipeline import make_edits
from .editing.proposals import SearchOptions
from .editing.requests import EditResult, as_requests, check_limits, check_requests
from .edits.active import ActiveEdits, acting_edits
from .edits.collection import Edits, turned
from .edits.compression import Compression, compressed
from .edits.edit import Edit, active_edits, check_required, each_base_delta_once, stacked
from .edits.edits_file import read_edits_file, write_edits_file
from .edits.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_lora, warn_of_fused_experts, write_lora
from .edits.low_rank import truncated
from .edits.store import EditStore
from .hub.atomic import replaced_folder
from .hub.cards import CardNotes, write_card
from .hub.files import EDITS_NAME, WEIGHTS_NAME, read_weights, write_weights
from .hub.sharing import PushesToHub
from .hub.transfer import find_files
from .methods import EditMethod, get_method, state_shapes, training_free_config
from .training.examples import EditBatch
from .training.losses import EditingLoss, editing_loss


logger = logging.get_logger(__name__)


class EditableModel(PushesToHub, nn.Module):
    """
    A causal or seq2seq language model that can be edited. The base model's weights are never written to, except by
    [`~EditableModel.merge_and_unload`].

    Args:
        base_model (`PreTrainedModel`): Any causal or seq2seq model, or a `PeftModel` of one, whose adapters stay
            active. It is set to eval mode and frozen.
        editor_config ([`EditorConfig`], *optional*): What the editor edits and how. Without one the model is edited by
            the best method that needs no training, [`~hf_mend.methods.training_free.WhitenedGradient`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's tokenizer; `edit` needs it.

    Raises:
        ValueError: The configuration's target modules match nothing that can be edited, or the model was compiled in
            place.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        editor_config: EditorConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        editor_config = training_free_config() if editor_config is None else editor_config
        base_model = plain_base(base_model)
        keep_gradients(base_model)
        if others := len(acting_edits(base_model)):
            logger.warning(
                f"another EditableModel's edits act in this base model ({others}); this one's are made beside them, "
                "and it can neither disable nor undo nor merge them. Unless that is meant, undo_all() there first"
            )
        self.targets = find_targets(base_model, editor_config)
        shapes = {target.name: target.shape for target in self.targets}
        self.editor: EditMethod = get_method(editor_config.method)(editor_config, shapes)
        self.editor.to(self._edit_device)
        self.base_model = base_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.editor_config = editor_config
        self.config = base_model.config
        if editor_config.task_type is None:
            editor_config.task_type = "SEQ_2_SEQ_LM" if self.config.is_encoder_decoder else "CAUSAL_LM"
        if editor_config.base_model_name_or_path is None:
            editor_config.base_model_name_or_path = self.config.name_or_path or None
        self.split = SplitModel(base_model, self.targets)
        self._stack = ActiveEdits(self.targets, base_model)
        self.card_notes = CardNotes()
        self._merged = False
        self._store: EditStore | None = None

    # ---- loading and saving the editor ----

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        editor_name_or_path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **hub_kwargs: Any,
    ) -> EditableModel:
        """
        Attaches a saved editor to a base model.

        Args:
            base_model (`PreTrainedModel`): The model to edit.
            editor_name_or_path (`str` or `Path`): A folder that `save_pretrained` wrote, or a repository's id on the
                Hub.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's tokenizer.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, as in `hf_hub_download`.

        Raises:
            FileNotFoundError: The folder or repository has no editor.
            ValueError: A file is damaged, or does not fit the base model; the base model is as it was.
        """
        files = find_files(editor_name_or_path, [CONFIG_NAME, WEIGHTS_NAME], **hub_kwargs)
        config = EditorConfig.from_json_file(files[CONFIG_NAME])
        base_model = plain_base(base_model)
        targets = find_targets(base_model, config)
        check_base(config, base_model, targets, source=str(editor_name_or_path))
        # Read before anything is built, as large as the configuration says.
        expected = state_shapes(config, {target.name: target.shape for target in targets})
        tensors, _ = read_weights(files[WEIGHTS_NAME], expected)
        with _restored_on_error(base_model):
            model = cls(base_model, config, tokenizer)
            model.editor.load_state_dict(tensors)
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        card_data: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Writes `editor_config.json`, `editor.safetensors` and `README.md`, all or nothing.

        A process killed in the middle leaves an earlier folder of that name whole; files of other names are kept.

        Args:
            save_directory (`str` or `Path`): The folder.
            dtype (`torch.dtype`, *optional*): Of the stored matrices, to share a smaller file; vectors (steps,
                statistics) stay in float32. A loaded editor computes in float32 whatever it was stored in.
            max_shard_size (`int` or `str`, defaults to `"5GB"`): The largest size of a weight file; a larger editor is
                written as several with an index.
            card_data (`Mapping[str, Any]`, *optional*): Fields of the card's front matter: `license`, `language`,
                `datasets`, `tags` and what else `huggingface_hub.ModelCardData` takes. What training and measuring
                came to is in the card anyway.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*): The editor's tensors; asked of the editor when
                missing. Give them where processes share the editor out and one of them saves: see
                [`~hf_mend.bases.sharded.whole_state`].
        """
        tensors = {
            name: value.to(dtype) if dtype is not None and value.dim() > 1 else value
            for name, value in (whole_state(self.editor) if state_dict is None else state_dict).items()
        }
        if self.editor_config.base_fingerprint is None:
            self.editor_config.base_fingerprint = fingerprint_of(self.base_model, self.targets)
        with replaced_folder(save_directory) as folder:
            (folder / CONFIG_NAME).write_text(self.editor_config.to_json(), encoding="utf-8")
            write_weights(folder, WEIGHTS_NAME, tensors, max_shard_size)
            write_card(folder, self.editor_config, list(self.editor.shapes), self.card_notes, card_data)

    def load_editor(self, path: str | Path) -> None:
        """
        Loads the editor's weights from a file that `save_pretrained` wrote, or from the index of several.

        Raises:
            ValueError: The file is damaged or another editor's; the editor is as it was.
        """
        tensors, _ = read_weights(path, state_shapes(self.editor_config, self.editor.shapes))
        load_whole_state(self.editor, tensors)

    # ---- running ----

    def forward(self, *args: Any, edit_batch: EditBatch | None = None, **kwargs: Any) -> Any:
        """
        The base model's forward pass under the active edits; with `edit_batch`, the editor's training loss instead,
        which takes the other arguments of [`~hf_mend.training.losses.editing_loss`].

        Returns:
            The base model's output, or an [`~hf_mend.training.losses.EditingLoss`].
        """
        if edit_batch is None:
            return self.base_model(*args, **kwargs)
        loss: EditingLoss = editing_loss(self.context, edit_batch, **kwargs)
        return loss

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` under the active edits."""
        return self.base_model.generate(*args, **kwargs)

    def train(self, mode: bool = True) -> EditableModel:
        """Sets the editor's mode. The base model stays in eval mode: an edit's gradient must not see dropout."""
        super().train(mode)
        self.base_model.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.split.device

    def to(self, *args: Any, **kwargs: Any) -> EditableModel:
        """
        Moves base model and editor, and casts the base model alone: an editor computes in float32. A base placed by a
        device map or offloading stays, the editor with it.
        """
        return self if is_placed(self.base_model) else super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> EditableModel:
        """What `to`, `half`, `cuda` and their like go through."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            self.base_model._apply(fn)
            self.editor._apply(move)
        return self

    @property
    def _edit_device(self) -> torch.device:
        """Where factors are made: where the first edited layer runs."""
        return device_of(self.targets[0].module)

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype."""
        return self.base_model.dtype

    @property
    def name_or_path(self) -> str:
        """Where the base model came from; lm-evaluation-harness looks for a tokenizer there."""
        return str(self.config.name_or_path)

    def tie_weights(self) -> None:
        """
        Does nothing: the base model's weights were tied when it was loaded, and are not written to.
        lm-evaluation-harness calls it on what it is given.
        """

    @property
    def encoder(self) -> Encoder:
        """
        What turns texts into this model's inputs.

        Raises:
            ValueError: The model has no tokenizer, or is an encoder-decoder whose configuration does not say what its
                answers start with.
        """
        if self.tokenizer is None:
            raise ValueError(
                "editing with strings needs a tokenizer; pass tokenizer=... to EditableModel, or set model.tokenizer"
            )
        generation = getattr(self.base_model, "generation_config", None)
        start = getattr(self.config, "decoder_start_token_id", None)
        start = getattr(generation, "decoder_start_token_id", None) if start is None else start
        forced = getattr(generation, "forced_bos_token_id", None)
        return Encoder(self.tokenizer, bool(self.config.is_encoder_decoder), start, forced_bos_token_id=forced)

    # ---- editing ----

    @property
    def context(self) -> EditingContext:
        """Base model, edited layers and method as one thing; made anew, as a wrapper may replace the editor."""
        return EditingContext(self.split, self.targets, self.editor)

    @property
    def edits(self) -> Edits:
        """
        The edits the model carries, oldest first, to index, search and export. Of several of one prompt the last acts,
        the others wait.
        """
        return Edits(self._stack.edits)

    def edit(
        self,
        prompt: str | EditRecord | Sequence[str] | Sequence[EditRecord],
        target: str | Sequence[str] | None = None,
        *,
        chat: bool = False,
        paraphrases: str | Sequence[str] = (),
        locality: str | Sequence[str] = (),
        max_steps: int | None = None,
        force: bool = False,
        check: bool = True,
        batch_size: int = 16,
    ) -> EditResult | list[EditResult]:
        """
        Makes the model answer `target` to `prompt`. Later edits see earlier ones; those of one call see what came
        before it.

        An edit of a prompt that has one already takes its place, and the result says which (`superseded`): the model
        no longer sees the earlier one, until an undo of the later brings it back. Prompts are the same that differ
        in white space alone.

        Args:
            prompt (`str`, `EditRecord`, or a list of either): What is asked.
            target (`str` or `list[str]`, *optional*): What to answer; left out for records.
            chat (`bool`, defaults to `False`): The prompt is a user's turn in the tokenizer's chat template.
            paraphrases (`str` or `Sequence[str]`): Prompts on which to check that the target is said too, beside a
                record's own (a single edit only).
            locality (`str` or `Sequence[str]`): Prompts on which to check that the answer stays, beside a record's
                own (a single edit only).
            max_steps (`int`, *optional*): A step that does not take is made smaller and followed by another, up to
                this many; 1 is one whole step, come what may. The method's own number when left out: 3 with MEND, 6
                without a trained editor.
            force (`bool`, defaults to `False`): Edit also where the model says the target already; its paraphrases may
                not.
            check (`bool`, defaults to `True`): Ask the edited model whether the edit took; without it there is one
                step, and the result knows nothing of after.
            batch_size (`int`, defaults to 16): Most edits in one pass; long requests go in smaller batches.

        Returns:
            [`EditResult`], or a list of them for lists. An edit that did not take says so there.

        Raises:
            ValueError: A prompt, target or probe is empty or too long, lists differ in length or have two targets for
                one prompt, a limit is below 1, there is no tokenizer, or an update is not finite. The model is as it
                was.
            RuntimeError: The model has been merged.
        """
        self._check_usable()
        check_limits(max_steps=max_steps, batch_size=batch_size)
        single = isinstance(prompt, (str, EditRecord))
        requests = as_requests(prompt, target, chat, paraphrases, locality)
        encoder = self.encoder
        check_requests(requests, encoder, self.config)
        with self._stored(), torch.inference_mode(False):  # an edit needs a gradient, whatever the caller's mode is
            options = SearchOptions(self.editor.max_steps if max_steps is None else max_steps, force, check)
            results = make_edits(self.context, encoder, self._stack, requests, options, batch_size)
        for result in results:
            if result.success is False:
                logger.warning(
                    f"edit {result.id} did not take: {result.prompt!r} -> {result.target!r}; see its result"
                )
        return results[0] if single else results

    def observe(self, texts: Iterable[str | tuple[str, str]]) -> None:
        """
        Shows a method that needs no training text of the kind that must stay, beside the packaged page: a few hundred
        lines of what the model is used for. Its next edits change the layers' outputs there least. `save_pretrained`
        keeps what it has seen; another call begins anew.

        Args:
            texts (`Iterable[str | tuple[str, str]]`): Texts, or prompts with their answers. Each is seen alone; a
                text is read in two halves, and each half, prompt or answer to half the model's context.

        Raises:
            TypeError: One of the texts is neither.
            ValueError: There is none, one is empty, or the editor takes no text: it is a trained one, or of a method
                such as `"ft"` or `"ft-kl"`. The editor is as it was.
            RuntimeError: The model has been merged.
        """
        self._check_usable()
        if not self.editor.takes_texts:
            other = "the packaged text alone" if self.editor.reads_ordinary_text else "no other text"
            why = "is trained, on data that say what must stay" if self.editor.trains else f"looks at {other}"
            raise ValueError(f"the method {self.editor_config.method!r} {why}; leave observe out")
        texts = list(texts)
        if not texts:
            raise ValueError("there are no texts to observe; give some of the kind that must stay")
        with self.disable_edits():
            observe_calibration_text(self.context, self.encoder, texts)

    def undo(self, edit_id: str | None = None) -> Edit:
        """
        Takes back an edit, the last one by default. The logits are then bit for bit those of the other edits alone,
        among them one that it had superseded.

        Raises:
            KeyError: No edit has that id.
            IndexError: There is no edit to undo.
            ValueError: The edit is part of a compressed one.
        """
        self._check_usable()
        if not self._stack.edits:
            raise IndexError("there is no edit to undo")
        with self._stored():
            return self._stack.remove([self._stack.edits[-1].id if edit_id is None else edit_id])[0]

    def undo_all(self) -> list[Edit]:
        """Takes back all edits and returns them."""
        self._check_usable()
        with self._stored():
            return self._stack.remove([edit.id for edit in self._stack.edits])

    def turn_off(self, *edit_ids: str) -> None:
        """
        Turns edits off for good: they stay among [`~EditableModel.edits`], saved ones too, and the model answers bit
        for bit as if they were not there. [`~EditableModel.disable_edits`] does it for a while and for all.

        Raises:
            KeyError: No edit has such an id; none is turned off.
            ValueError: An edit is part of a compressed one; none is turned off.
        """
        self._check_usable()
        with self._stored():
            self._stack.replace(turned(self._stack.edits, edit_ids, on=False))

    def turn_on(self, *edit_ids: str) -> None:
        """
        Turns edits on again: the model answers bit for bit as before they were turned off. Errors are those of
        [`~EditableModel.turn_off`].
        """
        self._check_usable()
        with self._stored():
            self._stack.replace(turned(self._stack.edits, edit_ids, on=True))

    def compress_edits(self, rank: int, keep: bool = True) -> Compression:
        """
        Makes one edit of all that act: of each layer's sum, the nearest matrix of a rank (singular value
        decomposition).

        The edits that it replaces stay among [`~EditableModel.edits`] without effect, and an undo of the one brings
        them back bit for bit; until then they cannot be undone or turned off one by one. A later edit of a prompt of
        theirs is added to the one.

        Args:
            rank (`int`): The highest rank of a layer.
            keep (`bool`, defaults to `True`): Keep the edits that are replaced. Without, they are gone, and so are
                those that they had superseded: the one's undo leaves the model without any of them.

        Returns:
            [`~hf_mend.edits.compression.Compression`]: The new edit's id, and the relative error of each layer.

        Raises:
            ValueError: No edit acts, or the rank is below 1.
        """
        self._check_usable()
        with self._stored():
            edits, report = compressed(self._stack.edits, rank, keep)
            self._stack.replace(edits)
        return report

    def open_store(self, path: str | Path) -> list[Edit]:
        """
        Takes the edits of a store on disk, and from now on keeps in it what is done to the model's edits: edits,
        undos, turning off and on, loading, compressing; not what `edited` and `carrying` do for a while.

        The store's edits come before those that the model has, which are appended to it. What other processes append
        meanwhile stays, and is seen by the next model that opens it.

        Args:
            path (`str` or `Path`): The store, see [`EditStore`]; made by the first edit where it does not exist.

        Returns:
            `list[Edit]`: The store's edits.

        Raises:
            ValueError: It is damaged, or its edits are of another base model or in the model already; the model is as
                it was.
            RuntimeError: A store is open already.
        """
        self._check_usable()
        if self._store is not None:
            raise RuntimeError(f"the store {str(self._store.path)!r} is open; close_store() first")
        store = EditStore(path, fingerprint_of(self.base_model, self.targets))
        edits, before = list(store.edits), self._stack.edits
        check_same_base(self.base_model, store.base_fingerprint, str(path))
        self._stack.check_fit(edits, path)
        every = each_base_delta_once([*edits, *before])
        store.follow(edits, every)
        self._stack.replace(every)
        self._store = store
        return edits

    def close_store(self) -> None:
        """Keeps nothing more in the store; the model's edits stay as they are."""
        self._store = None

    @contextmanager
    def disable_edits(self) -> Iterator[None]:
        """Within the context, the model answers as if it had no edits."""
        with self._stack.disabled():
            yield

    @contextmanager
    def carrying(self, edits: Sequence[Edit]) -> Iterator[None]:
        """
        Within the context the model carries these edits and no others: some of its own, say, or another user's.

        Raises:
            ValueError: An edit does not fit this model.
        """
        self._check_usable()
        with self._for_a_while():
            self._stack.replace([])
            self._stack.check_fit(edits, "these edits")
            self._stack.replace(edits)
            yield

    @contextmanager
    def edited(self, prompt: Any, target: Any = None, **kwargs: Any) -> Iterator[EditResult | list[EditResult]]:
        """Within the context the model carries an edit (or several); see [`~EditableModel.edit`] for the arguments."""
        with self._for_a_while():
            yield self.edit(prompt, target, **kwargs)

    def save_edits(self, save_directory: str | Path) -> None:
        """
        Writes the edits to `edits.safetensors` in a folder, all or nothing.

        Args:
            save_directory (`str` or `Path`): The folder; made if missing.
        """
        write_edits_file(save_directory, self._stack.edits, fingerprint_of(self.base_model, self._stack.layers))

    def load_edits(self, edits_name_or_path: str | Path, **hub_kwargs: Any) -> list[Edit]:
        """
        Adds saved edits to the model, bit for bit as they were saved.

        Args:
            edits_name_or_path (`str` or `Path`): A folder that `save_edits` wrote, or a repository's id on the Hub.
            hub_kwargs: As for [`~EditableModel.from_pretrained`].

        Raises:
            FileNotFoundError: There are no edits.
            ValueError: The file is damaged, or its edits do not fit this model or are there already; nothing is
                loaded.
        """
        self._check_usable()
        path = find_files(edits_name_or_path, [EDITS_NAME], **hub_kwargs)[EDITS_NAME]
        edits, fingerprint = read_edits_file(path)
        check_edits_base(self.editor_config, self.base_model, fingerprint, str(path))
        self._stack.check_fit(edits, path)
        with self._stored():
            self._stack.replace([*self._stack.edits, *edits])
        return edits

    def save_lora(
        self,
        save_directory: str | Path,
        edits: Sequence[Edit] | None = None,
        uniform_rank: bool = False,
        max_rank: int | None = None,
    ) -> float:
        """
        Writes edits as a LoRA adapter that plain `PeftModel.from_pretrained` loads with the edited model's logits.

        Args:
            save_directory (`str` or `Path`): The folder.
            edits (`Sequence[Edit]`, *optional*): Which edits; all that the model carries by default.
            uniform_rank (`bool`, defaults to `False`): Pad all layers to one rank, as some servers want it.
            max_rank (`int`, *optional*): The highest rank of a layer; those above it are brought there by SVD.

        Returns:
            `float`: The largest relative error (Frobenius norm) among the layers that `max_rank` made smaller, or 0.

        Raises:
            ValueError: There is no edit, one requires a base delta that is missing, or `max_rank` is below 1.
        """
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank is {max_rank}, expected 1 or more")
        edits = self._stack.edits if edits is None else edits
        check_required(edits, "save_lora")
        edits = active_edits(edits)
        updates, error = stacked(edits), 0.0
        if max_rank is not None and any(len(u) > max_rank for u, _ in updates.values()):
            smaller = {name: truncated(update, max_rank) for name, update in updates.items()}
            updates, error = {name: one for name, (one, _) in smaller.items()}, max(e for _, e in smaller.values())
            edits = []  # their rows are no longer apart
        warn_of_fused_experts(self.base_model, updates)
        write_lora(
            save_directory,
            self.targets,
            updates,
            self.editor_config.task_type,
            self.editor_config.base_model_name_or_path,
            uniform_rank,
            edits,
        )
        return error

    def load_lora(self, lora_name_or_path: str | Path, **hub_kwargs: Any) -> list[Edit]:
        """
        Adds a LoRA adapter to the model: as the edits that `save_lora` wrote, or, from elsewhere, as one edit without
        a prompt. Its layers may be any linear layers of the base model.

        Args:
            lora_name_or_path (`str` or `Path`): A folder with `adapter_config.json` and `adapter_model.safetensors`,
                or a repository's id on the Hub.
            hub_kwargs: As for [`~EditableModel.from_pretrained`].

        Returns:
            `list[Edit]`: The edits.

        Raises:
            FileNotFoundError: There is no adapter.
            ValueError: A file is damaged, the adapter is not plain LoRA on linear layers of this model (DoRA, biases,
                whole layers), or its edits are there already; nothing is loaded.
        """
        self._check_usable()
        files = find_files(lora_name_or_path, [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME], **hub_kwargs)
        edits = read_lora(files[ADAPTER_CONFIG_NAME], files[ADAPTER_WEIGHTS_NAME])
        self._stack.check_fit(edits, lora_name_or_path)
        with self._stored():
            self._stack.replace([*self._stack.edits, *edits])
        return edits

    def merge_and_unload(self) -> PreTrainedModel:
        """
        Adds all edits to the base model's weights and returns the plain transformers model, with a `PeftModel`'s
        active adapters in its weights too. This object is spent then.

        Raises:
            TypeError: A weight cannot take an update (a quantised base, an output layer tied to the embedding), or an
                adapter cannot be merged; nothing has changed then.
        """
        self._check_usable()
        self._stack.merge()
        self._merged = True
        return self.base_model

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: all but the open store, which is one model's."""
        return {**self.__dict__, "_store": None}

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """What changes within the context is kept in the open store; if it cannot be, nothing has changed."""
        before = self._stack.edits
        yield
        if self._store is not None:
            try:
                self._store.follow(before, self._stack.edits)
            except BaseException:
                self._stack.replace(before)
                raise

    @contextmanager
    def _for_a_while(self) -> Iterator[None]:
        """After the context, the edits are what they were before it; no store knows of it."""
        before, store, keys = self._stack.edits, self._store, self._stack.preserved_keys.copy()
        self._store = None
        try:
            yield
        finally:
            self._store, self._stack.preserved_keys = store, keys
            self._stack.replace(before)

    def _check_usable(self) -> None:
        if self._merged:
            raise RuntimeError(
                "this model's edits have been merged into the base model's weights; load the base model again and "
                "wrap it "
                "anew to edit further"
            )


def get_editable_model(
    base_model: PreTrainedModel,
    editor_config: EditorConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EditableModel:
    """
    Wraps a model with a new, untrained editor, as PEFT's `get_peft_model` does with an adapter.

    Args:
        base_model (`PreTrainedModel`): The model to edit.
        editor_config ([`EditorConfig`], *optional*): What the editor edits and how; see [`EditableModel`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's tokenizer.
    """
    return EditableModel(base_model, editor_config, tokenizer)


@contextmanager
def _restored_on_error(base_model: nn.Module) -> Iterator[None]:
    """Undoes the freezing of a base model whose editor could not be loaded."""
    modes = [(module, module.training) for module in base_model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    try:
        yield
    except BaseException:
        for module, training in modes:
            module.training = training
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
        raise
