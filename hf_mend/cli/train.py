"""`hf-mend train`: an editor for a model, from a file of facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, ModelOptions, Report, as_fields, check_file, with_options


@with_options
def train(
    facts: Annotated[Path, typer.Argument(help="Facts to train on; docs/data_format.md has the layouts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the editor.")],
    *,
    base: ModelOptions,
    eval_facts: Annotated[Path | None, typer.Option(help="Other facts, to measure the editor on at the end.")] = None,
    eval_limit: Annotated[int, typer.Option(min=1, help="Measure on so many of them.")] = 200,
    questions: Annotated[
        Path | None, typer.Option(help="Unrelated questions and answers (JSON lines): what must not change.")
    ] = None,
    start_from: Annotated[str | None, typer.Option(help="A trained editor to go on from: a folder or Hub id.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1400,
    batch_size: Annotated[int, typer.Option(min=1, help="Facts edited at once.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of the editor's networks.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the draws and the initial weights.")] = 0,
    method: Annotated[str, typer.Option(help="As EditorConfig.method.")] = "mend",
    target_modules: Annotated[
        str, typer.Option(help="Layers to edit: default, paper, a regular expression, or names with commas.")
    ] = "default",
    layers: Annotated[str | None, typer.Option(help="Indices of the blocks to edit, with commas.")] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the editor networks, for methods that have one. Default: theirs."),
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints (default: the output's name with -checkpoints).")
    ] = None,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="Any option of the method (hf-mend info METHOD lists them): name=value, in JSON; goes before an "
            "option. Repeatable."
        ),
    ] = None,
    training: Annotated[
        list[str] | None, typer.Option(help="Any field of EditorTrainingArguments, the same way.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="The editor's licence, for its card: apache-2.0, mit, ...")
    ] = None,
    as_json: AsJson = False,
) -> Report:
    """
    Trains an editor for a model and saves it with its card.

    \b
    Example:
      hf-mend train facts_train.json --base-model openai-community/gpt2 --output my-editor \\
          --eval-facts facts_test.json --questions questions.jsonl --steps 1400 \\
          --training neighborhood_weight=1.5 --training gradient_accumulation_steps=2
    """
    for path, content in ((facts, "facts"), (eval_facts, "facts"), (questions, "questions")):
        if path is not None:
            check_file(path, content)
    from transformers.trainer_utils import get_last_checkpoint, set_seed

    from ..config import EditorConfig
    from ..data.readers import read_edits, read_questions
    from ..training.arguments import EditorTrainingArguments
    from ..training.trainer import EditorTrainer

    # Whatever can be wrong in the files is found before a model is loaded.
    asked = read_questions(questions) if questions else []
    train_data = read_edits(facts)
    eval_data = list(read_edits(eval_facts, questions=asked))[:eval_limit] if eval_facts else None
    named = {
        "method": method,
        **({} if rank is None else {"rank": rank}),
        "target_modules": [name.strip() for name in target_modules.split(",")]
        if "," in target_modules
        else target_modules,
        "layers_to_transform": _indices(layers) if layers else None,
    }
    chosen = as_fields("--config", config, EditorConfig)
    if "r" in chosen:
        named.pop("rank", None)
    editor_config = EditorConfig(**{**named, **chosen})
    folder = checkpoints or output.with_name(output.name + "-checkpoints")
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    if resume and last is None:
        raise FileNotFoundError(f"--resume: {folder} holds no checkpoint; leave --resume out to begin anew")
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "logging_steps": max(1, min(25, steps // 4)),
        "save_steps": save_steps,
        "seed": seed,
        "report_to": [],
    }
    arguments = EditorTrainingArguments(**{**given, **as_fields("--training", training, EditorTrainingArguments)})
    set_seed(seed)
    model = base.load(start_from, config=editor_config)
    trainer = EditorTrainer(
        model,
        arguments,
        train_data,
        eval_data,
        asked,
    )
    trainer.train(resume_from_checkpoint=last)
    metrics = trainer.evaluate() if eval_data else {}
    model.save_pretrained(output, card_data={"license": license} if license else None)
    rows = [f"  {name.removeprefix('eval_'):16}  {value:.3f}" for name, value in metrics.items()]
    text = "\n".join([f"The editor is in {output}, after {trainer.state.global_step} steps.", *rows])
    return Report({"output": str(output), "steps": trainer.state.global_step, "metrics": metrics}, text)


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers is {text!r}, expected block indices with commas, such as 17,18,19") from None
