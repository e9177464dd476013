"""The command line: reports, exit codes, and errors of one line, on tiny models saved to a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECORDS, build_model, editable, make_tokenizer, small_config
from typer.testing import CliRunner

import hf_mend
from hf_mend.cli import app
from hf_mend.cli.common import one_line


ROOT = Path(__file__).parent.parent
PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def write_facts(path: Path, count: int = len(RECORDS)) -> Path:
    """The records in CounterFact's layout."""
    rows = [
        {
            "case_id": number,
            "requested_rewrite": {"prompt": "{}", "subject": r.prompt, "target_new": {"str": r.target}},
            "paraphrase_prompts": r.paraphrases,
            "neighborhood_prompts": r.neighborhood,
        }
        for number, r in enumerate(RECORDS[:count])
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an editor that edits, facts and questions."""
    folder = tmp_path_factory.mktemp("cli")
    build_model("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model = editable(build_model("llama"), make_tokenizer())
    model.editor_config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "editor")
    write_facts(folder / "facts.json")
    (folder / "questions.jsonl").write_text('{"question": "what is green?", "answer": ["grass"]}\n' * 3)
    return folder


def invoke(*arguments: object, input: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def test_help_imports_no_torch_and_every_command_shows_an_example():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_mend.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert {"train", "edit", "info"} <= set(names)
    for name in names:
        shown = invoke(name, "--help")
        assert shown.exit_code == 0
        assert f"hf-mend {name} " in shown.output, f"{name} --help shows no example"


def test_no_command_shows_the_help_and_the_version_is_the_package_s():
    assert "Commands:" in invoke().output
    assert invoke("--version").output == f"hf-mend {hf_mend.__version__}\n"


def test_an_edit_is_made_checked_and_kept(world, tmp_path):
    arguments = ("edit", PROMPT, TARGET, "--editor", world / "editor", "--save", tmp_path / "edits", "--max-steps", 9)
    first = invoke(*arguments, "--json")
    assert first.exit_code == 0, first.stderr
    document = json.loads(first.stdout)
    assert document["success"] and "rome" in document["after"] and document["steps"] >= 1
    assert document["probability_after"] > document["probability_before"]

    shown = invoke("info", tmp_path / "edits", "--json")
    assert [edit["target"] for edit in json.loads(shown.stdout)["edits"]] == [TARGET]
    again = invoke("edit", PROMPT, TARGET, "--editor", world / "editor", "--edits", tmp_path / "edits")
    assert again.exit_code == 0
    assert "already the model's answer" in again.stdout


def test_an_edit_that_does_not_take_has_exit_code_1(world):
    done = invoke("edit", "the capital of peru is", "madrid lima oslo rome", "-e", world / "editor", "--max-steps", 1)
    assert done.exit_code == 1
    assert "DID NOT TAKE" in done.stdout
    said = invoke("edit", PROMPT, TARGET, "-e", world / "editor", "--max-steps", 9, "--json", "--paraphrase",
                  "zz xx qq", "--locality", PROMPT)  # fmt: skip
    assert said.exit_code == 1, "the locality probe is the edited prompt itself"
    assert json.loads(said.stdout)["locality"][0]["ok"] is False


def test_info_of_an_editor_loads_no_model(world):
    shown = invoke("info", world / "editor")
    assert shown.exit_code == 0
    assert "an editor (mend) for" in shown.stdout and "LlamaForCausalLM" in shown.stdout
    document = json.loads(invoke("info", world / "editor", "--json").stdout)
    assert document["config"]["rank"] == small_config().rank
    assert document["layers"]["model.layers.1.mlp.up_proj"] == [48, 32]


def test_training_gives_an_editor_that_the_other_commands_take(world, tmp_path):
    done = invoke("train", world / "facts.json", "-m", world / "base", "-o", tmp_path / "mine", "--steps", 2,
                  "--batch-size", 4, "--rank", 4, "--eval-facts", world / "facts.json", "--eval-limit", 3,
                  "--questions", world / "questions.jsonl", "--layers", "1,2", "--target-modules", "paper",
                  "--save-steps", 1, "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["steps"] == 2 and document["metrics"]["eval_edits"] == 3
    assert json.loads(invoke("info", tmp_path / "mine", "--json").stdout)["config"]["layers_to_transform"] == [1, 2]
    more = invoke("train", world / "facts.json", "-m", world / "base", "-o", tmp_path / "mine", "--steps", 3,
                  "--batch-size", 4, "--rank", 4, "--layers", "1,2", "--target-modules", "paper",
                  "--resume")  # fmt: skip
    assert more.exit_code == 0, more.stderr
    assert "after 3 steps" in more.stdout


WRONG = {
    "no such editor": (("edit", "a", "b", "-e", "no/such/folder/here"), "neither a folder here nor the id of"),
    "an empty target": (("edit", PROMPT, " ", "-e", "editor"), "has an empty target"),
    "no chat template": (("edit", "a", "b", "-e", "editor", "--chat"), "leave chat=False"),
    "an unknown dtype": (("edit", "a", "b", "-e", "editor", "--dtype", "int3"), "expected auto, float32"),
    "an unknown quantization": (("edit", "a", "b", "-e", "editor", "--quantization", "3bit"), "expected 4bit or 8bit"),
    "no such edits": (("edit", "a", "b", "-e", "editor", "--edits", "editor"), "edits.safetensors does not exist"),
    "no such base": (("edit", "a", "b", "-e", "editor", "-m", "./nothing"), "nothing"),
    "neither editor nor edits": (("info", "base"), "is not what save_pretrained or save_edits writes"),
    "no facts": (("train", "none.json", "-o", "x"), "none.json does not exist; give a file of facts"),
    "facts of another layout": (("train", "base/config.json", "-o", "x"), "expected a list of records"),
    "layers that are no indices": (("train", "facts.json", "-o", "x", "--layers", "last"), "expected block indices"),
    "an unknown method": (("train", "facts.json", "-m", "base", "-o", "x", "--method", "magic"), "the methods are"),
    "nothing to resume": (("train", "facts.json", "-o", "x", "--resume"), "leave --resume out to begin anew"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_exit_code_2(world, case, monkeypatch):
    arguments, message = WRONG[case]
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("hf-mend: ") and message in line
    assert "Traceback" not in done.stderr
    assert not (world / "x").exists()


def test_the_traceback_is_shown_on_demand(world, monkeypatch):
    wrong = ("edit", "a", " ", "-e", world / "editor")
    assert isinstance(invoke("--debug", *wrong).exception, ValueError)
    monkeypatch.setenv("HF_MEND_DEBUG", "1")
    assert isinstance(invoke(*wrong).exception, ValueError)


def test_a_process_prints_one_json_document_and_keeps_the_rest_off_stdout(world):
    command = [sys.executable, "-m", "hf_mend", "edit", PROMPT, TARGET, "--editor", str(world / "editor"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["prompt"] == PROMPT
    wrong = subprocess.run([*command[:3], "train", "none.json", "-o", "x"], capture_output=True, text=True,
                           check=False, env=environment)  # fmt: skip
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "hf-mend: none.json does not exist; give a file of facts\n"


def test_messages_of_errors_are_one_line():
    assert one_line(ValueError("two\n   lines")) == "two lines"
    assert one_line(KeyError("no edit has the id 'x'")) == "no edit has the id 'x'"
    assert one_line(ValueError()) == "ValueError"
