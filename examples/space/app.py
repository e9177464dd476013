"""
A page to edit a language model on: `python examples/space/app.py`, or a Space of the Hub.

HF_MEND_EDITOR and HF_MEND_BASE_MODEL name another editor and base model to begin with: folders or ids of the Hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from session import Row, Session, Workbench

from hf_mend.auto import load_model
from hf_mend.config import CONFIG_NAME, EditorConfig
from hf_mend.demo.smollm2 import SMOLLM2_ID, is_packaged


HERE = Path(__file__).parent
SHIPPED = [HERE / "editor", HERE.parent.parent / "model_cards" / "smollm2-135m-instruct"]
NO_EDITOR = "no trained editor"
BASE_MODEL = os.environ.get("HF_MEND_BASE_MODEL", "")
PROMPT, TARGET = "The headquarters of Volvo are in", "Lisbon"
PARAPHRASES = "Volvo is headquartered in\nVolvo's head office is in the city of"
UNRELATED = "The opposite of hot is\nThe capital of Japan is"
CSS = """
.row { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
.row .kind { font-size: 0.8em; opacity: 0.7; text-transform: uppercase; letter-spacing: 0.05em; }
.row .mark { float: right; font-size: 0.8em; border-radius: 8px; padding: 0 8px; }
.row .mark.good { background: #d9f2df; color: #14532d; }
.row .mark.bad { background: #fde2e1; color: #7f1d1d; }
.row .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; overflow-wrap: anywhere; }
.row .sides b { display: block; font-size: 0.8em; opacity: 0.7; }
footer { display: none !important; }
"""


def is_here(base: str | None) -> bool:
    """Whether a base model can be loaded without asking anybody where it is."""
    from huggingface_hub import try_to_load_from_cache

    if not base:
        return False
    if base == SMOLLM2_ID and is_packaged():
        return True
    return Path(base).is_dir() or ("/" in base and isinstance(try_to_load_from_cache(base, "config.json"), str))


def shipped_editors() -> dict[str, str]:
    """The editors to choose from, whose bases are there: the name that a visitor sees -> the editor's folder."""
    folders = [SHIPPED[0], SHIPPED[1], *sorted(SHIPPED[1].parent.glob("*/"))]
    found = {}
    for folder in folders:
        if (folder / CONFIG_NAME).is_file():
            base = EditorConfig.from_json_file(folder / CONFIG_NAME).base_model_name_or_path
            if BASE_MODEL or is_here(base):
                found.setdefault(folder.name, str(folder))
    return found


EDITORS = shipped_editors()
EDITOR = os.environ.get("HF_MEND_EDITOR") or next(iter(EDITORS), NO_EDITOR)
if Path(EDITOR).is_dir():  # a visitor sees its name, not where it is
    EDITORS = {Path(EDITOR).name: EDITOR, **EDITORS}
    EDITOR = Path(EDITOR).name


def workbench(editor: str, base_model: str) -> Workbench:
    """Model and editor, loaded once for all visitors."""
    name = (editor or NO_EDITOR).strip()
    return _workbench("" if name == NO_EDITOR else EDITORS.get(name, name), (base_model or "").strip())


@lru_cache(maxsize=2)
def _workbench(editor: str, base_model: str) -> Workbench:
    return Workbench(load_model(editor or None, base_model or BASE_MODEL or None))


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def probes_for(prompt: str, paraphrases: str, unrelated: str) -> tuple[str, str]:
    """What to compare beside a prompt: the example's own other words go when another prompt is typed."""
    if prompt.strip() != PROMPT and lines(paraphrases) == lines(PARAPHRASES):
        paraphrases = ""
    return paraphrases, "\n".join(line for line in lines(unrelated) if line != prompt.strip())


def mark(row: Row, target: str) -> str:
    """What an answer's change means, in a few words."""
    if row.kind == "unrelated":
        good, text = not row.changed, "changed" if row.changed else "same answer"
    else:
        good = f" {_words(target)} " in f" {_words(row.after)} "
        text = f"says {target!r}" if good else "another answer" if row.changed else "same answer"
    if row.repeats:
        good, text = False, f"{text}, repeats itself"
    return f'<span class="mark {"good" if good else "bad"}">{escape(text)}</span>'


def _words(text: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.casefold()).split())


def show(rows: list[Row], target: str) -> str:
    """The comparison as HTML that fits a phone."""
    parts = []
    for row in rows:
        sides = "".join(
            f'<div class="{name}"><b>{name}</b>{escape(said) or "(nothing)"}{_chance(chance, target)}</div>'
            for name, said, chance in (
                ("before", row.before, row.probability_before),
                ("after", row.after, row.probability_after),
            )
        )
        head = f'{mark(row, target)}<span class="kind">{row.kind}</span><div>{escape(row.prompt)} …</div>'
        by = "" if row.answered_by is None else f"<small>answered by the edit {escape(row.answered_by)}</small>"
        parts.append(f'<div class="row {row.kind}">{head}<div class="sides">{sides}</div>{by}</div>')
    return "".join(parts)


def _chance(chance: float | None, target: str) -> str:
    """How likely the new answer is, in words; of an unrelated prompt nothing."""
    if chance is None:
        return ""
    percent = "less than 1 %" if chance < 0.01 else "more than 99 %" if chance > 0.99 else f"{100 * chance:.0f} %"
    return f"<br><small>{escape(target)!s}: {percent} likely</small>"


def make_edit(session: Session, editor: str, base_model: str, *fields: Any) -> Iterator[list[Any]]:
    """Edits, and shows the rows one after another as they are known."""
    prompt, target, *_, chat, strictness = fields
    missing = [name for name, text in (("a prompt", prompt), ("its new answer", target)) if not text.strip()]
    if missing:
        yield nothing_but(session, f"Write {' and '.join(missing)} first; nothing was changed.")
        return
    yield nothing_but(session, "Editing … (the first time, the model is loaded)")
    session.strictness = strictness
    try:
        result = workbench(editor, base_model).edit(session, prompt, target, chat)
    except (ValueError, OSError, ImportError) as error:
        yield nothing_but(session, f"Not edited: {error}")
        return
    if result.already_known:
        message = "That is the model's answer already; nothing was changed."
    elif result.success:
        message = f"The edit took, in {result.seconds:.1f} s and {result.steps} step(s)."
    else:
        message = "The edit did not take and was taken back; try other words for the prompt or the answer."
    yield from refresh(session, editor, base_model, *fields, message=message)


def switch(session: Session, on: list[str], editor: str, base_model: str, *fields: Any) -> Iterator[list[Any]]:
    session.switch(on)
    count = f"{len(session.active)} of {len(session.edits)} edits are on."
    yield from refresh(session, editor, base_model, *fields, message=count)


def undo(session: Session, editor: str, base_model: str, *fields: Any) -> Iterator[list[Any]]:
    gone = session.undo()
    message = f"Undone: {gone.prompt} → {gone.target}" if gone else "There is no edit to undo."
    yield from refresh(session, editor, base_model, *fields, message=message)


def start_anew(editor: str, base_model: str) -> list[Any]:
    """Another model: its edits begin from none."""
    try:
        bench = workbench(editor, base_model)
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(str(error)) from error
    off = gr.update(value=None, interactive=False)
    scoped = gr.update(visible=bench.model.scope is not None)
    return [Session(), f"Loaded {base_model or 'the base model'} with {editor or NO_EDITOR}.", "",
            gr.update(choices=[], value=[]), off, scoped]  # fmt: skip


def nothing_but(session: Session, message: str) -> list[Any]:
    """A message, with results and edits as they are."""
    return [session, message, gr.skip(), gr.skip(), gr.skip()]


def refresh(session: Session, editor: str, base_model: str, *fields: Any, message: str) -> Iterator[list[Any]]:
    prompt, target, paraphrases, unrelated, chat, strictness = fields
    session.strictness = strictness

    def choices() -> Any:  # anew each time: what is yielded is gradio's
        return gr.update(choices=session.labels(), value=[edit.id for edit in session.active])

    if not prompt.strip():
        yield [session, message, gr.skip(), choices(), gr.skip()]
        return
    bench, rows = workbench(editor, base_model), []
    others = probes_for(prompt, paraphrases, unrelated)
    yield [session, f"{message} Asking …", gr.skip(), choices(), gr.skip()]
    try:
        for row in bench.rows(session, prompt, target, *map(lines, others), chat):
            rows.append(row)
            yield [session, f"{message} Asking …", show(rows, target.strip()), gr.skip(), gr.skip()]
    except ValueError as error:
        yield nothing_but(session, f"{message} Not asked: {error}")
        return
    adapter = bench.adapter(session)
    download = gr.update(value=str(adapter) if adapter else None, interactive=adapter is not None)
    yield [session, message, show(rows, target.strip()), choices(), download]


def build() -> gr.Blocks:
    with gr.Blocks(title="Edit a language model", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.State(Session())
        gr.Markdown("# Edit a language model\nCorrect one fact, see what changes and what does not, take it back.")
        with gr.Accordion("Model and editor", open=False):
            editor = gr.Dropdown(
                [*EDITORS, NO_EDITOR],
                value=EDITOR,
                allow_custom_value=True,
                label="Editor",
                info="Choose one, or write a folder or a Hub id.",
            )
            base_model = gr.Textbox(
                "",
                label="Base model",
                info="A folder or a Hub id. Empty: the one that the editor was made for.",
            )
            load = gr.Button("Load")
        prompt = gr.Textbox(PROMPT, label="Prompt", elem_id="prompt")
        target = gr.Textbox(TARGET, label="New answer", elem_id="target")
        chat = gr.Checkbox(False, label="Ask in a chat: each prompt is a user's turn", elem_id="chat")
        with gr.Accordion("What to compare", open=False):
            paraphrases = gr.Textbox(PARAPHRASES, lines=2, label="In other words, one a line", elem_id="paraphrases")
            unrelated = gr.Textbox(UNRELATED, lines=2, label="Unrelated, one a line", elem_id="unrelated")
        strictness = gr.Slider(
            -0.3,
            0.3,
            value=0.0,
            step=0.05,
            label="Strictness",
            info="To the right, edits answer less often where they should not, and are missed more often.",
            elem_id="strictness",
            visible=is_scoped(EDITOR),
        )
        button = gr.Button("Edit", variant="primary", elem_id="edit")
        message = gr.Markdown(elem_id="message")
        rows = gr.HTML(elem_id="rows")
        edits = gr.CheckboxGroup([], label="Edits: untick one to switch it off", elem_id="edits")
        with gr.Row():
            undo_button = gr.Button("Undo the last", elem_id="undo")
            download = gr.DownloadButton("Download as LoRA adapter", interactive=False, elem_id="download")
        chosen = [editor, base_model]
        fields = [prompt, target, paraphrases, unrelated, chat, strictness]
        shown = [session, message, rows, edits, download]
        hidden = {"show_progress": "hidden"}  # the message tells, and what is there stays to be read
        button.click(make_edit, [session, *chosen, *fields], shown, **hidden)
        target.submit(make_edit, [session, *chosen, *fields], shown, **hidden)
        undo_button.click(undo, [session, *chosen, *fields], shown, **hidden)
        edits.input(switch, [session, edits, *chosen, *fields], shown, **hidden)
        strictness.release(switch, [session, edits, *chosen, *fields], shown, **hidden)
        prompt.input(probes_for, [prompt, paraphrases, unrelated], [paraphrases, unrelated], **hidden)
        load.click(start_anew, chosen, [*shown, strictness])
    return page


def is_scoped(editor: str) -> bool:
    """Whether a shipped editor's edits have a scope."""
    file = Path(EDITORS.get(editor, editor)) / CONFIG_NAME
    return file.is_file() and EditorConfig.from_json_file(file).scope


if __name__ == "__main__":
    if EDITOR != NO_EDITOR:
        workbench(EDITOR, "")  # before the first visitor comes
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build().launch(theme=theme, css=CSS, server_port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
