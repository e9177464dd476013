"""The arguments of an editor's training, and what a card says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..data.deprecation import renamed_arguments
from ..data.forms import DEFAULT_FORMS, available_forms, check_forms
from ..hub.cards import machine
from .examples import Asking, TrainingExamples


# The smallest values of the arguments that are counts.
_LEAST = {
    "general_rows": 1,
    "neighborhood_rows": 0,
    "unrelated_rows": 0,
    "same_subject_rows": 0,
    "continuation_rows": 0,
    "continuation_tokens": 0,
    "group_size": 1,
    "micro_batch_size": 1,
    "calls_per_batch": 1,
    "statistics_edits": 1,
    "scope_steps": 0,
    "scope_further_facts": 0,
}

_MAY_BE_NONE = ("micro_batch_size", "continuation_tokens")

# Schedulers that wait for the metric of the best model to get better, and take it for a loss.
_FOLLOWS_METRIC = ("reduce_lr_on_plateau", "greedy")


@renamed_arguments(
    edits_together="group_size",
    edits_at_once="micro_batch_size",
    calls_in_a_row="calls_per_batch",
    look_back="decay",
)
@dataclass
class EditorTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the options of an editor's training. A batch consists of different facts.

    The best checkpoint is that of the highest `eval_score`, unless `metric_for_best_model` names another metric; an
    evaluation has no loss.
    """

    neighborhood_weight: float = field(
        default=1.5, metadata={"help": "Weight of the KL on neighbouring prompts relative to the edit loss."}
    )
    unrelated_weight: float = field(
        default=20.0,
        metadata={
            "help": "Weight of the KL on unrelated questions, which is far smaller and changes answers all the same."
        },
    )
    general_rows: int = field(default=1, metadata={"help": "Paraphrases per edit and step."})
    neighborhood_rows: int = field(default=1, metadata={"help": "Neighbouring prompts per edit and step."})
    unrelated_rows: int = field(default=1, metadata={"help": "Unrelated questions per edit and step."})
    same_subject_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL on prompts that ask the same subject for something else."}
    )
    same_subject_rows: int = field(default=1, metadata={"help": "Such prompts per edit and step."})
    continuation_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL on what follows the target, so that the model then stops."}
    )
    continuation_rows: int = field(default=1, metadata={"help": "Texts per edit and step for which that is asked."})
    continuation_tokens: int | None = field(
        default=None,
        metadata={
            "help": "How many tokens the un-edited model goes on with behind a target, greedily and before the first "
            "step. With 0 other text stands there in its place, which costs nothing: the default with a scope, where "
            "an edit no longer acts there. Without a scope the default is 8."
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
    group_size: int = field(
        default=1,
        metadata={
            "help": "The largest number of edits that are applied together: steps go in turn through 1, 2, 4 and so "
            "on up to it, so that edits learn to leave one another alone. A power of two that divides the batch."
        },
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "The largest number of edits of a batch whose texts are in memory with their graph; the gradient "
            "is computed in two stages then, so that a step can take thousands of edits."
        },
    )
    calls_per_batch: int = field(
        default=1,
        metadata={
            "help": "The number of calls into which a batch is divided, each of which edits the model that those "
            "before it have left, so that the editor learns long sequences of edits. `group_size` and "
            "`micro_batch_size` are not used then."
        },
    )
    decay: float = field(
        default=0.9,
        metadata={
            "help": "Weight of a call's texts in the loss of the next call, and its square in that of the call after."
        },
    )
    step_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the logarithms of each layer's edit step and ridge."}
    )
    statistics_edits: int = field(
        default=128,
        metadata={"help": "Facts whose factors and inputs set the editor's statistics before the first step."},
    )
    scope_steps: int = field(
        default=800,
        metadata={
            "help": "Steps of the scope's training, which follows the editor's where the model has a scope. With 0 "
            "the scope stays as it is. Evaluations before that measure with the scope as it is then."
        },
    )
    scope_further_facts: int = field(
        default=2000, metadata={"help": "Facts of further kinds, made by rule, on which the scope is trained too."}
    )
    hidden_states_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the cached hidden states below the edited blocks, so that training runs only the "
            "blocks above. Missing states are computed before the first step."
        },
    )
    hidden_states_limit: float = field(default=20.0, metadata={"help": "The largest size of the cache in gigabytes."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the editor networks."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm to which gradients are clipped."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Number of facts per batch and device."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Records are not columns; leave this off."})

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value, may_be_none = getattr(self, name), name in _MAY_BE_NONE
            if not (type(value) is int and value >= least or may_be_none and value is None):
                expected = f"a whole number of at least {least}" + (", or None" if may_be_none else "")
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        if not (isinstance(self.decay, (int, float)) and 0 <= self.decay <= 1):
            raise ValueError(f"decay is {self.decay!r}, expected a number from 0 to 1")
        for name in ("forms", "edit_forms"):
            if getattr(self, name) is not None:
                check_forms(getattr(self, name), name)
        if not (isinstance(self.context_rate, (int, float)) and 0 <= self.context_rate <= 1):
            raise ValueError(f"context_rate is {self.context_rate!r}, expected a number from 0 to 1")
        if self.metric_for_best_model is None:  # the parent's default is the loss
            self.metric_for_best_model = "eval_score"
        if self.metric_for_best_model.removeprefix("eval_") == "loss":
            raise ValueError(
                f"metric_for_best_model is {self.metric_for_best_model!r}, and the evaluation of an editor has no "
                "loss; leave it out for eval_score, or name another of its metrics, such as eval_edit_success"
            )
        super().__post_init__()
        if str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) in _FOLLOWS_METRIC:
            given: Any = self.lr_scheduler_kwargs or {}  # the parent has read it, if it was JSON
            self.lr_scheduler_kwargs = {"mode": "max" if self.greater_is_better else "min", **given}


