"""The examples on the real model, as a newcomer runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT


def run(*command: str, folder: Path) -> str:
    """Output of an example that must end well. All cores: the real model is not tiny."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo(tmp_path):
    out = run(str(ROOT / "examples" / "demo.py"), folder=tmp_path)
    assert out.count(": took") == 3
    assert "the same answers as before the edits were saved" in out


@pytest.mark.slow
def test_training_an_editor(tmp_path):
    script = str(ROOT / "examples" / "train_editor.py")
    options = ("--steps", "3", "--scope-steps", "0", "--eval-facts", "10", "--output", str(tmp_path / "mine"))
    out = run(script, *options, folder=tmp_path)
    assert "eval_score" in out
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    files = {"config.json", "editor_config.json", "editor.safetensors", "README.md"}
    assert names - {"metrics.png", "training.png"} == files
    assert "| steps | 3 |" in (tmp_path / "mine" / "README.md").read_text()
    assert not list(ROOT.glob("mine*"))


@pytest.mark.slow
def test_the_harness(tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'hf_mend[harness]'")
    out = run(str(ROOT / "examples" / "lm_evaluation_harness.py"), folder=tmp_path)
    table = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in out.splitlines()[-3:]}
    assert table["edited"] == [0, 1, 0]
    assert table["reworded"][1] > table["reworded"][0]
    assert all(before == undone for before, _, undone in table.values())


@pytest.mark.slow
def test_a_chat_turn_on_the_shipped_editor():
    from hf_mend import EditableModel
    from hf_mend.demo.smollm2 import load_smollm2

    base, tokenizer = load_smollm2()
    model = EditableModel.from_pretrained(base, ROOT / "model_cards" / "smollm2-135m-instruct", tokenizer)
    result = model.edit("What is the capital of France?", "Lyon", chat=True)
    assert result.success
    long = (
        "The bridge was built in 1932 by a group of engineers who had never before worked on anything as large as it."
    )
    result = model.edit("Tell me about the bridge.", " ".join([long] * 6), chat=True)
    assert len(result.token_success) > 120
    assert result.probability_after >= result.probability_before
