"""`hf-mend edit --facts`: the table of what took, and what is saved of the rest."""

from __future__ import annotations

import json

import pytest
from support.models import RECORDS, build_model, editable, make_tokenizer
from typer.testing import CliRunner

from hf_mend import EditRecord, read_edits
from hf_mend.cli import app
from hf_mend.cli.edit_file import Row, report_of_file, save_what_took


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


LOG = [
    {"ticket": 1, "question": f"{PROMPT} ", "answer": "oslo"},
    {"ticket": 2, "question": PROMPT, "answer": TARGET},
    {"ticket": 3, "question": "the capital of peru is", "answer": "river " * 80},
    {"ticket": 4, "question": "", "answer": "n/a"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base model, an editor that edits, and a log of corrections with all that such logs have."""
    folder = tmp_path_factory.mktemp("edit-file")
    build_model("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model = editable(build_model("llama"), make_tokenizer())
    model.editor_config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "editor")
    text = "\ufeff" + "\r\n".join(json.dumps(row) for row in LOG)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def edit_log(world, *more):
    return invoke("edit", "--facts", world / "log.jsonl", "-e", world / "editor", "--max-steps", 9, *more)


def test_a_table_tells_of_every_row_by_its_line(world):
    done = edit_log(world)
    lines = done.stdout.splitlines()
    assert done.exit_code == 1
    assert lines[0] == f"line 2  took          {PROMPT!r} -> {TARGET!r}"
    assert lines[1].startswith("line 3  REFUSED       'the capital of peru is' -> 'river river") and "..." in lines[1]
    assert "tokens with its target, the model takes 64" in lines[1] and len(lines[1]) < 300
    assert "kept as metadata: ticket" in lines[2]
    assert lines[3] == "1 of 4 rows: left out (line 4: 'question' is blank)"
    assert lines[4] == "1 of 4 rows: an earlier answer to the same question, left out (line 1, by line 2)"
    assert lines[5:] == ["1 of 2 edits took, 1 refused"]


def test_the_document_has_the_same(world):
    document = json.loads(edit_log(world, "--json").stdout)
    assert [document[name] for name in ("edits", "took", "already_said", "did_not_take", "refused")] == [2, 1, 0, 0, 1]
    assert [row["where"] for row in document["results"]] == ["line 2", "line 3"]
    assert [row["state"] for row in document["results"]] == ["took", "refused"]
    assert document["results"][0]["success"] and document["results"][1]["why"] and len(document["notes"]) == 3


@pytest.fixture
def rows_of_all_states(world):
    """A model, and a row of each state: what took, was said already, missed, and could not be tried."""
    model = editable(build_model("llama"), make_tokenizer())
    records = [
        EditRecord(PROMPT, TARGET, where="line 2"),
        EditRecord(PROMPT, TARGET, where="line 3"),
        EditRecord("the seat of egypt is", "madrid lima oslo rome " * 4, where="line 14", metadata={"ticket": 4}),
    ]
    rows = [Row(one, model.edit(one, max_steps=steps)) for one, steps in zip(records, (60, 1, 1), strict=True)]
    return model, [*rows, Row(EditRecord("the river", "x", where="line 15"), refused="is too long")]


def test_the_table_has_four_states_and_says_why(rows_of_all_states):
    report = report_of_file(rows_of_all_states[1], ["a note"])
    lines = report.text.splitlines()
    assert lines[0] == f"line 2   took          {PROMPT!r} -> {TARGET!r}"
    assert lines[1] == f"line 3   already said  {PROMPT!r} -> {TARGET!r}"
    assert lines[2].startswith("line 14  DID NOT TAKE  'the seat of egypt is' -> 'madrid lima oslo rome ma...")
    assert "tokens right after 1 step)" in lines[2]
    assert lines[3] == "line 15  REFUSED       'the river' -> 'x'  (is too long)"
    assert lines[4:] == [
        "a note",
        "What did not take may with more steps (--max-steps 40) or with answers in other words.",
        "1 of 4 edits took, 1 already said, 1 did not take, 1 refused",
    ]
    rows_of_all_states[1][2].result.token_success = [False] * 300
    again = report_of_file(rows_of_all_states[1], [])
    assert "in other words, and those of more than a hundred tokens in short." in again.text
    assert not report.ok and report.document["took"] == report.document["did_not_take"] == 1


def test_what_took_is_saved_and_the_rest_kept_for_another_try(world, tmp_path, rows_of_all_states):
    model, rows = rows_of_all_states
    rest = tmp_path / "kept" / "did_not_take.jsonl"
    said = save_what_took(model, rows, tmp_path / "kept")
    assert said == f"1 of 4 edits saved in {tmp_path / 'kept'}; the 2 that did not take are in {rest}"
    assert [edit.target for edit in model.edits] == [TARGET], "what did not take is taken back"
    again = editable(build_model("llama"), make_tokenizer())
    assert [edit.target for edit in again.load_edits(tmp_path / "kept")] == [TARGET]
    records = list(read_edits(rest))
    assert [record.prompt for record in records] == ["the seat of egypt is", "the river"]
    assert records[0].metadata["ticket"] == 4 and records[0].metadata["where"] == "line 14"
    assert "right after" in records[0].metadata["why"] and records[1].metadata["why"] == "is too long"
    # A row stays in the list until it is asked again, and when nothing is left over, the list is gone.
    for made, (prompt, target, end) in enumerate(
        [("the seat of egypt is", "oslo", f"; 1 of earlier files are still in {rest}"), ("the river", TARGET, "")]
    ):
        (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": prompt, "target": target}))
        done = invoke("edit", "--facts", tmp_path / "more.jsonl", "-e", world / "editor", "--edits", tmp_path / "kept",
                      "--save", tmp_path / "kept", "--max-steps", 60)  # fmt: skip
        assert done.exit_code == 0, done.output
        last = done.stdout.splitlines()[-1]
        assert last == f"1 of 1 edit saved in {tmp_path / 'kept'}, beside {made + 1} made earlier{end}"
    assert not rest.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--on-conflict", "error"), "line 1 and line 2 have two answers to"),
        (("--prompt-column", "ask"), "line 1 has no column 'ask'; its columns are ['answer', 'question', 'ticket']"),
    ],
)
def test_what_is_refused_is_one_line(world, options, message):
    done = edit_log(world, *options)
    assert done.exit_code == 2 and done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("hf-mend: ") and message in line


def test_a_file_of_which_no_row_can_be_tried_is_refused(world, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"question": "river " * 80, "answer": "x"}))
    done = invoke("edit", "--facts", tmp_path / "t.jsonl", "-e", world / "editor")
    assert done.exit_code == 2 and "the model takes 64; shorten the prompt" in done.stderr


def test_a_table_s_columns_are_named_for_an_edit_and_for_a_training(world, tmp_path):
    text = "Frage;Antwort;Stand\n" + "".join(f"{r.prompt};{r.target};2026\n" for r in RECORDS)
    (tmp_path / "t.csv").write_text(text)
    named = ("--prompt-column", "Frage", "--target-column", "Antwort")
    done = invoke("edit", "--facts", tmp_path / "t.csv", "-e", world / "editor", *named, "--json")
    assert [row["prompt"] for row in json.loads(done.stdout)["results"]] == [record.prompt for record in RECORDS]
    short = ("--scope-steps", 2, "--training", "scope_further_facts=0")
    done = invoke(
        "train", tmp_path / "t.csv", "-m", world / "base", "-o", tmp_path / "mine", "--steps", 1, *named, *short
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "mine" / "editor.safetensors").is_file()


def saved_targets(folder):
    return [row["target"] for row in json.loads(invoke("info", folder, "--json").stdout)["edits"]]


def test_saving_adds_to_what_the_folder_holds(world, tmp_path):
    one = ("edit", PROMPT, TARGET, "-e", world / "editor", "--max-steps", 60, "--save", tmp_path / "edits")
    assert invoke(*one).exit_code == 0
    other = RECORDS[3]
    again = invoke("edit", other.prompt, other.target, *one[3:])
    assert "2 edits saved" in again.stdout
    assert saved_targets(tmp_path / "edits") == [TARGET, other.target]
    edit_log(world, "--save", tmp_path / "edits")
    assert saved_targets(tmp_path / "edits")[:2] == [TARGET, other.target]


def test_saving_never_replaces_edits(world, tmp_path):
    """Two folders cannot both come first, and the edits of another base, or damaged ones, cannot be added to."""
    one = ("edit", PROMPT, TARGET, "-e", world / "editor", "--max-steps", 60, "--save")
    invoke(*one, tmp_path / "a")
    invoke(*one, tmp_path / "b")
    file = tmp_path / "a" / "edits.safetensors"
    before = file.read_bytes()
    both = invoke(*one, tmp_path / "a", "--edits", tmp_path / "b")
    assert both.exit_code == 2 and "holds edits, which those of --edits" in both.stderr and "new folder" in both.stderr
    stranger = editable(build_model("gpt2"), make_tokenizer())
    stranger.edit(PROMPT, TARGET, max_steps=1)
    stranger.save_edits(tmp_path / "gpt2")
    before_gpt2 = (tmp_path / "gpt2" / "edits.safetensors").read_bytes()
    assert invoke(*one, tmp_path / "gpt2").exit_code == 2
    (tmp_path / "b" / "edits.safetensors").write_bytes(b"damaged")
    assert invoke(*one, tmp_path / "b").exit_code == 2
    assert file.read_bytes() == before
    assert (tmp_path / "gpt2" / "edits.safetensors").read_bytes() == before_gpt2
    assert (tmp_path / "b" / "edits.safetensors").read_bytes() == b"damaged"


def test_rows_that_an_earlier_file_left_stay_until_they_are_asked_again(world, tmp_path, rows_of_all_states):
    model, rows = rows_of_all_states
    save_what_took(model, rows, tmp_path)
    text = save_what_took(model, [Row(EditRecord("the moon", "y", where="line 1"), refused="is too long")], tmp_path)
    assert [row.prompt for row in read_edits(tmp_path / "did_not_take.jsonl")] == [
        "the seat of egypt is", "the river", "the moon",
    ]  # fmt: skip
    assert "2 of earlier files are still in" in text
    took = model.edit(EditRecord("the river", TARGET), force=True, max_steps=60)
    save_what_took(model, [Row(EditRecord("the river", TARGET, where="line 1"), took)], tmp_path)
    assert "the river" not in [row.prompt for row in read_edits(tmp_path / "did_not_take.jsonl")]


@pytest.mark.parametrize("command", ["edit", "train", "export", "eval", "compare", "pull"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(world, tmp_path, command, monkeypatch):
    monkeypatch.setattr("hf_mend.auto.load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr("hf_mend.auto.load_smollm2", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("not a folder")
    place, log = tmp_path / "file" / "out", world / "log.jsonl"
    words = {
        "edit": ["edit", "--facts", log, "--save", place],
        "train": ["train", log, "--output", place],
        "export": ["export", tmp_path, place],
        "eval": ["eval", "gradient", log, "--output", place],
        "compare": ["compare", "gradient", "--data", log, "--output", place],
        "pull": ["pull", "me/editor", place],
    }[command]
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert f"{place} cannot be a folder, since {tmp_path / 'file'} is a file" in done.stderr