def asking_of(args: EditorTrainingArguments, tokenizer: Any) -> Asking:
    """
    Return the forms of asking that the arguments choose, as far as a tokenizer can write them.

    Args:
        args ([`EditorTrainingArguments`]): The training arguments.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
    """
    forms = available_forms(DEFAULT_FORMS if args.forms is None else args.forms, tokenizer)
    edit_forms = None if args.edit_forms is None else available_forms(args.edit_forms, tokenizer)
    return Asking(forms, args.context_rate, edit_forms)


def training_facts(
    args: EditorTrainingArguments,
    step: int,
    first_step: int,
    seconds: float,
    examples: TrainingExamples | None,
    scoped: bool = False,
) -> dict[str, str]:
    """
    Return the facts about a training for the model card.

    Args:
        args ([`EditorTrainingArguments`]): The training arguments.
        step (`int`): The step of the editor's weights.
        first_step (`int`): The step at which this process began.
        seconds (`float`): The duration of the training.
        examples ([`TrainingExamples`], *optional*): The training examples.
        scoped (`bool`, defaults to `False`): Whether the model has a scope.
    """
    began = f", from step {first_step} on" if first_step else ""
    weights = f"{args.neighborhood_weight:g}, {args.unrelated_weight:g}"
    # With a scope no text that must stay is drawn for the editor.
    own = {"steps of the scope": str(args.scope_steps)} if scoped else {"neighbourhood and unrelated weight": weights}
    return {
        "facts": f"{len(examples):,}" if examples is not None else "unknown",
        "unrelated questions": f"{len(examples.questions):,}" if examples is not None else "unknown",
        "steps": str(step),
        "facts a step": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
        "learning rate": f"{args.learning_rate:g}, {_plain(args.lr_scheduler_type)}",
        "optimizer": _plain(args.optim),
        **own,
        "edits applied at once": f"up to {args.group_size}",
        "seed": str(args.seed),
        "time": f"{seconds / 60:.1f} minutes{began}",
        "hardware": machine(args.device) + (f", {args.world_size} processes" if args.world_size > 1 else ""),
    }


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
