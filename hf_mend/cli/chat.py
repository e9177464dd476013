"""`hf-mend chat`: ask, edit and undo interactively, with the answers before and after side by side."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.display import shown
from .common import AsJson, Editor, ModelOptions, Report, Revision, one_line, real_stdout, with_options


if TYPE_CHECKING:
    from ..model import EditableModel

HELP = """\
Write a prompt to see the answer of the un-edited and of the edited model. Commands:
  /edit PROMPT => TARGET   make the model answer TARGET to PROMPT
  /undo [ID]               take back an edit, the last one by default
  /list                    the edits
  /save FOLDER             write the edits
  /load FOLDER             add saved edits
  /help                    this text
  /quit                    leave (or end of input)"""


@with_options
def chat(
    *,
    base: ModelOptions,
    editor: Editor = None,
    edits: Annotated[str | None, typer.Option(help="Edits to begin with: a folder or a Hub id.")] = None,
    template: Annotated[bool, typer.Option("--chat", help="Prompts are a user's turns in the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut off.")] = 24,
    revision: Revision = None,
    as_json: AsJson = False,
) -> Report:
    """
    Try edits interactively, with the answers before and after side by side. Commands may come from a pipe too.

    \b
    Example:
      hf-mend chat --base-model openai-community/gpt2
      printf '/edit The capital of France is => Lyon\\nThe capital of France is\\n' | hf-mend chat --editor my-editor
    """
    model = base.load(editor, revision)
    if edits is not None:
        model.load_edits(edits)
    session = Session(model, template, max_new_tokens)
    turns, by_hand, stdout = [], sys.stdin.isatty(), real_stdout()
    if by_hand and not as_json:
        typer.echo(HELP, file=stdout)
    for line in _lines(by_hand and not as_json, stdout):
        turn = session.take(line)
        if turn is None:
            break
        turns.append(turn)
        if not as_json:
            typer.echo(turn.text, file=stdout)
    ok = by_hand or all(turn.ok for turn in turns)
    return Report({"turns": [{**turn.document, "ok": turn.ok} for turn in turns]}, "", ok)


@dataclass
class Turn:
    """The result of one line: the output with and without `--json`, and whether the line succeeded."""

    document: dict[str, Any]
    text: str
    ok: bool = True


class Session:
    """
    A conversation with one model, apart from input and output.

    Args:
        model ([`EditableModel`]): The model.
        chat (`bool`, defaults to `False`): Treat prompts as a user's turns in the chat template.
        max_new_tokens (`int`, defaults to 24): The most tokens of an answer.
    """

    def __init__(self, model: EditableModel, chat: bool = False, max_new_tokens: int = 24):
        self.model = model
        self.chat = chat
        self.max_new_tokens = max_new_tokens

    def take(self, line: str) -> Turn | None:
        """Execute a line; its turn holds any error. Return `None` if the line ends the session."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return None
        try:
            if not command.startswith("/"):
                return self._ask(line.strip())
            actions = {"/edit": self._edit, "/undo": self._undo, "/list": self._list, "/save": self._save,
                       "/load": self._load, "/help": lambda _: Turn({"help": HELP}, HELP)}  # fmt: skip
            if command not in actions:
                raise ValueError(f"there is no command {command}; the commands are {', '.join(actions)}, /quit")
            return actions[command](rest.strip())
        except (ValueError, OSError, LookupError, RuntimeError) as error:
            return Turn({"line": line.strip(), "error": one_line(error)}, f"! {one_line(error)}", ok=False)

    def _ask(self, prompt: str) -> Turn:
        from ..evaluation.generation import answer

        def said() -> str:
            return answer(self.model, prompt, chat=self.chat, max_new_tokens=self.max_new_tokens)

        with self.model.disable_edits():
            before = said()
        after = said() if self.model.edits else before
        document = {"prompt": prompt, "before": before, "after": after}
        return Turn(document, side_by_side(before, after) if self.model.edits else before)

    def _edit(self, text: str) -> Turn:
        from .edit import as_values

        prompt, arrow, target = text.partition("=>")
        if not arrow:
            raise ValueError("write /edit PROMPT => TARGET")
        result = self.model.edit(prompt.strip(), target.strip(), chat=self.chat, keep_failed=False)
        assert not isinstance(result, list)
        return Turn({"edit": as_values(result)}, str(result), ok=bool(result.success))

    def _undo(self, edit_id: str) -> Turn:
        gone = self.model.undo(edit_id or None)
        return Turn({"undone": gone.describe()}, f"undone: {gone.id}  {shown(gone.prompt)} -> {shown(gone.target)}")

    def _list(self, _: str) -> Turn:
        edits = self.model.edits
        lines = [f"{edit.id}  {shown(edit.prompt)} -> {shown(edit.target)}" for edit in edits]
        return Turn({"edits": [edit.describe() for edit in edits]}, "\n".join(lines) or "no edits yet")

    def _save(self, folder: str) -> Turn:
        if not folder:
            raise ValueError("write /save FOLDER")
        self.model.save_edits(folder)
        return Turn({"saved": folder, "count": len(self.model.edits)}, f"{len(self.model.edits)} saved in {folder}")

    def _load(self, folder: str) -> Turn:
        if not folder:
            raise ValueError("write /load FOLDER")
        loaded = self.model.load_edits(folder)
        return Turn({"loaded": [edit.describe() for edit in loaded]}, f"{len(loaded)} loaded from {folder}")


def side_by_side(before: str, after: str, width: int | None = None) -> str:
    """
    Return two texts in two columns.

    Args:
        before, after (`str`): The texts.
        width (`int`, *optional*): Width of the columns and the line between; the terminal's width by default.
    """
    column = max(10, ((width or shutil.get_terminal_size().columns) - 3) // 2)
    left = ["before", *(textwrap.wrap(before, column) or ["(nothing)"])]
    right = ["after", *(textwrap.wrap(after, column) or ["(nothing)"])]
    height = max(len(left), len(right))
    left, right = left + [""] * (height - len(left)), right + [""] * (height - len(right))
    return "\n".join(f"{one:{column}} | {other}".rstrip() for one, other in zip(left, right, strict=True))


def _lines(prompts: bool, stdout: Any) -> Iterator[str]:
    while True:
        if prompts:
            typer.echo("> ", nl=False, file=stdout)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line
