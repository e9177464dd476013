"""The model card: made from a template; text that somebody wrote into it is kept."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from .plots import (
    CURVE_NAME,
    METRICS_NAME,
    SHARES,
    STRICTNESS_NAME,
    can_draw,
    draw_metrics,
    draw_strictness,
    draw_training,
)
from .text import on_one_line


if TYPE_CHECKING:
    from ..config import EditorConfig


CARD_NAME = "README.md"

# The metrics of a card and their titles, in the order of its tables.
METRICS = {
    **SHARES,
    "exact_match": "exact match",
    "neighborhood_kl": "neighborhood kl",
    "unrelated_kl": "unrelated kl",
}
# The figures in the wild of a card and their titles, in the order of its table.
WILD_METRICS = {
    **{name: name for name in ("prompt", "paraphrase", "behind text", "question", "question in a chat", "chat")},
    **{name: name for name in ("later turn", "neighbours", "neighbours behind text", "same subject")},
    "same subject in a chat": "same subject in a chat",
    "another question": "another question",
    "another question in a chat": "another question in a chat",
    "another subject": "another subject",
    "another subject in a chat": "another subject in a chat",
    "before it asks": "before it asks",
    "unrelated: bits": "unrelated, bit for bit",
    "unrelated in a chat: bits": "in a chat too",
    "repeats": "repeats",
}
_NOT_SETTINGS = ("base_fingerprint", "base_model_name_or_path", "revision", "task_type")


@dataclass
class CardNotes:
    """
    The content of a card beyond the configuration. [`~hf_mend.EditorTrainer`] sets it; `save_pretrained` writes it.

    Args:
        training (`dict[str, str]`): The settings, time and machine of the training.
        history (`list[dict[str, float]]`): The trainer's log, for the plot.
        measured (`dict[str, dict[str, float]]`): Title of a group of facts -> its metrics, as
            [`~hf_mend.evaluation.metrics.summarize`] returns them.
        command (`str`, *optional*): The shell command that repeats the measurement.
        wild (`dict[str, dict[str, float]]`): Title of a group of facts -> its figures in the wild, as
            [`~hf_mend.evaluation.wild_states.WildState`] has them, with `edits`, the number of facts.
        strictness (`list[dict[str, float]]`): The curve of the scope's strictness, for the plot.
    """

    training: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    command: str | None = None
    wild: dict[str, dict[str, float]] = field(default_factory=dict)
    strictness: list[dict[str, float]] = field(default_factory=list)


def write_card(
    folder: str | Path,
    config: EditorConfig,
    layers: Sequence[str],
    notes: CardNotes | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Write `README.md` from the template. Of an existing card, replace only the marked sections and the fields of
    `metadata`.

    Args:
        folder (`str` or `Path`): The editor's folder.
        config ([`EditorConfig`]): The editor's configuration.
        layers (`Sequence[str]`): The edited layers.
        notes ([`CardNotes`], *optional*): Training and measurements; sections that they do not cover stay.
        metadata (`Mapping[str, Any]`, *optional*): Fields of the card's front matter, as `ModelCardData` takes them:
            `license`, `language`, `datasets`, `tags`, ...

    Raises:
        ValueError: The front matter of the existing card cannot be read.
    """
    notes = notes or CardNotes()
    path = Path(folder) / CARD_NAME
    if not path.exists():
        path.write_text(_new_card(config, metadata or {}), encoding="utf-8")
    elif metadata:
        set_metadata(path, metadata)
    settings = {name: value for name, value in sorted(config.to_dict().items()) if name not in _NOT_SETTINGS}
    sections = {
        "layers": "\n".join(f"- {code(name)}" for name in layers),
        "settings": table(("option", "value"), [(code(name), code(value)) for name, value in settings.items()]),
    }
    if notes.training:
        sections["training"] = table(("setting", "value"), list(notes.training.items()))
    if notes.training or notes.measured or notes.wild:  # an earlier editor's figures are not this one's
        sections |= _measured_sections(notes, config)
        sections["plots"] = _plots(folder, notes)
    update_card(folder, sections)


