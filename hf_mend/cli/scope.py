"""`hf-mend scope`: train a scope for a model that has no editor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..hub.atomic import check_writable
from .common import AsJson, ModelOptions, Report, with_options


@with_options
def scope(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the method and its scope.")],
    *,
    base: ModelOptions,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a round.")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, whose weights are averaged.")] = 2,
    packaged_facts: Annotated[int, typer.Option(min=1, help="So many facts, made by rule, to learn from.")] = 4000,
    bf16: Annotated[bool, typer.Option("--bf16/--no-bf16", help="Read the model's hidden states in bfloat16.")] = True,
    seed: Annotated[int, typer.Option(help="Of the draws and the initial weights.")] = 0,
    as_json: AsJson = False,
) -> Report:
    """
    Train a scope for a model that has no editor, without any facts of yours: edits of the method that needs no
    training then act only where a text asks for them. Interrupted, the same command goes on.

    \b
    Example:
      hf-mend scope --base-model openai-community/gpt2 --output my-scope
      hf-mend edit "The capital of France is" "Lyon" --editor my-scope --base-model openai-community/gpt2
    """
    check_writable(output)
    from ..methods import training_free_config
    from ..training.scope_training import ScopeTrainingArguments, train_scope

    model = base.load(config=training_free_config(scope=True))
    options = ScopeTrainingArguments(
        steps, further_facts=packaged_facts, seed=seed, bf16=bf16, rounds=rounds, checkpoint=f"{output}-checkpoint.pt"
    )
    found = train_scope(model, args=options)
    model.save_pretrained(output)
    made, threshold = rounds * steps, found["threshold"]
    text = f"The scope is in {output}, after {made} steps. Edits act from a score of {threshold:.2f} on."
    return Report({"output": str(output), "steps": made, "threshold": threshold}, text)
