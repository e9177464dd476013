"""`EditableModel`: a base model, an editor, and the edits the model carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .bases.compiled import LENGTHS, check_uncompiled, compiling
from .bases.delegation import DelegatesToBase, known_to_pipelines
from .bases.fingerprint import check_base, editor_id, fingerprint_of
from .bases.placement import PlacedWithBase
from .bases.quantized import keep_gradients
from .bases.sharded import load_whole_state, whole_state
from .bases.split import SplitModel
from .bases.targets import find_targets
from .bases.unwrap import BaseState, hidden_width, plain_base
from .config import CONFIG_NAME, EditorConfig
from .data.checks import check_tokenizer, missing_subjects
from .data.display import shown
from .data.encoding import Encoder
from .data.records import EditRecord
from .editing.calibration_text import observe_calibration_text
from .editing.call import AfterEdits
from .editing.context import EditingContext
from .editing.edit_result import EditResult
from .editing.pipeline import make_edits
from .editing.proposals import default_options
from .editing.requests import as_requests, check_limits, check_requests
from .editing.steering import ActsWhereAsked
from .editing.writing import RecentWriters, Writer
from .edits.active import ActiveEdits
from .edits.carrier import ActsWhileOwned, CarriesEdits
from .edits.collection import chosen
from .edits.edit import Edit
from .edits.passes import acting_edits
from .hub.atomic import replaced_folder
from .hub.cards import CardNotes, write_card
from .hub.editor_files import known_to_transformers, write_model_config
from .hub.files import SCOPE_NAME, WEIGHTS_NAME, read_weights, write_weights
from .hub.sharing import PushesToHub
from .hub.transfer import check_options, find_files
from .methods import EditMethod, check_cost, new_method, state_shapes, training_free_config
from .scope.files import read_scope, write_scope
from .scope.network import ScopeNetwork


logger = logging.get_logger(__name__)


class EditableModel(PushesToHub, CarriesEdits, ActsWhereAsked, DelegatesToBase, PlacedWithBase):
    """
    A causal or seq2seq language model that can be edited. Only [`~EditableModel.merge_and_unload`] writes to the base
    model's weights. The edits act while this object exists, and [`~EditableModel.unload`] returns the base unchanged.

    Args:
        base_model (`PreTrainedModel`): Any causal or seq2seq model, or a `PeftModel` of one, whose adapters stay
            active. It is set to eval mode and frozen.
        editor_config ([`EditorConfig`], *optional*): The editor's configuration. The default is the best method that
            needs no training, [`~hf_mend.methods.training_free.WhitenedGradient`].
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
        if not isinstance(editor_config, EditorConfig):
            raise TypeError(
                f"editor_config is {shown(str(editor_config))}, a {type(editor_config).__name__}; expected an "
                "EditorConfig, such as EditorConfig(method='mend')"
            )
        if isinstance(base_model, EditableModel):
            raise TypeError(
                "base_model is an EditableModel already; edit that one, or wrap what its unload() returns, the base "
                "model without its edits"
            )
        check_tokenizer(tokenizer)
        base_model = plain_base(base_model)
        keep_gradients(base_model)
        if others := len(acting_edits(base_model)):
            logger.warning(
                f"another EditableModel's edits act in this base model ({others}); this one's are made beside them, "
                "and it can neither disable nor undo nor merge them. Unless that is meant, undo_all() there first"
            )
        self.targets = find_targets(base_model, editor_config)
        shapes = {target.name: target.shape for target in self.targets}
        self.editor: EditMethod = new_method(editor_config, shapes)
        self.editor.to(self.edit_device)
        self._initial_editor: str | None = editor_id(self.editor, editor_config.method)
        self._base_state = BaseState(base_model)
        self.base_model = base_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.editor_config = editor_config
        self.config = base_model.config
        if editor_config.task_type is None:
            editor_config.task_type = "SEQ_2_SEQ_LM" if self.config.is_encoder_decoder else "CAUSAL_LM"
        if editor_config.base_model_name_or_path is None:
            editor_config.base_model_name_or_path = self.config.name_or_path or None
        self.split = SplitModel(base_model, self.targets)
        self._compiled = None
        self._gate = self._new_gate(ScopeNetwork(hidden_width(base_model))) if editor_config.scope else None
        self._active = ActiveEdits(self.targets, base_model, self._gate)
        self._ownership = ActsWhileOwned(self._active)
        self.card_notes = CardNotes()
        self._writers = RecentWriters()
        self._spent: str | None = None
        self.eval()

    # ---- loading and saving the editor ----

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        editor_name_or_path: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **hub_kwargs: Any,
    ) -> EditableModel:
        """
        Attach a saved editor to a base model.

        Args:
            base_model (`PreTrainedModel`): The model to edit.
            editor_name_or_path (`str` or `Path`): A folder that `save_pretrained` wrote, or a repository's id on the
                Hub.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's tokenizer.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, as in `hf_hub_download`.

        Raises:
            TypeError: The base model or the editor's name is missing or something else, or there is no such option.
            FileNotFoundError: The folder or repository has no editor.
            ValueError: A file is damaged, does not fit the base model or asks for a search that is out of all
                proportion to it; the model stays unchanged.
        """
        if isinstance(base_model, (str, Path)) or not isinstance(editor_name_or_path, (str, Path)):
            raise TypeError(
                "EditableModel.from_pretrained takes a base model that is loaded, then the editor's folder or id; "
                "AutoEditableModel.from_pretrained(editor) loads both by the editor's name"
            )
        check_options(hub_kwargs)
        files = find_files(editor_name_or_path, [CONFIG_NAME, WEIGHTS_NAME], **hub_kwargs)
        config = EditorConfig.from_json_file(files[CONFIG_NAME])
        base_model = plain_base(base_model)
        targets = find_targets(base_model, config)
        check_base(config, base_model, targets, source=str(editor_name_or_path))
        scope = None
        if config.scope:
            files |= find_files(editor_name_or_path, [SCOPE_NAME], **hub_kwargs)
            scope = read_scope(files[SCOPE_NAME], hidden_width(base_model))
        check_cost(config, [target.shape for target in targets], str(editor_name_or_path))
        # The weights are checked before an editor of the size that the configuration states is built.
        expected = state_shapes(config, {target.name: target.shape for target in targets})
        tensors, _ = read_weights(files[WEIGHTS_NAME], expected)
        before = BaseState(base_model)
        try:
            model = cls(base_model, config, tokenizer)
            model.editor.load_state_dict(tensors)
            if scope is not None:
                model.set_scope(scope)
        except BaseException:
            before.restore(base_model)
            raise
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        card_data: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        *,
        edits: bool | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **push_kwargs: Any,
    ) -> None:
        """
        Write `editor_config.json`, `editor.safetensors`, `README.md` and, where there is one, the scope's
        `scope.safetensors`, all or nothing, even if the process is killed. Other files in the folder are kept. A
        `config.json` tells those who load the editor as a model what loads it, unless the folder has a model's.

        The edits that the model carries are not the editor's: a warning says that they stay behind, unless a store
        has them or `edits` says what is to become of them.

        Args:
            save_directory (`str` or `Path`): The folder.
            dtype (`torch.dtype`, *optional*): The dtype of the stored matrices, for a smaller file; vectors (steps,
                statistics) stay in float32. A loaded editor always computes in float32.
            max_shard_size (`int` or `str`, defaults to `"5GB"`): The largest size of a weight file; a larger editor is
                written as several with an index.
            card_data (`Mapping[str, Any]`, *optional*): Fields of the card's front matter: `license`, `language`,
                `datasets`, `tags` and other fields of `huggingface_hub.ModelCardData`. The card also has the facts of
                the training and the measurements.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*): The editor's tensors, read from the editor by
                default. If the editor is sharded over processes and one of them saves, pass those of
                [`~hf_mend.bases.sharded.whole_state`].
            edits (`bool`, *optional*): Whether `edits.safetensors` is written too, which `load_edits` of this folder
                loads.
            is_main_process (`bool`, defaults to `True`): Whether this process writes; all must call this.
            safe_serialization (`bool`, defaults to `True`): As transformers has it; files are always safetensors.
            push_to_hub (`bool`, defaults to `False`): Upload the same as [`~EditableModel.push_to_hub`] does.
            push_kwargs: With `push_to_hub`: `repo_id`, by default the folder's name, and the options of the upload.

        Raises:
            TypeError: Options of an upload are given without `push_to_hub`.
            ValueError: `safe_serialization` is off.
            RuntimeError: The model has been merged or unloaded, and the edits or the base model's fingerprint would
                be written, which it has no more.
        """
        if push_kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained has no option {next(iter(push_kwargs))!r} without push_to_hub=True")
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False, and an editor is written as safetensors alone; leave it out"
            )
        if edits or self.editor_config.base_fingerprint is None:
            self._check_usable()
        if edits is None and self.edits and self._active.store is None:
            logger.warning(
                f"the model carries edits ({len(self.edits)}), which are not saved with its editor; edits=True takes "
                "them along, save_edits writes them alone, and edits=False leaves them out"
            )
        tensors = {
            name: value.to(dtype) if dtype is not None and value.dim() > 1 else value
            for name, value in (whole_state(self.editor) if state_dict is None else state_dict).items()
        }
        if self.editor_config.base_fingerprint is None:
            self.editor_config.base_fingerprint = fingerprint_of(self.base_model, self.targets)
        if not is_main_process:
            return
        with replaced_folder(save_directory) as folder:
            (folder / CONFIG_NAME).write_text(self.editor_config.to_json(), encoding="utf-8")
            write_weights(folder, WEIGHTS_NAME, tensors, max_shard_size)
            write_model_config(folder)
            (folder / SCOPE_NAME).unlink(missing_ok=True)
            if self.scope is not None:
                write_scope(folder, self.scope)
            if edits:
                self.save_edits(folder)
            write_card(folder, self.editor_config, list(self.editor.shapes), self.card_notes, card_data)
        if push_to_hub:
            self.push_to_hub(
                push_kwargs.pop("repo_id", None) or Path(save_directory).name,
                dtype=dtype,
                max_shard_size=max_shard_size,
                card_data=card_data,
                edits=bool(edits),
                **push_kwargs,
            )

    def load_editor(self, path: str | Path) -> None:
        """
        Load the editor's weights from a file that `save_pretrained` wrote, or from the index of several.

        Raises:
            ValueError: The file is damaged or another editor's; the editor stays unchanged.
        """
        tensors, _ = read_weights(path, state_shapes(self.editor_config, self.editor.shapes))
        load_whole_state(self.editor, tensors)

    # ---- running ----

    @property
    def encoder(self) -> Encoder:
        """
        Return the encoder of texts for this model.

        Raises:
            ValueError: The model has no tokenizer, or is an encoder-decoder whose configuration does not state the
                token that starts its answers.
        """
        if self.tokenizer is None:
            raise ValueError(
                "editing with strings needs a tokenizer; pass tokenizer=... to EditableModel, or set model.tokenizer"
            )
        check_tokenizer(self.tokenizer)
        generation = getattr(self.base_model, "generation_config", None)
        start = getattr(self.config, "decoder_start_token_id", None)
        start = getattr(generation, "decoder_start_token_id", None) if start is None else start
        forced = getattr(generation, "forced_bos_token_id", None)
        return Encoder(
            self.tokenizer,
            bool(self.config.is_encoder_decoder),
            start,
            forced_bos_token_id=forced,
            num_embeddings=getattr(self.base_model.get_input_embeddings(), "num_embeddings", None),
            pad_to=1 if self._compiled is None else LENGTHS,
        )

    # ---- editing ----

    @property
    def context(self) -> EditingContext:
        """Return base model, edited layers and method, bundled anew as a wrapper may replace the editor."""
        return EditingContext(self.split, self.targets, self.editor, scoped=self._gate is not None)

    def edit(  # its thirteen parameters are public
        self,
        prompt: str | EditRecord | Sequence[str] | Sequence[EditRecord],
        target: str | Sequence[str] | None = None,
        *,
        chat: bool = False,
        messages: Sequence[Mapping[str, str]] = (),
        separator: str | None = None,
        paraphrases: str | Sequence[str] = (),
        locality: str | Sequence[str] = (),
        max_steps: int | None = None,
        force: bool = False,
        check: bool = True,
        check_earlier: int = 8,
        keep_failed: bool | None = None,
        batch_size: int | None = None,
    ) -> EditResult | list[EditResult]:
        """
        Make the model answer `target` to `prompt`. An edit is found on the model with the edits of earlier calls.

        An edit replaces an earlier edit of the same prompt, which the result names (`superseded`), until the later
        edit is undone. Prompts that differ only in white space are the same.

        Args:
            prompt (`str`, `EditRecord`, or a list of either): The prompt, or a record with its target.
            target (`str` or `list[str]`, *optional*): The answer to the prompt; left out for records.
            chat (`bool`, defaults to `False`): Treat the prompt as a user's turn in the tokenizer's chat template.
            messages (`Sequence[Mapping[str, str]]`): The system prompt and earlier turns of a chat whose next user
                turn is the prompt, each with `role` and `content`. With another system prompt it is another prompt.
            separator (`str`, *optional*): The text between prompt and target. The default is what the chat template
                puts there, and in plain text one space, or nothing where none is written.
            paraphrases (`str` or `Sequence[str]`): Prompts whose answer should be the target too, which is checked. An
                edit with a scope is made in these too where the model does not say the target to all of them.
                They are added to a record's own, and allowed for a single edit only.
            locality (`str` or `Sequence[str]`): Prompts whose answer should stay, which is checked. They are added to
                a record's own, and allowed for a single edit only.
            max_steps (`int`, *optional*): The most steps of an edit: a step that does not take is made smaller and
                followed by another. With 1, one whole step is made in any case. The default is the method's: 3 with
                MEND, 6 without a trained editor. Of an edit with a scope, up to 12 more: where a trained editor's step
                leads no nearer to the target, as of a long one, steps down the gradient itself follow.
            force (`bool`, defaults to `False`): Edit even if the model says the target already, as its paraphrases may
                not.
            check (`bool`, defaults to `True`): Check with the edited model whether the edit took. Without it, one step
                is made and the result has no measurements after the edit.
            check_earlier (`int`, defaults to 8): Ask so many of the latest earlier edits again, in one pass: the
                result names those that no longer hold. Edits with a scope disturb no others, except by asking for the
                same. 0 for none.
            keep_failed (`bool`, *optional*): Keep an edit that did not take. By default it is taken back, except with
                `max_steps=1`, whose one step is made in any case.
            batch_size (`int`, *optional*): The most edits in one pass. By default as many as memory allows on a GPU,
                and 16 on a CPU, where more are no faster. Fewer go into a pass where memory is short.

        Returns:
            [`EditResult`], or a list of them for lists, which also states whether the edit took.

        Raises:
            ValueError: A prompt, target or probe is empty or too long, lists differ in length or have two targets for
                one prompt, a limit is below 1, there is no tokenizer, the base was compiled in place, or an update is
                not finite. The model stays unchanged.
            RuntimeError: The model has been merged or unloaded.
        """
        self._check_usable()
        check_uncompiled(self.base_model)
        check_limits(max_steps=max_steps, batch_size=batch_size)
        if check_earlier < 0:
            raise ValueError(f"check_earlier is {check_earlier}, expected 0 or more")
        single = isinstance(prompt, (str, EditRecord))
        requests = as_requests(prompt, target, chat, paraphrases, locality, messages, separator)
        encoder = self.encoder
        check_requests(requests, encoder, self.config)
        self._warn_if_untrained()
        if self.editor.edits_at_subject and (note := missing_subjects((r.prompt, r.subject) for r in requests)):
            logger.warning(note)
        with (
            self._active.changing(),
            compiling(self._compiled),
            torch.inference_mode(False),
        ):  # an edit needs a gradient in any mode of the caller
            options = default_options(self.editor, self._gate is not None, max_steps, force, check)
            after = AfterEdits(max_steps == 1 if keep_failed is None else keep_failed, check_earlier)
            before = self._active.snapshot
            results = make_edits(self.context, encoder, self._active, requests, options, batch_size, self._gate, after)
            now = self._active.snapshot
        writers = [Writer(self, encoder, request.query, before, now) for request in requests]
        for result, writer in zip(results, writers, strict=True):
            result.set_writer(writer)
        self._writers.add(writers)
        self._warn_of(results)
        return results[0] if single else results

    def _warn_of(self, results: Sequence[EditResult]) -> None:
        """Warn of edits that did not take, and of earlier ones that a call has disturbed."""
        for result in results:
            if result.success is False:
                name, back = f"edit {result.id}" if result.id else "an edit", ", and was taken back"
                logger.warning(
                    f"{name} did not take{back if result.taken_back else ''}: {shown(result.prompt)} -> "
                    f"{shown(result.target)}; see its result"
                )
        for one in results[0].lost:
            logger.warning(
                f"the earlier edit {one.id} no longer holds: {shown(one.prompt)} -> {shown(one.target)}; undo what "
                "was edited since, or make it again"
            )

    def observe(self, texts: Iterable[str | tuple[str, str]]) -> None:
        """
        Add calibration text to the packaged one, for a method that needs no training: a few hundred lines of the kind
        whose outputs must stay. Later edits change the layers' outputs on it least. `save_pretrained` stores the
        statistics; another call replaces them.

        Args:
            texts (`Iterable[str | tuple[str, str]]`): Texts, or prompts with their answers. Each is read alone; a text
                is read in two halves, and each half, prompt or answer is cut at half the model's context.

        Raises:
            TypeError: An item is neither a text nor a pair.
            ValueError: There is no text, one is empty, or the editor takes no text since it is trained, or of a method
                such as `"ft"` or `"ft-kl"`. The editor stays unchanged.
            RuntimeError: The model has been merged or unloaded.
        """
        self._check_usable()
        if not self.editor.takes_texts:
            other = "the packaged text alone" if self.editor.reads_calibration_text else "no other text"
            why = "is trained, on data that say what must stay" if self.editor.trains else f"looks at {other}"
            raise ValueError(f"the method {self.editor_config.method!r} {why}; leave observe out")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("there are no texts to observe; give some of the kind that must stay")
        with self._active.changing(), self.disable_edits():
            observe_calibration_text(self.context, self.encoder, texts)

    @contextmanager
    def edited(self, prompt: Any, target: Any = None, **kwargs: Any) -> Iterator[EditResult | list[EditResult]]:
        """
        Edit the model within the context only, for the thread or asyncio task that is in it; the arguments are those
        of [`~EditableModel.edit`].
        """
        with self._active.draft():
            yield self.edit(prompt, target, **{"keep_failed": True, **kwargs})

    def merge_and_unload(self, safe_merge: bool = False, edits: Sequence[Edit | str] | None = None) -> PreTrainedModel:
        """
        Add all edits to the base model's weights and return the plain transformers model, with a `PeftModel`'s active
        adapters in its weights too. Its parameters need a gradient again where they did before the model was wrapped.
        This object is spent then. Weights have no scope: there the edits act everywhere.

        Args:
            safe_merge (`bool`, defaults to `False`): Check that no merged weight holds NaN or infinity before anything
                is written, at the cost of a copy of one weight at a time.
            edits (`Sequence[Edit | str]`, *optional*): The edits to merge, or their ids; the others are gone. All by
                default.

        Raises:
            KeyError: No edit has such an id; nothing has changed then.
            TypeError: A weight cannot take an update (a quantised base, an output layer tied to the embedding), or an
                adapter cannot be merged; nothing has changed then.
            ValueError: With `safe_merge`, a merged weight would hold NaN or infinity; nothing has changed then.
            RuntimeError: The model has been merged or unloaded already.
        """
        self._check_usable()
        only = None
        if edits is not None:
            ids = edits if isinstance(edits, str) else [one if isinstance(one, str) else one.id for one in edits]
            only = chosen(self._active.edits, ids)
        with self._active.merged(safe=safe_merge, only=only):
            self._base_state.restore_gradients(self.base_model)
            self._active.store = None
            self._spent = "edits have been merged into the base model's weights"
        return self.base_model

    def unload(self) -> PreTrainedModel:
        """
        Return the base model as it was before it was wrapped: without edits and their hooks, in training mode and with
        parameters that need a gradient where they did. Adapters of a `PeftModel` stay on its layers. This object is
        spent then; an open store keeps its edits.

        Raises:
            RuntimeError: The model has been merged or unloaded already.
        """
        self._check_usable()
        with self._active.changing():
            self._active.store, self._spent = None, "base model was given back by unload()"
            self._active.replace([])  # in a context its own alone
            self._active.discard()
            self._base_state.restore(self.base_model)
        return self.base_model

    def _warn_if_untrained(self) -> None:
        """Warn once if the editor or its scope was never trained."""
        initial, self._initial_editor = self._initial_editor, None
        if initial is not None and self.scope is not None and not self.scope.is_trained:
            logger.warning(
                "the scope was never trained, so edits act where a text happens to be like their own: train it with "
                "train_scope(model), which needs no data, or leave scope=True out for edits that act everywhere"
            )
        if initial is not None and self.editor.trains and editor_id(self.editor, self.editor_config.method) == initial:
            logger.warning(
                f"this {self.editor_config.method!r} editor was never trained, so its edits are no better than its "
                "initialisation: train it with EditorTrainer, load a trained one with from_pretrained, or leave "
                "editor_config out to edit by the best method that needs no training"
            )


def get_editable_model(
    base_model: PreTrainedModel,
    editor_config: EditorConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EditableModel:
    """
    Wrap a model with a new, untrained editor, as PEFT's `get_peft_model` does with an adapter.

    Args:
        base_model (`PreTrainedModel`): The model to edit.
        editor_config ([`EditorConfig`], *optional*): The editor's configuration; see [`EditableModel`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's tokenizer.
    """
    return EditableModel(base_model, editor_config, tokenizer)


known_to_pipelines(EditableModel)
known_to_transformers()
