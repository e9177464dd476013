"""`hf-mend edit` and `hf-mend train` over two processes: what one process does, once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support.models import RECORDS, build_model, editable, make_tokenizer
from support.paths import ROOT, TESTS
from support.processes import run_ranks
from support.scope import scoped
from typer.testing import CliRunner

from hf_mend import EditableModel
from hf_mend.cli import app
from hf_mend.editing.together import Together, made_together, processes_of_call
from hf_mend.edits.low_rank import dense
from hf_mend.scope.files import scope_id


# Steps too few for some edits, which are taken back: more of them beside one another than alone.
STEPS = "6"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, an editor without and one with a scope, earlier edits, and facts of which some are asked twice."""
    folder = tmp_path_factory.mktemp("shared-edits")
    build_model("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": r.prompt, "target": r.target, "paraphrases": r.paraphrases, "neighborhood": r.neighborhood}
            for r in RECORDS]  # fmt: skip
    last = {**rows[1], "target": "oslo"}
    rows = [{**rows[0], "target": "tokyo town"}, *rows, {**rows[2], "prompt": f"{rows[2]['prompt']} "}, last]
    rows.append({"prompt": "the river", "target": "river " * 80})
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "others.jsonl").write_text("\n".join(map(json.dumps, rows[1:6])))
    for name, make in (("plain", editable), ("scoped", scoped)):
        model = make(build_model("llama"), make_tokenizer())
        model.editor_config.base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
        model.edit(RECORDS[0].prompt, "madrid", keep_failed=True)
        model.edit("the river of egypt is", "rome", keep_failed=True)
        for side in ("one", "two"):
            model.save_edits(folder / side / name)
    return folder


def commands(world: Path, side: str) -> list[list[str]]:
    of_file = [["edit", "--facts", world / "facts.jsonl", "-e", world / name, "--save", world / side / name,
                "--max-steps", STEPS, "--json"] for name in ("plain", "scoped")]  # fmt: skip
    single = ["edit", RECORDS[3].prompt, RECORDS[3].target, "-e", world / "plain", "--save", world / side / "single"]
    joins = ["edit", RECORDS[3].prompt, RECORDS[3].target, "-m", world / "base", "-e", world / "malmen"]
    train = ["train", world / "others.jsonl", "-m", world / "base", "-o", world / side / "trained", "--steps", 1,
             "--batch-size", 2, "--rank", 4, "--layers", "1,2", "--scope", "--scope-steps", 2,
             "--training", "scope_further_facts=0", "--eval-facts", world / "others.jsonl",
             "--eval-limit", 2]  # fmt: skip
    return [[str(word) for word in words] for words in (*of_file, single, joins, train)]


@pytest.fixture(scope="module")
def of_two(world):
    """What two processes found, each by itself."""
    model = editable(build_model("llama"), make_tokenizer(), method="malmen")
    model.save_pretrained(world / "malmen")
    (world / "commands.json").write_text(json.dumps(commands(world, "two")))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = run_ranks(2, Path(__file__).parent / "run_commands.py", world / "commands.json", world, env=env)
    assert not any(one.returncode for one in done), [one.stderr for one in done]
    return [json.loads((world / f"{number}.json").read_text()) for number in (0, 1)]


@pytest.mark.parametrize("kind", ["plain", "scoped"])
def test_two_processes_make_the_edits_of_one(world, of_two, kind):
    number = ["plain", "scoped"].index(kind)
    first, second = (found[number] for found in of_two)
    alone = CliRunner().invoke(app, commands(world, "one")[number])
    assert first["exit"] == alone.exit_code == 1, first["stderr"]
    assert (second["exit"], second["stdout"]) == (0, ""), "one process reports"
    one, two = json.loads(alone.stdout), json.loads(first["stdout"])
    assert one["took"] and one["did_not_take"] and one["refused"] == 1, "the file has edits of all kinds"
    assert comparable(two) == comparable(one)
    kept = [load(world, side, kind) for side in ("one", "two")]
    assert [(edit.prompt, edit.target) for edit in kept[0]] == [(edit.prompt, edit.target) for edit in kept[1]]
    assert len(kept[0]) == 2 + one["took"]
    for left, right in zip(*kept, strict=True):
        for name, update in left.updates.items():
            torch.testing.assert_close(dense(update), dense(right.updates[name]), rtol=1e-3, atol=1e-4)


def comparable(document):
    """A report without ids, times, folders and the last digits; earlier edits by what they are of."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items() if name not in ("id", "seconds", "saved")}
        if isinstance(value, list):
            return [plain(one) for one in value]
        return float(f"{value:.3g}") if isinstance(value, float) else value

    found = plain(document)
    for result in found["results"]:
        for name in ("superseded", "nearest", "taken_by"):
            for holder in (result, result.get("scope") or {}):
                if name in holder:
                    holder[name] = holder[name] is not None
    return found


def load(world, side, kind):
    model = EditableModel.from_pretrained(build_model("llama"), world / kind, make_tokenizer())
    model.load_edits(world / side / kind)
    return model.edits


def test_a_single_edit_is_made_and_saved_once(world, of_two):
    first, second = (found[2] for found in of_two)
    assert first["stdout"].count("Edit ") == 1 and "saved in" in first["stdout"], first["stderr"]
    assert (second["exit"], second["stdout"]) == (0, "")
    assert (world / "two" / "single").is_dir()


def test_edits_that_are_found_together_are_not_shared_out(of_two):
    for found in of_two:
        assert found[3]["exit"] == 2
        assert "the method 'malmen' finds the edits of a call for one another, so that 2" in found[3]["stderr"]


def test_a_scope_is_trained_once_and_all_have_it(world, of_two):
    first, second = (found[4] for found in of_two)
    assert (first["exit"], second["exit"]) == (0, 0), first["stderr"] + second["stderr"]
    assert (first.get("train_scope"), second.get("train_scope")) == (1, None)
    assert (first.get("write_card"), second.get("write_card")) == (2, None), "a checkpoint's and the editor's"
    assert "The editor is in" in first["stdout"] and second["stdout"] == ""
    trained = EditableModel.from_pretrained(build_model("llama"), world / "two" / "trained", make_tokenizer())
    assert trained.scope is not None
    assert first["scopes"][-1] == second["scopes"][-1] == scope_id(trained.scope)


def test_alone_a_process_asks_nobody():
    alone, second = Together(), Together(1, 3)
    assert (alone.own([4, 5, 6, 7]), second.own([4, 5, 6, 7])) == ([4, 5, 6, 7], [5])
    assert alone.every("x") == ["x"] and alone.joined([1, 2]) == [1, 2]
    with made_together(1, 3):
        assert processes_of_call() == second
    assert processes_of_call() == alone
