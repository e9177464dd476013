"""`hf-mend train`: train an editor for a model from a file of facts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.atomic import check_writable
from .common import AsJson, ColumnOptions, ModelOptions, Options, Report, as_fields, check_file, with_options


if TYPE_CHECKING:
    from ..config import EditorConfig
    from ..data.records import EditRecord
    from ..training.arguments import EditorTrainingArguments


@dataclass
class DataOptions(ColumnOptions):
    """The options that choose evaluation facts and questions."""

    eval_facts: Annotated[Path | None, typer.Option(help="Other facts, to measure the editor on at the end.")] = None
    eval_limit: Annotated[int, typer.Option(min=1, help="Measure on so many of them.")] = 200
    questions: Annotated[
        Path | None, typer.Option(help="Unrelated questions and answers (JSON lines): what must not change.")
    ] = None

    def read(self, facts: Path) -> tuple[Sequence[EditRecord], list[EditRecord] | None, Sequence[tuple[str, str]]]:
        """Return the training facts, the evaluation facts and the questions."""
        for path, content in ((facts, "facts"), (self.eval_facts, "facts"), (self.questions, "questions")):
            check_file(path, content)
        from ..data.readers import read_edits, read_questions

        asked = read_questions(self.questions) if self.questions else []
        train_data: Any = read_edits(facts, **self.named())
        if self.eval_facts is None:
            return train_data, None, asked
        others = read_edits(self.eval_facts, questions=asked, **self.named())
        return train_data, list(others)[: self.eval_limit], asked


@dataclass
class EditorOptions(Options):
    """The options that determine the editor to train."""

    start_from: Annotated[str | None, typer.Option(help="A trained editor to go on from: a folder or Hub id.")] = None
    method: Annotated[str, typer.Option(help="As EditorConfig.method.")] = "mend"
    target_modules: Annotated[
        str,
        typer.Option(
            help="Layers to edit: default, paper, all-linear, a name such as o_proj, names with commas, or a regular "
            "expression."
        ),
    ] = "default"
    layers: Annotated[str | None, typer.Option(help="Indices of the blocks to edit, with commas.")] = None
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the editor networks, for methods that have one. Default: theirs."),
    ] = None
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="Any option of the method (hf-mend info METHOD lists them): name=value, in JSON; goes before an "
            "option. Repeatable."
        ),
    ] = None

    scope: Annotated[
        bool | None,
        typer.Option(
            "--scope/--no-scope",
            help="Whether edits act only where a text asks for them, which is learned behind the editor. The default "
            "for mend, malmen and ke; a trained editor that is gone on from keeps what it has.",
            show_default=False,
        ),
    ] = None

    def as_config(self) -> EditorConfig:
        """Return the configuration of a new editor."""
        from ..config import EditorConfig, config_class

        if self.start_from is not None and self.scope is not None:
            raise ValueError("--scope and --no-scope are for a new editor, and --start-from takes one as it was saved")
        modules, chosen = self.target_modules, as_fields("--config", self.config, EditorConfig)
        method = chosen.get("method", self.method)
        named: dict[str, Any] = {
            "method": method,
            "target_modules": _modules(modules),
            "layers_to_transform": _indices(self.layers) if self.layers else None,
            "scope": config_class(method).trained_with_scope if self.scope is None else self.scope,
        }
        if self.rank is not None and "r" not in chosen:
            named["rank"] = self.rank
        return EditorConfig(**{**named, **chosen})


@dataclass
class TrainingOptions(Options):
    """The options of the training and its checkpoints."""

    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1400
    batch_size: Annotated[int, typer.Option(min=1, help="Facts edited at once.")] = 16
    learning_rate: Annotated[float, typer.Option(help="Of the editor's networks.")] = 1e-3
    scope_steps: Annotated[int, typer.Option(min=1, help="Training steps of the scope, if there is one.")] = 800
    seed: Annotated[int, typer.Option(help="Of the draws and the initial weights.")] = 0
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints (default: the output's name with -checkpoints).")
    ] = None
    save_steps: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 100
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False
    training: Annotated[list[str] | None, typer.Option(help="Any field of EditorTrainingArguments, the same way.")] = (
        None
    )

    def checkpoint(self, folder: Path) -> str | None:
        """Return the checkpoint in the folder to resume from, or `None`."""
        from ..training.soundness import last_whole_checkpoint

        last = last_whole_checkpoint(folder) if self.resume else None
        if self.resume and last is None:
            raise FileNotFoundError(f"--resume: {folder} holds no checkpoint; leave --resume out to begin anew")
        return last

    def as_arguments(self, folder: Path) -> EditorTrainingArguments:
        """Return the training arguments, with checkpoints in the folder."""
        from ..training.arguments import EditorTrainingArguments

        given: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "scope_steps": self.scope_steps,
            "lr_scheduler_type": "linear",
            "logging_steps": max(1, min(25, self.steps // 4)),
            "save_steps": self.save_steps,
            "seed": self.seed,
            "report_to": [],
        }
        return EditorTrainingArguments(**{**given, **as_fields("--training", self.training, EditorTrainingArguments)})


@with_options
def train(
    facts: Annotated[Path, typer.Argument(help="Facts to train on; docs/data_format.md has the layouts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the editor.")],
    *,
    base: ModelOptions,
    data: DataOptions,
    editor: EditorOptions,
    run: TrainingOptions,
    license: Annotated[
        str | None, typer.Option(help="The editor's licence, for its card: apache-2.0, mit, ...")
    ] = None,
    as_json: AsJson = False,
) -> Report:
    """
    Train an editor for a model, and the scope that says where its edits act, and save both with a card.

    \b
    Example:
      hf-mend train facts_train.json --base-model openai-community/gpt2 --output my-editor \\
          --eval-facts facts_test.json --questions questions.jsonl --steps 1400 \\
          --training neighborhood_weight=1.5 --training gradient_accumulation_steps=2
    """
    # Errors in files and options are found before a model is loaded.
    train_data, eval_data, questions = data.read(facts)
    config = editor.as_config()
    folder = run.checkpoints or output.with_name(output.name + "-checkpoints")
    check_writable(output)
    check_writable(folder)
    last, arguments = run.checkpoint(folder), run.as_arguments(folder)
    from transformers.trainer_utils import set_seed

    from ..training.estimate import EstimatesTime
    from ..training.trainer import EditorTrainer

    set_seed(run.seed)
    model = base.load(editor.start_from, config=config)
    trainer = EditorTrainer(model, arguments, train_data, eval_data, questions)
    trainer.add_callback(EstimatesTime())
    trainer.train(resume_from_checkpoint=last)
    metrics = trainer.evaluate() if eval_data else {}
    writes = trainer.is_world_process_zero()
    model.save_pretrained(output, card_data={"license": license} if license else None, is_main_process=writes)
    if not writes:  # of several processes, one reports
        raise typer.Exit()
    rows = [f"  {name.removeprefix('eval_'):16}  {value:.3f}" for name, value in metrics.items()]
    text = "\n".join([f"The editor is in {output}, after {trainer.state.global_step} steps.", *rows])
    return Report({"output": str(output), "steps": trainer.state.global_step, "metrics": metrics}, text)


def _modules(text: str) -> str | list[str]:
    """Return names, one or more, as a list, and a choice or a regular expression as it is."""
    if text in ("default", "paper", "all-linear"):
        return text
    names = [name.strip() for name in text.split(",")]
    # A dot alone is one between the parts of a name.
    return names if all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers is {text!r}, expected block indices with commas, such as 17,18,19") from None
