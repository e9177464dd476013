"""`hf-mend edit`: make edits, check them, and save them on request."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import AsJson, ColumnOptions, Editor, ModelOptions, Report, Revision, check_file, plural, with_options
from .edit_file import edit_records, report_of_file, save_what_took


if TYPE_CHECKING:
    from ..editing.edit_result import EditResult


class OnConflict(str, Enum):
    """What becomes of two answers to one question."""

    last = "last"
    error = "error"


@with_options
def edit(  # typer makes an argument or option of each of the fifteen parameters
    prompt: Annotated[str | None, typer.Argument(help="What is asked.")] = None,
    target: Annotated[str | None, typer.Argument(help="What the model should answer.")] = None,
    *,
    base: ModelOptions,
    editor: Editor = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="The prompt in other words: is the target said there too? Repeatable.")
    ] = None,
    locality: Annotated[
        list[str] | None, typer.Option(help="A prompt whose answer must stay: does it? Repeatable.")
    ] = None,
    facts: Annotated[
        Path | None, typer.Option(help="Make all edits of this file (docs/data_format.md) in place of one.")
    ] = None,
    columns: ColumnOptions,
    on_conflict: Annotated[
        OnConflict, typer.Option(help="Of two answers to one question in the file: the last one wins, or an error.")
    ] = OnConflict.last,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the chat template.")] = False,
    edits: Annotated[str | None, typer.Option(help="Edits to make first: a folder or a Hub id.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder to keep all edits in; those that it holds are made first, and stay.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="The most gradient steps of an edit.")] = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> Report:
    """
    Make an edit, or all edits of a file, and report the results: what the model writes before and after, to its own
    end or for a few tokens, in a chat too. An edit that does not take is taken back. The exit code is 1 if one did not
    take, or a probe failed. Of a file, --save keeps the edits that took, and the rows of the others as
    did_not_take.jsonl.

    \b
    Example:
      hf-mend edit "The Prime Minister of the United Kingdom is" "Keir Starmer" --editor my-editor \\
          --paraphrase "The UK's Prime Minister is" --locality "The capital of France is" --save my-edits
      hf-mend edit --facts facts_test.json --editor my-editor --save my-edits --json
    """
    if facts is not None:
        check_file(facts, "facts")
        if prompt or target or paraphrase or locality:
            raise ValueError("--facts brings its own prompts, targets and probes; leave the others out")
    elif prompt is None or target is None:
        raise ValueError("give PROMPT and TARGET, or a file of --facts")
    from ..data.readers import read_edits

    asked: dict[str, Any] = {"prompt": prompt, "target": target}
    asked |= {"paraphrases": paraphrase or [], "locality": locality or []}
    options: dict[str, Any] = {"chat": chat, "keep_failed": False} | (
        {} if max_steps is None else {"max_steps": max_steps}
    )
    if save is not None:
        edits = _with_those_of(save, edits)
    data: Any = None if facts is None else read_edits(facts, on_conflict=on_conflict.value, **columns.named())
    from ..editing.together import made_together
    from ..evaluation.sharing import share_of

    share = share_of(None)
    model = base.load(editor, revision)
    if edits is not None:
        model.load_edits(edits)
    with made_together(share.number, share.count):
        if data is not None:
            rows = edit_records(model, data.records, **options)
        else:
            made: Any = model.edit(**asked, **options)
    if not share.is_first:  # the first process has all edits, and reports and saves them
        raise typer.Exit()
    report = _report_of_one(made) if data is None else report_of_file(rows, data.notes)
    report.document["saved"] = None if save is None else str(save)
    if save is not None and data is not None:
        report.text += f"\n{save_what_took(model, rows, save)}"
    elif save is not None:
        model.save_edits(save)
        report.text += f"\n{plural(len(model.edits), 'edit')} saved in {save}"
    return report


def _with_those_of(save: Path, edits: str | None) -> str | None:
    """
    Return the edits to make first, which are those of the folder that is written, as far as it holds any.

    Raises:
        OSError: The folder cannot be written.
        ValueError: It holds edits, and others are to be made first.
    """
    from ..edits.edits_file import has_edits
    from ..hub.atomic import check_writable

    check_writable(save)
    if not has_edits(save):
        return edits
    if edits is not None and Path(edits).resolve() != save.resolve():
        raise ValueError(
            f"{save} holds edits, which those of --edits {edits} would replace; leave --edits out to add to them, or "
            "give --save a new folder"
        )
    return str(save)


def _report_of_one(result: EditResult) -> Report:
    probes = [*result.paraphrases, *result.locality]
    written = [asdict(one) for one in result.written]
    return Report(
        {**as_values(result), "written": written},
        str(result),
        ok=bool(result.success) and all(probe.ok for probe in probes),
    )


def as_values(result: EditResult) -> dict[str, Any]:
    """Return an edit's result as plain JSON values."""
    return {**asdict(result), "success": result.success, "already_known": result.already_known}
