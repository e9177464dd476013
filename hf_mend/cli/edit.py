"""`hf-mend edit`: one edit, checked, and kept if asked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    AsJson,
    BaseModel,
    DeviceMap,
    Dtype,
    Editor,
    Quantization,
    Report,
    Revision,
    TrustRemoteCode,
)


if TYPE_CHECKING:
    from ..requests import EditResult


def edit(
    prompt: Annotated[str, typer.Argument(help="What is asked.")],
    target: Annotated[str, typer.Argument(help="What the model should answer.")],
    base_model: BaseModel = None,
    editor: Editor = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="The prompt in other words: is the target said there too? Repeatable.")
    ] = None,
    locality: Annotated[
        list[str] | None, typer.Option(help="A prompt whose answer must stay: does it? Repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the chat template.")] = False,
    edits: Annotated[str | None, typer.Option(help="Edits to make first: a folder or a Hub id.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder to keep all edits in.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="The most gradient steps of an edit.")] = None,
    revision: Revision = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> Report:
    """
    Makes one edit and says what came of it. Exit code 1: the edit did not take, or a probe is not as it should be.

    \b
    Example:
      hf-mend edit "The Prime Minister of the United Kingdom is" "Keir Starmer" --editor my-editor \\
          --paraphrase "The UK's Prime Minister is" --locality "The capital of France is" --save my-edits
    """
    from ..loading import load_model

    model = load_model(
        editor,
        base_model,
        revision=revision,
        device_map=device_map,
        dtype=dtype,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    if edits is not None:
        model.load_edits(edits)
    options: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
    result = model.edit(prompt, target, chat=chat, paraphrases=paraphrase or [], locality=locality or [], **options)
    assert not isinstance(result, list)
    text = str(result)
    if save is not None:
        model.save_edits(save)
        text += f"\n  saved with {len(model.edits) - 1} earlier ones in {save}"
    probes = [*result.paraphrases, *result.locality]
    document = {**as_values(result), "saved": None if save is None else str(save)}
    return Report(document, text, ok=bool(result.success) and all(probe.ok for probe in probes))


def as_values(result: EditResult) -> dict[str, Any]:
    """An edit's result as plain JSON values."""
    return {**asdict(result), "success": result.success, "already_known": result.already_known}
