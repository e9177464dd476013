"""Training an editor: `transformers.Trainer` with the editing loss, editor-only checkpoints and editing metrics."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..bases.fingerprint import fingerprint_of
from ..bases.gradients import record_inputs, trace
from ..bases.limits import longest_input
from ..bases.sharded import whole_state
from ..bases.split import logits_of
from ..data.checks import check_query
from ..data.encoding import Query, Rows, batches
from ..data.forms import DEFAULT_FORMS, available_forms
from ..data.readers.reading import check_targets
from ..data.records import EditDataset, EditRecord
from ..edits.hook import applied
from ..evaluation.checks import check_asked
from ..evaluation.metrics import evaluate_records, summarize
from ..hub.cards import CardNotes, machine
from ..hub.files import WEIGHTS_NAME
from ..hub.transfer import find_files
from ..model import EditableModel
from .cache import HiddenStateCache
from .continuations import with_continuations
from .examples import LOCAL_KINDS, Asking, EditBatch, EditCollator, TrainingExamples
from .hub_checkpoints import PushesCheckpoints
from .losses import target_nll


logger = logging.get_logger(__name__)

_LOGARITHMS = ("log_step", "log_ridge")
# The least that the arguments which count something may be.
_LEAST = {
    "general_rows": 1,
    "neighborhood_rows": 0,
    "unrelated_rows": 0,
    "same_subject_rows": 0,
    "continuation_rows": 0,
    "continuation_tokens": 0,
    "edits_together": 1,
    "edits_at_once": 1,
    "calls_in_a_row": 1,
    "statistics_edits": 1,
}


@dataclass
class EditorTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with what the training of an editor adds. A batch is a number of different
    facts.
    """

    neighborhood_weight: float = field(
        default=1.5, metadata={"help": "Weight of the KL on neighbouring prompts against the target's likelihood."}
    )
    unrelated_weight: float = field(
        default=20.0,
        metadata={"help": "The same on unrelated questions, whose KL is far smaller and flips answers all the same."},
    )
    general_rows: int = field(default=1, metadata={"help": "Paraphrases an edit and step."})
    neighborhood_rows: int = field(default=1, metadata={"help": "Neighbouring prompts an edit and step."})
    unrelated_rows: int = field(default=1, metadata={"help": "Unrelated questions an edit and step."})
    same_subject_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL on prompts that ask the same subject for something else."}
    )
    same_subject_rows: int = field(default=1, metadata={"help": "Such prompts an edit and step."})
    continuation_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL on what follows the target, so that the model then stops."}
    )
    continuation_rows: int = field(default=1, metadata={"help": "Texts an edit and step for which that is asked."})
    continuation_tokens: int = field(
        default=8,
        metadata={
            "help": "How many tokens the un-edited model goes on with behind a target, greedily and before the first "
            "step. With 0 other text stands there in its place, which costs nothing."
        },
    )
    forms: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "Weights with which forms of asking are drawn: prompt, paraphrase, question, chat, later_turn, "
            "system. The default has all; a tokenizer without a chat template has no chats."
        },
    )
    context_rate: float = field(default=0.4, metadata={"help": "Share of the texts that stand behind other text."})
    edit_forms: dict[str, float] | None = field(
        default=None, metadata={"help": "The same for the texts that make the edits; the prompt alone by default."}
    )
    edits_together: int = field(
        default=1,
        metadata={
            "help": "Up to how many edits are applied at once: steps go in turn through 1, 2, 4 and so on up to it, "
            "so that edits learn to leave one another alone. Powers of two that divide the batch."
        },
    )
    edits_at_once: int | None = field(
        default=None,
        metadata={
            "help": "Most edits of a batch whose texts are in memory with their graph; the gradient comes in two "
            "stages then, so that a step can take thousands of edits."
        },
    )
    calls_in_a_row: int = field(
        default=1,
        metadata={
            "help": "Into how many calls a batch falls, each editing the model that those before it have left, so "
            "that the editor learns long sequences of edits. `edits_together` and `edits_at_once` do not count then."
        },
    )
    look_back: float = field(
        default=0.9,
        metadata={"help": "Weight of a call's texts in the loss of the next call, its square in that after it, ..."},
    )
    step_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the logarithms of each layer's edit step and ridge."}
    )
    statistics_edits: int = field(
        default=128,
        metadata={"help": "Facts whose factors and inputs set the editor's statistics before the first step."},
    )
    hidden_states_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the hidden states below the edited blocks are kept, so that training runs the "
            "blocks above alone. They are computed before the first step, or were by an earlier run."
        },
    )
    hidden_states_limit: float = field(default=20.0, metadata={"help": "Gigabytes that they may take."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the editor networks."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Facts edited at once on a device."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Records are not columns; leave this off."})

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value, may_be_none = getattr(self, name), name == "edits_at_once"
            if not (type(value) is int and value >= least or may_be_none and value is None):
                expected = f"a whole number of at least {least}" + (", or None" if may_be_none else "")
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        if not (isinstance(self.look_back, (int, float)) and 0 <= self.look_back <= 1):
            raise ValueError(f"look_back is {self.look_back!r}, expected a number from 0 to 1")
        super().__post_init__()


class EditorTrainer(PushesCheckpoints, Trainer):
    """
    Trains the editor of an [`EditableModel`]; the base model stays as it is. Logging, callbacks, mixed precision,
    gradient accumulation, checkpoints, best-model selection and early stopping are the parent's.

    `evaluate` reports `eval_edit_success`, `eval_generality`, `eval_neighborhood`, `eval_unrelated` and their mean
    `eval_score`, each over the edits of the evaluation data, made alone.

    Args:
        model ([`EditableModel`]): The model whose editor is trained; it has a tokenizer.
        args ([`EditorTrainingArguments`]): How to train.
        train_dataset (`Dataset` or list of [`EditRecord`], or [`TrainingExamples`]): The facts; or their draws, whose
            own settings then stand in for what the arguments say about rows and forms.
        eval_dataset (`Dataset` or list of [`EditRecord`], *optional*): Facts to measure on.
        questions (`Sequence[tuple[str, str]]`, *optional*): Unrelated questions and answers for the locality loss.
        kwargs: What else `Trainer` takes.
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
                _asking(args, model),
                args.same_subject_rows,
                args.continuation_rows,
            )
        kwargs.setdefault("data_collator", EditCollator(model.encoder, longest_input(model.config)))
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=None if eval_dataset is None else EditDataset(_as_records(eval_dataset)),
            **kwargs,
        )
        self.args: EditorTrainingArguments = args
        self.examples = examples
        self.can_return_loss = True
        self.model_accepts_loss_kwargs = False
        self.hidden_states: HiddenStateCache | None = None
        self._parts: dict[str, list[float]] = {}
        self._started = time.perf_counter()
        self._first_step = 0
        self._measured: dict[int, dict[str, dict[str, float]]] = {}  # by the step whose weights were measured
        self._step_of_weights: int | None = None  # another than the last step, after the best ones were loaded
        if examples is not None:
            self.add_callback(_EpochCallback(examples))

    # ---- training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        Trains, after setting the editor's statistics if it has none yet. Arguments are the parent's.

        Raises:
            ValueError: The model carries edits, or a text of the training or evaluation data is empty or too long for
                it; the message names it.
        """
        self._check_unedited("train")
        if self.examples is not None:
            self._check_texts(self.examples.records, self.examples.questions)
        if self.eval_dataset is not None:
            self._check_texts(_as_records(self.eval_dataset))
        if self.examples is not None and not self.model.editor.is_calibrated:
            calibrate(self.model, self.examples, self.args.statistics_edits, self.args.per_device_train_batch_size)
        if self.examples is not None and self.examples.continuation_rows and self.args.continuation_tokens:
            self._continue_texts(self.examples)
        if self.examples is not None and self.args.hidden_states_dir:
            with self.args.main_process_first(local=False):
                cache = HiddenStateCache(self.model.split, self.args.hidden_states_dir, self.args.hidden_states_limit)
                if self.args.process_index == 0:
                    # An epoch draws about half of a record's texts; no other is computed.
                    encoder, longest = self.model.encoder, longest_input(self.model.config)
                    drawn = self.examples.queries(self._epochs(len(self.examples)))
                    queries = (encoder.shortened(query, longest) for query in drawn)
                    cache.fill(encoder, queries, progress=not self.args.disable_tqdm)
            self.hidden_states = cache
        if self.model.editor_config.base_fingerprint is None:  # later its weights may be shared out over processes
            self.model.editor_config.base_fingerprint = fingerprint_of(self.model.base_model, self.model.targets)
        self._started = time.perf_counter()
        self._step_of_weights, self._first_step = None, 0
        self._measured.clear()
        output = super().train(*args, **kwargs)
        self._note_for_card()
        return output

    def _continue_texts(self, examples: TrainingExamples) -> None:
        """Each process needs all of what the base goes on with; the first computes it, the others read it."""
        file = Path(str(self.args.output_dir)) / "continuations.jsonl"
        with self.args.main_process_first(local=False):
            with_continuations(
                examples,
                self.model,
                self._epochs(len(examples)),
                self.args.continuation_tokens,
                file=file,
                progress=not self.args.disable_tqdm,
            )

    def _epochs(self, facts: int) -> int:
        """How many epochs the training goes through, the last one maybe not to its end."""
        if self.args.max_steps <= 0:
            return math.ceil(self.args.num_train_epochs)
        each = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(self.args.max_steps * each / facts)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The editing loss of a batch of different facts."""
        weights = {kind: getattr(self.args, f"{kind}_weight") for kind in LOCAL_KINDS}
        doublings = max(1, self.args.edits_together).bit_length()
        result = model(
            edit_batch=inputs,
            locality_weights=weights,
            run_below=self.hidden_states,
            edits_together=2 ** (self.state.global_step % doublings),
            edits_at_once=self.args.edits_at_once,
            calls_in_a_row=self.args.calls_in_a_row,
            look_back=self.args.look_back,
        )
        for name, value in {"edit": result.edit, **result.locality}.items():
            self._parts.setdefault(f"loss_{name}", []).append(float(value.detach()))
        return (result.loss, result) if return_outputs else result.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the parts of the loss beside it."""
        if "loss" in logs:
            for name, values in self._parts.items():
                if values:
                    logs[name] = sum(values) / len(values)
                    values.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam with its own learning rate for the edit steps; an optimizer given to the trainer goes first."""
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
        """Not counted: an edit's cost depends on where its lowest layer is."""
        return 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The next batches; the parent would look for labels in them, to count items that this loss does not need."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device) if isinstance(inputs, EditBatch) else super()._prepare_inputs(inputs)

    # ---- measuring ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Edits each record of the evaluation data alone and measures it.

        Returns:
            `dict[str, float]`: See [`~hf_mend.evaluation.metrics.summarize`]; keys carry the prefix.

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
        model: EditableModel = self.model
        was_training = model.training
        model.eval()
        measured = evaluate_records(
            model.split, model.targets, model.editor, model.encoder, records, progress=not self.args.disable_tqdm
        )
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
        """The base with edits in it is another base than the one whose editor this is."""
        if self.model.edits:
            raise ValueError(
                f"the model carries {len(self.model.edits)} edits, and {what} is about the base without any; undo "
                "them first"
            )

    def _check_texts(self, records: Sequence[EditRecord], questions: Sequence[tuple[str, str]] = ()) -> None:
        """A text that the model cannot read would end the training wherever it is first drawn."""
        encoder, longest = self.model.encoder, longest_input(self.model.config)
        check_targets(records, encoder, longest)
        check_asked(self.model, records, range(len(records)), ("generality", "neighborhood", "unrelated"))
        for number, pair in enumerate(questions):
            check_query(Query(*pair), encoder, longest, f"question {number}", "question", "answer")

    # ---- checkpoints ----

    @property
    def _card_step(self) -> int:
        return self.state.global_step if self._step_of_weights is None else self._step_of_weights

    def _note_for_card(self) -> None:
        """Hands the model what its card says of this training, and what was measured with these weights."""
        notes: CardNotes = self.model.card_notes
        notes.measured = self._measured.get(self._card_step, {})
        if self.state.global_step:
            seconds = time.perf_counter() - self._started
            notes.training = training_facts(self.args, self._card_step, self._first_step, seconds, self.examples)
            notes.history = self.state.log_history

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the editor. All processes have to call this: they may share the editor out, and one of them writes."""
        state_dict = whole_state(self.model.editor)
        if self.args.should_save:
            self._save(output_dir, state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._note_for_card()
        self.model.save_pretrained(
            output_dir if output_dir is not None else self.args.output_dir, state_dict=state_dict
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
        self._first_step = TrainerState.load_from_json(str(state)).global_step if state.is_file() else 0
        self.model.load_editor(find_files(resume_from_checkpoint, [WEIGHTS_NAME])[WEIGHTS_NAME])

    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        self._step_of_weights = self.state.best_global_step
        self.model.load_editor(find_files(folder, [WEIGHTS_NAME])[WEIGHTS_NAME])


class _EpochCallback(TrainerCallback):
    """Tells the examples which epoch's draws to make."""

    def __init__(self, examples: TrainingExamples):
        self.examples = examples

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.examples.set_epoch(int(state.epoch or 0))


def training_facts(
    args: EditorTrainingArguments, step: int, first_step: int, seconds: float, examples: TrainingExamples | None
) -> dict[str, str]:
    """
    What a card says of a training.

    Args:
        args ([`EditorTrainingArguments`]): Its arguments.
        step (`int`): The step whose weights the editor has.
        first_step (`int`): The step that this process began from.
        seconds (`float`): What it has taken.
        examples ([`TrainingExamples`], *optional*): Its facts.
    """
    began = f", from step {first_step} on" if first_step else ""
    return {
        "facts": f"{len(examples):,}" if examples is not None else "unknown",
        "unrelated questions": f"{len(examples.questions):,}" if examples is not None else "unknown",
        "steps": str(step),
        "facts a step": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
        "learning rate": f"{args.learning_rate:g}, {_plain(args.lr_scheduler_type)}",
        "optimizer": _plain(args.optim),
        "neighborhood and unrelated weight": f"{args.neighborhood_weight:g}, {args.unrelated_weight:g}",
        "edits applied at once": f"up to {args.edits_together}",
        "seed": str(args.seed),
        "time": f"{seconds / 60:.1f} minutes{began}",
        "hardware": machine(args.device) + (f", {args.world_size} processes" if args.world_size > 1 else ""),
    }


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def calibrate(model: EditableModel, examples: TrainingExamples, edits: int = 128, batch_size: int = 8) -> None:
    """
    Sets an untrained editor's statistics from some training examples, and its first step to the power of two that
    lowers the targets' negative log-likelihood most, halved.

    Args:
        model ([`EditableModel`]): The model.
        examples ([`TrainingExamples`]): Where texts are taken, spread evenly.
        edits (`int`, defaults to 128): Number of examples.
        batch_size (`int`, defaults to 8): Examples at once; changes nothing but rounding.
    """
    collate = EditCollator(model.encoder)
    wanted = min(len(examples), edits)
    order = [i * len(examples) // wanted for i in range(wanted)]
    editor = model.editor
    for chunk in tqdm(list(batches(order, batch_size)), desc="Statistics of the factors"):
        batch = collate([examples[i] for i in chunk]).to(model.device)
        with applied(model.targets, editor.carried()):
            factors, _ = trace(model.split, model.targets, batch.edit.inputs, batch.edit.next_tokens)
        editor.observe_factors(factors)
        for rows in (batch.edit, *batch.local.values()):
            editor.observe_inputs(record_inputs(model.split, model.targets, rows))
    editor.finish_observing()
    first = [collate([examples[i] for i in chunk]).edit for chunk in batches(order[:16], batch_size)]
    editor.scale_steps(_best_first_step(model, first))


def _best_first_step(model: EditableModel, edits: Sequence[Rows]) -> float:
    losses = dict.fromkeys((2.0**power for power in range(-14, 9)), 0.0)
    for rows in edits:
        rows = rows.to(model.device)
        state = model.split.run_below(rows.inputs)
        carried = model.editor.carried()
        with applied(model.targets, carried):
            factors, _ = trace(model.split, model.targets, rows.inputs, rows.next_tokens, state)
        with torch.no_grad():
            updates = model.editor.join(model.editor(factors))
            for factor in losses:
                with applied(model.targets, carried, {name: (u, v * factor) for name, (u, v) in updates.items()}):
                    losses[factor] += float(target_nll(logits_of(model.split, rows, state), rows)) * len(rows)
    finite = {factor: loss for factor, loss in losses.items() if loss == loss}
    return min(finite, key=lambda factor: finite[factor]) / 2 if finite else 1.0


def _asking(args: EditorTrainingArguments, model: EditableModel) -> Asking:
    """The forms of asking that the arguments choose, as far as the model's tokenizer can write them."""
    tokenizer = model.encoder.tokenizer
    forms = available_forms(DEFAULT_FORMS if args.forms is None else args.forms, tokenizer)
    edit_forms = None if args.edit_forms is None else available_forms(args.edit_forms, tokenizer)
    return Asking(forms, args.context_rate, edit_forms)


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
