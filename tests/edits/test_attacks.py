"""Signals in the middle of calls, and processes that are killed while they write; benchmarks/attack.py does more."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
from support import kills, signals
from support.interrupts import checked
from support.paths import ROOT

from hf_mend import EditStore


@pytest.mark.parametrize(
    ("name", "with_scope", "with_store"),
    [("edit", False, True), ("undo", False, False), ("disable_edits", False, False), ("exclude", True, True)],
)
def test_a_call_that_a_signal_meets_has_happened_or_not(tokenizer, tmp_path, name, with_scope, with_store):
    model = checked(name, tokenizer, tmp_path, with_scope, with_store)
    assert signals.attack(model, random.Random(0), 8)[1] == []


# A training's process is another than this one, which may have run backward passes: see the slow test.
@pytest.mark.parametrize("kind", [kind for kind in kills.KINDS if kind is not kills.Checkpoints])
def test_what_a_killed_process_has_told_is_on_the_disk(tokenizer, tmp_path, kind):
    assert kills.attack(kind, tmp_path, tokenizer, random.Random(0), 4) == []


def test_a_harness_that_kills_sees_what_is_lost(tokenizer, tmp_path, monkeypatch):
    """A store that tells of calls that it never wrote, and one that writes an edit at a time."""
    monkeypatch.setattr(kills.StoreCalls, "seconds", 1.0)
    append = EditStore.append
    monkeypatch.setattr(EditStore, "append", lambda self, edits: append(self, edits[:1]))
    wrong = kills.attack(kills.StoreCalls, tmp_path, tokenizer, random.Random(0), 4)
    assert any("half there" in one for one in wrong)
    monkeypatch.setattr(EditStore, "append", lambda self, edits: None)
    wrong = kills.attack(kills.StoreCalls, tmp_path / "other", tokenizer, random.Random(0), 4)
    assert any("were told" in one for one in wrong)


@pytest.mark.slow
def test_nothing_is_wrong_after_an_attack(tmp_path):
    counts = ["--exceptions", "400", "--signals", "100", "--reads", "1000", "--kills", "30", "--files", "300"]
    script = [sys.executable, str(ROOT / "benchmarks" / "attack.py"), *counts, "--edits", "500"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*script, "--minutes", "30", "--output", str(tmp_path / "attack")], check=True, env=environment)
    results = json.loads((tmp_path / "attack.json").read_text())
    parts = [results[part] for part in ("lines", "signals", "threads", "kills", "files")]
    assert [(one["wrong"], one["what"]) for one in parts] == [(0, [])] * 5
    assert all(one["tried"] > 0 for one in parts) and "wrong" in (tmp_path / "attack.md").read_text()
