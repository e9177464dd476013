"""The model card: written from a template, and never over what somebody wrote into it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from .config import EditorConfig


def write_card(folder: str | Path, config: EditorConfig, layers: Sequence[str]) -> None:
    """
    Writes `README.md` from the template; of a card that is there already, only the sections `layers` and `settings`.

    Args:
        folder (`str` or `Path`): The editor's folder.
        config ([`EditorConfig`]): The editor's configuration.
        layers (`Sequence[str]`): The edited layers.
    """
    rows = [
        f"| `{name}` | `{value}` |"
        for name, value in sorted(config.to_dict().items())
        if name not in ("base_fingerprint", "base_model_name_or_path")
    ]
    sections = {
        "layers": "\n".join(f"- `{name}`" for name in layers),
        "settings": "\n".join(["| option | value |", "|---|---|", *rows]),
    }
    path = Path(folder) / "README.md"
    if not path.exists():
        template = resources.files("hf_mend").joinpath("templates/editor_card.md").read_text(encoding="utf-8")
        seq2seq = config.task_type == "SEQ_2_SEQ_LM"
        text = Template(template).substitute(
            base_model=config.base_model_name_or_path or "the base model",
            auto_class="AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM",
            method=config.method,
        )
        path.write_text(text, encoding="utf-8")
    update_card(folder, sections)


def update_card(folder: str | Path, sections: Mapping[str, str]) -> None:
    """
    Replaces marked sections of a card; a section that the card does not mark is left out.

    Args:
        folder (`str` or `Path`): The editor's folder.
        sections (`Mapping[str, str]`): Name -> Markdown. A section stands between `<!-- hf_mend:name -->` and
            `<!-- /hf_mend:name -->`.
    """
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, content in sections.items():
        text = _replaced(text, name, f"{content}\n")
    path.write_text(text, encoding="utf-8")


def with_sections_of(words: str, card: str) -> str:
    """
    A card's text with the marked sections of another.

    Args:
        words (`str`): The card whose words stay, say the one on the Hub.
        card (`str`): The card whose marked sections replace those of the same names.
    """
    for found in re.finditer(r"<!-- hf_mend:([\w-]+) -->\n(.*?)<!-- /hf_mend:\1 -->", card, re.DOTALL):
        words = _replaced(words, found[1], found[2])
    return words


def _replaced(text: str, name: str, content: str) -> str:
    mark = re.compile(rf"(<!-- hf_mend:{re.escape(name)} -->\n).*?(<!-- /hf_mend:{re.escape(name)} -->)", re.DOTALL)
    return mark.sub(lambda found: f"{found[1]}{content}{found[2]}", text)
