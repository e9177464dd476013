"""Training an editor: `transformers.Trainer` with the editing loss, editor-only checkpoints and editing metrics."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..bases.fingerprint import fingerprint_of, forget_editor_id
from ..bases.limits import longest_input
from ..bases.sharded import whole_state
from ..data.checks import check_query
from ..data.encoding import Query
from ..data.readers.reading import check_targets
from ..data.records import EditDataset, EditRecord
from ..evaluation.checks import check_asked
from ..evaluation.metrics import evaluate_records, measure_with_scope, summarize
from ..hub.cards import CardNotes
from ..hub.files import WEIGHTS_NAME
from ..hub.transfer import find_files
from ..model import EditableModel
from .arguments import EditorTrainingArguments, asking_of, training_facts
from .cache import HiddenStateCache
from .calibration import calibrate
from .continuations import with_continuations
from .examples import LOCAL_KINDS, EditBatch, EditCollator, TrainingExamples
from .hub_checkpoints import PushesCheckpoints
from .objective import EditingObjective
from .scope_processes import train_scope_once
from .scope_training import ScopeTrainingArguments
from .soundness import FiniteGradients, check_loss, checkpoint_to_resume


logger = logging.get_logger(__name__)

_LOGARITHMS = ("log_step", "log_ridge")
# How many tokens of the un-edited model's follow a target, where edits act everywhere and none are named.
_CONTINUATION_TOKENS = 8


class EditorTrainer(PushesCheckpoints, Trainer):
    """
    Train the editor of an [`EditableModel`], and its scope where it has one; the base model stays unchanged.

    Logging, callbacks, mixed precision, gradient accumulation, checkpoints, best-model selection and early stopping
    are those of `transformers.Trainer`.

    `evaluate` reports `eval_edit_success`, `eval_generality`, `eval_neighborhood`, `eval_unrelated` and their mean
    `eval_score` over single edits of the evaluation data.

    Args:
        model ([`EditableModel`]): The model whose editor is trained, with a tokenizer.
        args ([`EditorTrainingArguments`]): The training arguments.
        train_dataset (`Dataset` or list of [`EditRecord`], or [`TrainingExamples`]): The facts to train on; or their
            draws, whose own settings then stand in for what the arguments say about rows and forms.
        eval_dataset (`Dataset` or list of [`EditRecord`], *optional*): The facts to evaluate on.
        questions (`Sequence[tuple[str, str]]`, *optional*): Unrelated questions and answers for the locality loss.
        kwargs: Other arguments of `Trainer`.

    Attributes:
        model, editable_model ([`EditableModel`]): The given model. While `train` runs, `model` (and the
            `model` that callbacks get) is the [`~hf_mend.training.objective.EditingObjective`] around it.

    Raises:
        ValueError: The model's method has nothing to train.
    """

    model: Any

    def __init__(
        self,
        model: EditableModel,
        args: EditorTrainingArguments,
        train_dataset: TrainingExamples | Dataset[EditRecord] | Sequence[EditRecord] | None = None,
        eval_dataset: Dataset[EditRecord] | Sequence[EditRecord] | None = None,
        questions: Sequence[tuple[str, str]] = (),
        **kwargs: Any,
    ):
        if not model.editor.trains:
            raise ValueError(
                f"the method {model.editor_config.method!r} has nothing to train and edits as it is; "
                "choose 'mend', 'malmen', 'ke' or 'enn' in EditorConfig.method to train an editor"
            )
        examples: TrainingExamples | None = None
        if isinstance(train_dataset, TrainingExamples):
            examples = train_dataset
        elif train_dataset is not None:
            examples = TrainingExamples(
                _as_records(train_dataset),
                questions,
                args.general_rows,
                args.neighborhood_rows,
                args.unrelated_rows,
                args.data_seed if args.data_seed is not None else args.seed,
                asking_of(args, model.encoder.tokenizer),
                args.same_subject_rows,
                args.continuation_rows,
            )
        scoped = model.scope is not None
        if scoped and examples is not None:
            examples.for_a_scope(continuations=not model.config.is_encoder_decoder)
        kwargs.setdefault("data_collator", EditCollator(model.encoder, longest_input(model.config), scoped))
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=None if eval_dataset is None else EditDataset(_as_records(eval_dataset)),
            **kwargs,
        )
        self.args: EditorTrainingArguments = args
        self.editable_model = model
        objective = EditingObjective(model)
        self._objective: tuple[Any, Any] = (objective, objective)
        self.examples = examples
        self.can_return_loss = True
        self.model_accepts_loss_kwargs = False
        self.hidden_states: HiddenStateCache | None = None
        self._parts: dict[str, list[float]] = {}
        self._started = time.perf_counter()
        self._first_step = 0
        self._measured: dict[int, dict[str, dict[str, float]]] = {}  # step of the measured weights -> metrics
        self._step_of_weights: int | None = None  # differs from the last step if the best weights were loaded
        if examples is not None:
            self.add_callback(_EpochCallback(examples))
        self.add_callback(FiniteGradients(model.editor))

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train the editor, after setting its statistics if it has none yet, and then the scope of a model that has one.
        Arguments are those of `Trainer.train`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): The folder of a checkpoint, or `True` for the newest
                one in the output folder that was written to its end.
            args, kwargs: Other arguments of `Trainer.train`.

        Raises:
            FileNotFoundError: There is no whole checkpoint to resume from.
            FloatingPointError: A loss or a gradient is not finite. The editor has the weights of the step before.
            ValueError: The model carries edits, or a text of the training or evaluation data is empty or too long for
                the model; the message names the text.
        """
        self._check_unedited("train")
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        if self.examples is not None:
            self._check_texts(self.examples.records, self.examples.questions)
        if self.eval_dataset is not None:
            self._check_texts(_as_records(self.eval_dataset))
        model = self.editable_model
        if self.examples is not None and not model.editor.is_calibrated:
            calibrate(model, self.examples, self.args.statistics_edits, self.args.per_device_train_batch_size)
        if self.examples is not None and self.examples.continuation_rows and self._continuation_tokens:
            self._continue_texts(self.examples)
        if self.examples is not None and self.args.hidden_states_dir:
            with self.args.main_process_first(local=False):
                cache = HiddenStateCache(model.split, self.args.hidden_states_dir, self.args.hidden_states_limit)
                encoder, longest = model.encoder, longest_input(model.config)
                if self.args.process_index == 0:
                    # An epoch draws about half of a record's texts; the states of the others are not needed.
                    drawn = self.examples.queries(self._epochs(len(self.examples)))
                    queries = (encoder.shortened(query, longest) for query in drawn)
                    cache.fill(encoder, queries, progress=not self.args.disable_tqdm)
                stay = self.examples.local_queries(self._epochs(len(self.examples)))
                texts = (encoder.shortened(query, longest) for query in stay)
                cache.fill_unedited(encoder, texts, progress=not self.args.disable_tqdm)
            self.hidden_states = cache
        if model.editor_config.base_fingerprint is None:  # later its weights may be sharded over processes
            model.editor_config.base_fingerprint = fingerprint_of(model.base_model, model.targets)
        self._started = time.perf_counter()
        self._step_of_weights, self._first_step = None, 0
        self._measured.clear()
        with self._on_objective():
            output = super().train(checkpoint, *args, **kwargs)
        forget_editor_id(model.editor)  # a sharded run may write to weights where torch counts no change
        if self.examples is not None and model.scope is not None and self.args.scope_steps:
            steps, further, seed = self.args.scope_steps, self.args.scope_further_facts, self.args.seed
            train_scope_once(model, self.examples, ScopeTrainingArguments(steps, further_facts=further, seed=seed))
        self._note_for_card()
        return output

    @contextmanager
    def _on_objective(self) -> Iterator[None]:
        """
        Within the context, let the parent wrap and optimise the objective, since gradients are exchanged between
        processes where a wrapper's forward runs. The objective stays wrapped for the next training.
        """
        own = self.model, self.model_wrapped
        self.model, self.model_wrapped = self._objective
        try:
            yield
        finally:
            self._objective = self.model, self.model_wrapped
            self.model, self.model_wrapped = own

    def _continue_texts(self, examples: TrainingExamples) -> None:
        """Each process needs all of what the base goes on with; the first computes it, the others read it."""
        file = Path(str(self.args.output_dir)) / "continuations.jsonl"
        with self.args.main_process_first(local=False):
            with_continuations(
                examples,
                self.editable_model,
                self._epochs(len(examples)),
                self._continuation_tokens,
                file=file,
                progress=not self.args.disable_tqdm,
            )

    @property
    def _continuation_tokens(self) -> int:
        chosen = self.args.continuation_tokens
        return chosen if chosen is not None else 0 if self.editable_model.scope is not None else _CONTINUATION_TOKENS

    def _epochs(self, facts: int) -> int:
        """Return the number of epochs of the training; the last may be incomplete."""
        if self.args.max_steps <= 0:
            return math.ceil(self.args.num_train_epochs)
        facts_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(self.args.max_steps * facts_per_step / facts)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the editing loss of a batch of different facts."""
        weights = {kind: getattr(self.args, f"{kind}_weight") for kind in LOCAL_KINDS}
        doublings = max(1, self.args.group_size).bit_length()
        result = model(
            edit_batch=inputs,
            locality_weights=weights,
            run_below=self.hidden_states,
            group_size=2 ** (self.state.global_step % doublings),
            micro_batch_size=self.args.micro_batch_size,
            calls_per_batch=self.args.calls_per_batch,
            decay=self.args.decay,
        )
        parts = {"edit": result.edit, **result.locality}
        values = {f"loss_{name}": float(value.detach()) for name, value in parts.items()}
        check_loss({**values, "loss": float(result.loss.detach())}, self.state.global_step + 1)
        for name, value in values.items():
            self._parts.setdefault(name, []).append(value)
        return (result.loss, result) if return_outputs else result.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the values, with the parts of the loss beside it."""
        if "loss" in logs:
            for name, values in self._parts.items():
                if values:
                    logs[name] = sum(values) / len(values)
                    values.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make an optimizer with a separate learning rate for edit steps and ridges, if none was given."""
        if self.optimizer is None:
            trainable = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in trainable if not n.endswith(_LOGARITHMS)]},
                {"params": [p for n, p in trainable if n.endswith(_LOGARITHMS)], "lr": self.args.step_learning_rate},
            ]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls([group for group in groups if group["params"]], **kwargs)
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: operations are not counted, since an edit's cost depends on the position of its lowest layer."""
        return 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """Return the next batches, without the parent's count of labels, which this loss does not need."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device) if isinstance(inputs, EditBatch) else super()._prepare_inputs(inputs)

    # ---- measuring ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Edit each record of the evaluation data alone and measure it.

        Returns:
            `dict[str, float]`: The metrics of [`~hf_mend.evaluation.metrics.summarize`], with the prefix in their
            names.

        Raises:
            ValueError: There is no evaluation data, a text of it is empty or too long for the model, or the model
                carries edits.
        """
        self._check_unedited("evaluate")
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if data is None:
            raise ValueError("EditorTrainer.evaluate needs an eval_dataset; pass one here or to the trainer")
        records = _as_records(data)
        self._check_texts(records)
        start = time.time()
        model = self.editable_model
        was_training = model.training
        model.eval()
        if model.scope is None:
            measured = evaluate_records(
                model.split, model.targets, model.editor, model.encoder, records, progress=not self.args.disable_tqdm
            )
        else:
            measured = measure_with_scope(model, records, progress=not self.args.disable_tqdm)
        model.train(was_training)
        summary = summarize(measured)
        title = "evaluation facts" if metric_key_prefix == "eval" else metric_key_prefix
        self._measured.setdefault(self._card_step, {})[title] = summary
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - start, 2)
        self.log(metrics)
        self._note_for_card()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_unedited(self, what: str) -> None:
        """Check that the model carries no edits: the editor belongs to the un-edited base."""
        if edits := self.editable_model.edits:
            raise ValueError(
                f"the model carries {len(edits)} edits, and {what} is about the base without any; undo them first"
            )

    def _check_texts(self, records: Sequence[EditRecord], questions: Sequence[tuple[str, str]] = ()) -> None:
        """Check all texts in advance; an invalid one would end the training when it is first drawn."""
        encoder, longest = self.editable_model.encoder, longest_input(self.editable_model.config)
        check_targets(records, encoder, longest)
        check_asked(self.editable_model, records, range(len(records)), ("generality", "neighborhood", "unrelated"))
        for number, record in enumerate(records):
            where = record.name(number)
            for i, text in enumerate(record.questions):
                check_query(Query(text, record.target), encoder, longest, where, f"questions[{i}]")
            for i, text in enumerate(record.same_subject):
                check_query(Query(text), encoder, longest, where, f"same_subject[{i}]")
        for number, pair in enumerate(questions):
            check_query(Query(*pair), encoder, longest, f"question {number}", "question", "answer")

    # ---- checkpoints ----

    @property
    def _card_step(self) -> int:
        return self.state.global_step if self._step_of_weights is None else self._step_of_weights

    def _note_for_card(self) -> None:
        """Set the model's card notes: the facts of this training, and the measurements of its present weights."""
        notes: CardNotes = self.editable_model.card_notes
        notes.measured = self._measured.get(self._card_step, {})
        if self.state.global_step:
            seconds = time.perf_counter() - self._started
            scoped = self.editable_model.scope is not None
            notes.training = training_facts(
                self.args, self._card_step, self._first_step, seconds, self.examples, scoped
            )
            notes.history = self.state.log_history

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the editor. All processes must call this, since it may be sharded; one of them writes."""
        state_dict = whole_state(self.editable_model.editor)
        if self.args.should_save:
            self._save(output_dir, state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._note_for_card()
        self.editable_model.save_pretrained(
            str(output_dir if output_dir is not None else self.args.output_dir), state_dict=state_dict
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
        self._first_step = TrainerState.load_from_json(str(state)).global_step if state.is_file() else 0
        self.editable_model.load_editor(find_files(resume_from_checkpoint, [WEIGHTS_NAME])[WEIGHTS_NAME])

    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        self._step_of_weights = self.state.best_global_step
        self.editable_model.load_editor(find_files(folder, [WEIGHTS_NAME])[WEIGHTS_NAME])


class _EpochCallback(TrainerCallback):
    """Set the epoch of the examples, which determines their draws."""

    def __init__(self, examples: TrainingExamples):
        self.examples = examples

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.examples.set_epoch(int(state.epoch or 0))


def _as_records(data: Any) -> list[EditRecord]:
    records = [data[i] for i in range(len(data))]
    for number, record in enumerate(records):
        if not isinstance(record, EditRecord):
            raise TypeError(
                f"item {number} of the data is a {type(record).__name__}, expected an EditRecord; read files with "
                "read_counterfact, or make EditRecord(prompt=..., target=..., paraphrases=[...])"
            )
    if not records:
        raise ValueError("the data set is empty; an editor needs facts to train and to measure on")
    return records
