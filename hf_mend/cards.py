"""The model card that `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from .config import EditorConfig


def write_card(folder: Path, config: EditorConfig, layers: Sequence[str]) -> None:
    """
    Writes `README.md` from the template, unless there is one: a card that somebody wrote is never overwritten.

    Args:
        folder (`Path`): The editor's folder.
        config ([`EditorConfig`]): The editor's configuration.
        layers (`Sequence[str]`): The edited layers.
    """
    path = folder / "README.md"
    if path.exists():
        return
    template = Template(resources.files("hf_mend").joinpath("templates/editor_card.md").read_text(encoding="utf-8"))
    base = config.base_model_name_or_path or "the base model"
    auto_class = "AutoModelForSeq2SeqLM" if config.task_type == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    path.write_text(
        template.substitute(
            base_model=base,
            auto_class=auto_class,
            method=config.method,
            layers="\n".join(f"- `{name}`" for name in layers),
            settings="\n".join(
                f"| `{name}` | `{value}` |"
                for name, value in sorted(config.to_dict().items())
                if name not in ("base_fingerprint", "base_model_name_or_path")
            ),
        ),
        encoding="utf-8",
    )
