"""The card: from the template, and never over somebody's words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_mend import EditorConfig
from hf_mend.cards import update_card, write_card
from hf_mend.files import read_tensors


CARDS = Path(__file__).parent.parent / "model_cards"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_a_new_card_names_base_layers_and_settings(tmp_path):
    write_card(tmp_path, EditorConfig(base_model_name_or_path="me/model", task_type="SEQ_2_SEQ_LM", rank=7), ["a.fc1"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: hf-mend\nbase_model: me/model\n")
    assert "AutoModelForSeq2SeqLM" in text
    assert "- `a.fc1`" in text
    assert "| `rank` | `7` |" in text
    assert "$" not in text


def test_only_marked_sections_are_replaced(tmp_path):
    write_card(tmp_path, EditorConfig(), ["a"])
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("## Limits", "My own words.\n\n## Limits"))
    update_card(tmp_path, {"metrics": "success \\1 0.99", "nothing": "x"})
    write_card(tmp_path, EditorConfig(rank=3), ["b"])
    text = path.read_text()
    assert "My own words." in text
    assert "success \\1 0.99" in text
    assert "Nothing was measured" not in text
    assert "- `b`" in text
    assert "- `a`" not in text
    assert "| `rank` | `3` |" in text


@pytest.mark.parametrize(
    "folder", sorted(path for path in CARDS.glob("*") if path.is_dir()), ids=lambda path: path.name
)
def test_a_published_editor_is_whole_and_its_card_says_what_was_measured(folder):
    config = EditorConfig.from_json_file(folder / "editor_config.json")
    read_tensors(folder / "editor.safetensors")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10e6
    assert config.base_fingerprint is not None
    text = (folder / "README.md").read_text()
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert front is not None
    assert f"base_model: {config.base_model_name_or_path}" in front[1]
    assert "license: " in front[1]
    result = json.loads((RESULTS / f"{folder.name}.json").read_text())
    for title, metrics in result["metrics"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        for name in ("edit_success", "generality", "neighborhood", "unrelated"):
            assert f"{metrics[name]:.3f}" in cells