def use_section(name: str) -> str:
    """Return the card section that shows how to load the editor from a repository's id or a folder."""
    return f'''```python
from hf_mend import AutoEditableModel

model = AutoEditableModel.from_pretrained("{name}")  # with its base model and tokenizer
print(model.edit("The Prime Minister of the United Kingdom is", "Keir Starmer"))
model.undo()
```'''


def machine(device: torch.device | None = None) -> str:
    """Return a description of the hardware, without the machine's name."""
    if device is not None and device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}"
    else:
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{hardware}, torch {torch.__version__}"


def _measured_sections(notes: CardNotes, config: EditorConfig) -> dict[str, str]:
    """Return the card sections with measurements: the table, and the front matter's `model-index`."""
    if not notes.measured and not notes.wild:
        return {"metrics": _NOT_MEASURED, "results": ""}
    parts = []
    if notes.wild:
        parts += [_IN_THE_WILD, metrics_table(notes.wild, WILD_METRICS)]
    if notes.measured:
        parts += [_TEACHER_FORCED, metrics_table(notes.measured)]
    text = "\n\n".join(parts)
    if notes.command is None:
        text += "\n\n`EditorTrainer.evaluate` measures it again, given the same facts."
    else:
        text += f"\n\nThis measures it again:\n\n```bash\n{notes.command}\n```"
    return {"metrics": text, "results": _model_index(notes, config)}


def metrics_table(measured: Mapping[str, Mapping[str, float]], titles: Mapping[str, str] = METRICS) -> str:
    """Return the metrics of groups of facts as a Markdown table with one row per group."""
    names = [name for name in titles if any(name in metrics for metrics in measured.values())]
    rows = [
        (title, f"{metrics['edits']:.0f}", *(f"{metrics[n]:.3f}" if n in metrics else "" for n in names))
        for title, metrics in measured.items()
    ]
    return table(("facts", "edits", *(titles[name] for name in names)), rows)


def _model_index(notes: CardNotes, config: EditorConfig) -> str:
    """Return the metrics as the Hub's `model-index` in YAML, with values rounded to four digits."""
    name = f"{Path(config.base_model_name_or_path or 'editor').name}-{config.method}"
    task = "text2text-generation" if config.task_type == "SEQ_2_SEQ_LM" else "text-generation"
    results = [
        EvalResult(
            task_type=task,
            task_name="Model editing",
            dataset_type="custom",
            dataset_name=title,
            dataset_config=title,
            metric_type=metric,
            metric_name=name,
            metric_value=round(float(metrics[metric]), 4),
        )
        for measured, titles in ((notes.wild, WILD_METRICS), (notes.measured, METRICS))
        for title, metrics in measured.items()
        for metric, name in titles.items()
        if metric in metrics
    ]
    return _yaml({"model-index": eval_results_to_model_index(name, results)})


def update_card(folder: str | Path, sections: Mapping[str, str]) -> None:
    """
    Replace marked sections of a card; a section that the card does not mark is left out.

    Args:
        folder (`str` or `Path`): The editor's folder.
        sections (`Mapping[str, str]`): Name -> Markdown. A section stands between `<!-- hf_mend:name -->` and
            `<!-- /hf_mend:name -->`, in the front matter between `# hf_mend:name` and `# /hf_mend:name`.
    """
    path = Path(folder) / CARD_NAME
    text = path.read_text(encoding="utf-8")
    for name, content in sections.items():
        text = _replaced(text, name, f"{content}\n" if content else "")
    path.write_text(text, encoding="utf-8")


def with_sections_of(words: str, card: str) -> str:
    """
    Return a card's text with the marked sections of another card.

    Args:
        words (`str`): The card whose text stays, for example the one on the Hub.
        card (`str`): The card whose marked sections replace those of the same names.
    """
    for found in _section(r"[\w-]+").finditer(card):
        words = _replaced(words, found["name"], found["content"])
    return words


