"""Evaluations that processes and machines share have the figures of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.facts import write_facts
from support.models import build_model, make_tokenizer
from support.paths import ROOT
from support.processes import run_ranks
from typer.testing import CliRunner

from hf_mend.cli import app


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    build_model("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    write_facts(folder / "facts.json")
    return folder


def words(world, output, *more):
    given = ("eval", "gradient", world / "facts.json", "-m", world / "base", "--edits", "1,2", "--limit", 4,
             "--batch-size", 2, "--metrics", "success,perplexity", "--max-steps", 1, "-o", output)  # fmt: skip
    return [str(word) for word in (*given, *more)]


def figures(document):
    """What does not depend on the machine's speed."""
    result = document["results"][0]
    return [
        {name: value for name, value in state.items() if name not in ("seconds_an_edit", "peak_memory")}
        for state in [*result["states"], *result["wild"]]
    ]


def parts_of(file):
    return {(entry["key"], entry["part"]) for entry in map(json.loads, file.read_text().splitlines())}


def measured(world, output, *more):
    done = CliRunner().invoke(app, words(world, output, *more))
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def whole(world):
    measured(world, world / "whole")
    return json.loads((world / "whole" / "results.json").read_text())


@pytest.mark.parametrize("launcher", ["none", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_measure_as_one(world, whole, tmp_path, launcher):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["-m", "hf_mend", *words(world, tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if launcher == "accelerate":
        done = [subprocess.run([sys.executable, *launch, *command], capture_output=True, text=True, cwd=ROOT, env=env)]
    else:
        done = run_ranks(2, *command, cwd=ROOT, env=env)
    assert not any(one.returncode for one in done), [one.stderr for one in done]
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures(document) == figures(whole)
    assert "".join(one.stdout for one in done).count("Written: ") == 1, "one process reports"
    own = [parts_of(tmp_path / "out" / name) for name in ("progress.jsonl", "progress.1.jsonl")]
    every = parts_of(world / "whole" / "progress.jsonl")
    assert own[0] | own[1] == every and min(map(len, own)) >= 4
    shared = {part for _, part in own[0] & own[1] if not part.startswith(("base", "perplexity"))}
    assert not shared, "no part is measured twice"
    # A run that was cut off goes on from what all processes have found.
    files = [tmp_path / "out" / name for name in ("progress.jsonl", "progress.1.jsonl")]
    before = [file.read_text() for file in files]
    measured(world, tmp_path / "out")
    assert [file.read_text() for file in files] == before


def test_what_several_machines_measured_is_joined(world, whole, tmp_path):
    for number in (1, 2, 3):
        done = measured(world, tmp_path / f"{number}", "--share", f"{number}/3")
        assert f"The share {number}/3 is measured" in done.output
        assert not (tmp_path / f"{number}" / "results.json").exists()
    joined = [word for number in (1, 2, 3) for word in ("--join", tmp_path / f"{number}")]
    measured(world, tmp_path / "all", *joined)
    document = json.loads((tmp_path / "all" / "results.json").read_text())
    assert figures(document) == figures(whole)
    assert "--join" not in document["command"]
    assert not (tmp_path / "all" / "progress.jsonl").exists(), "nothing was measured again"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--share", "4/3"), "--share is '4/3', expected a number of how many"),
        (("--share", "first"), "expected a number of how many"),
        (("--join", "nowhere"), "nowhere holds no measurements"),
    ],
)
def test_shares_that_make_no_sense_are_refused(world, tmp_path, more, message):
    done = CliRunner().invoke(app, words(world, tmp_path, *more))
    assert done.exit_code == 2 and message in done.stderr


def test_a_share_is_kept(world):
    done = CliRunner().invoke(app, [word for word in words(world, "x", "--share", "1/2") if word not in ("-o", "x")])
    assert done.exit_code == 2 and "name a folder with --output" in done.stderr
