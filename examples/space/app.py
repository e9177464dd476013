"""
A page to edit a language model on: `python examples/space/app.py`, or a Space of the Hub.

HF_MEND_EDITOR and HF_MEND_BASE_MODEL name another editor and base model to begin with: folders or ids of the Hub.
"""

from __future__ import annotations

import os
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from session import Row, Session, Workbench

from hf_mend.auto import load_model


HERE = Path(__file__).parent
SHIPPED = [HERE / "editor", HERE.parent.parent / "model_cards" / "smollm2-135m-instruct"]
EDITOR = os.environ.get("HF_MEND_EDITOR") or next((str(path) for path in SHIPPED if path.is_dir()), "")
EDITORS = list(dict.fromkeys([EDITOR, *(str(path) for path in sorted(SHIPPED[1].parent.glob("*/"))), ""]))
BASE_MODEL = os.environ.get("HF_MEND_BASE_MODEL", "")
PROMPT, TARGET = "The headquarters of Volvo are in", "Lisbon"
PARAPHRASES = "Volvo is headquartered in\nVolvo's head office is in the city of"
UNRELATED = "The opposite of hot is\nThe capital of Japan is"
CSS = """
.row { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
.row .kind { font-size: 0.8em; opacity: 0.7; text-transform: uppercase; letter-spacing: 0.05em; }
.row .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; overflow-wrap: anywhere; }
.row .sides b { display: block; font-size: 0.8em; opacity: 0.7; }
footer { display: none !important; }
"""


@lru_cache(maxsize=2)
def workbench(editor: str, base_model: str) -> Workbench:
    """Model and editor, loaded once for all visitors."""
    return Workbench(load_model(editor or None, base_model or None))


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def show(rows: list[Row]) -> str:
    """The comparison as HTML that fits a phone."""
    parts = []
    for row in rows:
        sides = "".join(
            f'<div class="{name}"><b>{name}</b>{escape(said) or "(nothing)"}'
            f"<br><small>P({escape(row.watched)}) = {chance:.3f}</small></div>"
            for name, said, chance in (
                ("before", row.before, row.probability_before),
                ("after", row.after, row.probability_after),
            )
        )
        head = f'<span class="kind">{row.kind}</span><div>{escape(row.prompt)} …</div>'
        parts.append(f'<div class="row {row.kind}">{head}<div class="sides">{sides}</div></div>')
    return "".join(parts)


def make_edit(session: Session, editor: str, base_model: str, *fields: str) -> list[Any]:
    prompt, target = fields[:2]
    try:
        result = workbench(editor, base_model).edit(session, prompt, target)
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(str(error)) from error
    if result.already_known:
        message = "That is the model's answer already; nothing was changed."
    else:
        state = "took" if result.success else "did not take"
        message = f"The edit {state}: {result.seconds:.1f} s, {result.steps} step(s), rank {result.rank}."
    return refresh(session, editor, base_model, *fields, message=message)


def switch(session: Session, on: list[str], editor: str, base_model: str, *fields: str) -> list[Any]:
    session.switch(on)
    count = f"{len(session.active)} of {len(session.edits)} edits are on."
    return refresh(session, editor, base_model, *fields, message=count)


def undo(session: Session, editor: str, base_model: str, *fields: str) -> list[Any]:
    gone = session.undo()
    message = f"Undone: {gone.prompt} → {gone.target}" if gone else "There is no edit to undo."
    return refresh(session, editor, base_model, *fields, message=message)


def start_anew(editor: str, base_model: str) -> list[Any]:
    """Another model: its edits begin from none."""
    try:
        workbench(editor, base_model)
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(str(error)) from error
    off = gr.update(value=None, interactive=False)
    return [Session(), f"Loaded {base_model or 'the base model'} with {editor or 'no trained editor'}.", "",
            gr.update(choices=[], value=[]), off]  # fmt: skip


def refresh(session: Session, editor: str, base_model: str, *fields: str, message: str) -> list[Any]:
    prompt, target, paraphrases, unrelated = fields
    bench = workbench(editor, base_model)
    try:
        rows = bench.compare(session, prompt, target, lines(paraphrases), lines(unrelated))
    except ValueError as error:
        raise gr.Error(str(error)) from error
    adapter = bench.adapter(session)
    choices = gr.update(choices=session.labels(), value=[edit.id for edit in session.active])
    download = gr.update(value=str(adapter) if adapter else None, interactive=adapter is not None)
    return [session, message, show(rows), choices, download]


def build() -> gr.Blocks:
    with gr.Blocks(title="Edit a language model", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.State(Session())
        gr.Markdown("# Edit a language model\nCorrect one fact, see what changes and what does not, take it back.")
        with gr.Accordion("Model and editor", open=False):
            editor = gr.Dropdown(
                EDITORS,
                value=EDITOR,
                allow_custom_value=True,
                label="Editor",
                info="Choose one, or write a folder or a Hub id. Empty: without a trained editor.",
            )
            base_model = gr.Textbox(
                BASE_MODEL,
                label="Base model",
                info="A folder or a Hub id. Empty: the one that the editor was made for.",
            )
            load = gr.Button("Load")
        prompt = gr.Textbox(PROMPT, label="Prompt", elem_id="prompt")
        target = gr.Textbox(TARGET, label="New answer", elem_id="target")
        with gr.Accordion("What to compare", open=False):
            paraphrases = gr.Textbox(PARAPHRASES, lines=2, label="In other words, one a line", elem_id="paraphrases")
            unrelated = gr.Textbox(UNRELATED, lines=2, label="Unrelated, one a line", elem_id="unrelated")
        button = gr.Button("Edit", variant="primary", elem_id="edit")
        message = gr.Markdown(elem_id="message")
        rows = gr.HTML(elem_id="rows")
        edits = gr.CheckboxGroup([], label="Edits: untick one to switch it off", elem_id="edits")
        with gr.Row():
            undo_button = gr.Button("Undo the last", elem_id="undo")
            download = gr.DownloadButton("Download as LoRA adapter", interactive=False, elem_id="download")
        chosen = [editor, base_model]
        fields = [prompt, target, paraphrases, unrelated]
        shown = [session, message, rows, edits, download]
        button.click(make_edit, [session, *chosen, *fields], shown)
        target.submit(make_edit, [session, *chosen, *fields], shown)
        undo_button.click(undo, [session, *chosen, *fields], shown)
        edits.input(switch, [session, edits, *chosen, *fields], shown)
        load.click(start_anew, chosen, shown)
    return page


if __name__ == "__main__":
    if EDITOR:
        workbench(EDITOR, BASE_MODEL)  # before the first visitor comes
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build().launch(theme=theme, css=CSS, server_port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