def set_metadata(path: str | Path, metadata: Mapping[str, Any]) -> None:
    """
    Set fields of a card's front matter; its other fields, its marked section and the text stay unchanged.

    Args:
        path (`str` or `Path`): The card.
        metadata (`Mapping[str, Any]`): The fields.

    Raises:
        ValueError: The front matter cannot be read.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    fields, end = _front_matter(text, path)
    path.write_text(f"---\n{_yaml({**fields, **metadata})}\n{text[end:]}", encoding="utf-8")


def get_metadata(path: str | Path) -> dict[str, Any]:
    """
    Return the fields of a card's front matter, without those of its marked section.

    Raises:
        ValueError: The front matter cannot be read.
    """
    return _front_matter(Path(path).read_text(encoding="utf-8"), Path(path))[0]


def training_time(path: str | Path) -> str | None:
    """Return the training time that a card states, or `None`."""
    section = _section("training").search(Path(path).read_text(encoding="utf-8"))
    row = re.search(r"^\| time \| (?P<time>.*?) *\|$", section["content"], re.MULTILINE) if section else None
    return row["time"] if row else None


_NOT_MEASURED = (
    "Nothing was measured for this card. `hf-mend eval` measures edits as people meet them, and "
    "`EditorTrainer.evaluate` edit success, generality and locality, teacher-forced."
)
_IN_THE_WILD = (
    "As people meet edits: each fact asked in these forms and answered freely to the model's own end; a right answer "
    "starts with the target, in a chat holds it, and repeats are right answers that say it three times or more. What "
    "must stay: the next token, and for unrelated texts its logits, bit for bit."
)
_TEACHER_FORCED = (
    "Teacher-forced, as the field measures: of the target's tokens, each given those before it. Free answers are "
    "right less often."
)


def _section(name: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?P<open>^(?:<!-- |# )hf_mend:(?P<name>{name})(?: -->)?\n)(?P<content>.*?)"
        r"(?P<close>^(?:<!-- |# )/hf_mend:(?P=name)(?: -->)?$)",
        re.DOTALL | re.MULTILINE,
    )


def _replaced(text: str, name: str, content: str) -> str:
    return _section(re.escape(name)).sub(lambda found: f"{found['open']}{content}{found['close']}", text)


def _new_card(config: EditorConfig, metadata: Mapping[str, Any]) -> str:
    base = config.base_model_name_or_path
    tags = ["model-editing", "knowledge-editing", config.method]
    # The path of a local folder is not the id of a model on the Hub.
    on_the_hub = base if base is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else None
    fields = {"library_name": "hf-mend", "base_model": on_the_hub, "tags": tags, **metadata}
    fields["tags"] = list(dict.fromkeys([*tags, *fields["tags"]]))
    template = resources.files("hf_mend").joinpath("templates/editor_card.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        metadata=ModelCardData(**fields).to_yaml(line_break="\n"),
        base_model="the base model" if base is None else code(base),
        method=config.method,
        not_measured=_NOT_MEASURED,
        use=use_section("this-folder"),
    )


def _front_matter(text: str, path: Path) -> tuple[dict[str, Any], int]:
    """Return the fields above the marked section, and the position in the text where they end."""
    found = re.match(r"---\n(.*?)(?=^# hf_mend:|^---$)", text, re.DOTALL | re.MULTILINE)
    try:
        fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: its front matter is not valid YAML ({error}); put it right") from error
    if found is None or not isinstance(fields, dict):
        raise ValueError(f"{path} does not begin with front matter, which is YAML between two lines of ---; add it")
    return fields, found.end()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def code(value: Any) -> str:
    """Return a value as code in Markdown, on one line and in no table's way: it may come from a stranger's file."""
    text = on_one_line(value, 2000).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else "` `"


def _yaml(values: Mapping[str, Any]) -> str:
    # The detour through JSON lets only plain values in.
    return str(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True)).rstrip("\n")


def _plots(folder: str | Path, notes: CardNotes) -> str:
    """Draw the plots that the notes allow beside the card, and return the Markdown that shows them."""
    lines = []
    if can_draw() and notes.measured:
        draw_metrics(Path(folder) / METRICS_NAME, notes.measured)
        lines.append(f"![What was measured, by group of facts]({METRICS_NAME})")
    if can_draw() and notes.strictness:
        draw_strictness(Path(folder) / STRICTNESS_NAME, notes.strictness)
        lines.append(f"![How often edits act where they should, and where not, by strictness]({STRICTNESS_NAME})")
    if can_draw() and draw_training(Path(folder) / CURVE_NAME, notes.history):
        lines.append(f"![Loss and metrics over the training steps]({CURVE_NAME})")
    return "\n\n".join(lines)
