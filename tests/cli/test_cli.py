"""The command line: reports, exit codes, and errors of one line, on tiny models saved to a folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.append_to_store import small_edit
from support.facts import write_facts
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, make_tokenizer, small_config
from support.paths import ROOT
from support.processes import run_python
from support.scope import scoped
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hf_mend
from hf_mend import EditorTrainer, EditorTrainingArguments, EditStore, read_edits
from hf_mend.cli import app
from hf_mend.cli.chat import side_by_side
from hf_mend.cli.common import one_line
from hf_mend.cli.train import EditorOptions


pytestmark = pytest.mark.usefixtures("short_text")

PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
# A scope's training that takes no time: neither steps nor further facts to speak of.
SHORT_SCOPE = ("--scope-steps", "2", "--training", "scope_further_facts=0")


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
    EditStore(folder / "a.store").append([small_edit("a")])
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
    assert {"train", "scope", "edit", "chat", "eval", "compare", "info", "export", "push", "pull"} <= set(names)
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


def test_what_the_model_writes_is_shown_and_a_missed_edit_kept_nowhere(world, tmp_path):
    done = invoke("edit", PROMPT, TARGET, "-e", world / "editor", "--max-steps", 60, "--json")
    document = json.loads(done.stdout)
    (own,) = document["written"]
    assert own["form"] == "prompt" and own["after"].startswith(document["after"].split()[0])
    words = ("edit", "the capital of peru is", "madrid lima oslo rome", "-e", world / "editor", "--max-steps", 1)
    missed = invoke(*words, "--save", tmp_path / "edits")
    assert missed.exit_code == 1 and "DID NOT TAKE, and was taken back" in missed.stdout
    assert saved(tmp_path / "edits") == []


def saved(folder):
    return json.loads(invoke("info", folder, "--json").stdout)["edits"]


@pytest.mark.parametrize(
    ("words", "modules"),
    [
        ("o_proj", ["o_proj"]),
        ("mlp.up_proj, o_proj", ["mlp.up_proj", "o_proj"]),
        ("all-linear", "all-linear"),
        ("paper", "paper"),
        (r".*\.[12]\.mlp\.up_proj", r".*\.[12]\.mlp\.up_proj"),
    ],
)
def test_layers_are_named_as_in_peft(words, modules):
    assert EditorOptions(target_modules=words).as_config().target_modules == modules


def test_an_edit_needs_no_editor(world):
    done = invoke("edit", PROMPT, TARGET, "-m", world / "base", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["success"], "whitened gradient steps take on any model"
    assert document["probability_after"] > document["probability_before"]


@pytest.mark.parametrize("options", [("--dtype", "bfloat16", "--device-map", "cpu"), ("--quantization", "4bit")])
def test_the_base_is_loaded_as_the_options_say(world, options, monkeypatch):
    if "--quantization" in options:
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    from hf_mend import auto as loading

    loaded = []
    load = loading.load_base
    monkeypatch.setattr(loading, "load_base", lambda name, **kwargs: loaded.append(load(name, **kwargs)) or loaded[0])
    done = invoke("edit", PROMPT, TARGET, "-e", world / "editor", "-m", world / "base", *options, "--json")
    assert done.exit_code in (0, 1), done.stderr
    assert json.loads(done.stdout)["steps"] >= 1
    base = loaded[0][0]
    if "--quantization" in options:
        assert base.is_quantized and base.config.quantization_config.load_in_4bit
    else:
        assert base.dtype == torch.bfloat16


def test_an_encoder_decoder_is_edited_by_the_same_command(tmp_path):
    build_model("t5").save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    model = editable(build_model("t5"), make_tokenizer())
    model.editor_config.base_model_name_or_path = str(tmp_path / "t5")
    model.save_pretrained(tmp_path / "editor")
    done = invoke("edit", PROMPT, TARGET, "-e", tmp_path / "editor", "--json")
    assert json.loads(done.stdout)["probability_after"] > json.loads(done.stdout)["probability_before"]
    assert invoke("chat", "-e", tmp_path / "editor", input=PROMPT + "\n").exit_code == 0


def test_code_of_a_model_s_repository_runs_only_when_asked(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}, "model_type": "my"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    by_base = ("edit", PROMPT, TARGET, "-m", tmp_path / "base")
    shutil.copytree(world / "editor", tmp_path / "editor")
    path = tmp_path / "editor" / "editor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    for arguments in (by_base, ("edit", PROMPT, TARGET, "-e", tmp_path / "editor")):
        refused = invoke(*arguments, input="y\n" * 3)  # transformers would ask, and take the pipe for an answer
        assert refused.exit_code == 2 and not (tmp_path / "ran").exists()
    invoke(*by_base, "--trust-remote-code")
    assert (tmp_path / "ran").exists()


def test_info_of_an_editor_loads_no_model(world):
    shown = invoke("info", world / "editor")
    assert shown.exit_code == 0
    assert "method: mend" in shown.stdout and "LlamaForCausalLM" in shown.stdout
    document = json.loads(invoke("info", world / "editor", "--json").stdout)
    assert document["config"]["rank"] == small_config().rank
    assert document["layers"]["model.layers.1.mlp.up_proj"] == [48, 32]
    assert document["scope"] is False and "scope: none, edits act everywhere" in shown.stdout


def test_info_checks_the_scope_of_an_editor(tmp_path):
    folder = tmp_path / "editor"
    scoped(build_model("llama"), make_tokenizer()).save_pretrained(folder)
    assert "scope: edits act where a text asks for them" in invoke("info", folder).stdout
    whole = load_file(folder / "scope.safetensors")
    save_file({**whole, "centre": torch.zeros(7)}, folder / "scope.safetensors")
    assert "scope.safetensors" in invoke("info", folder).stderr
    (folder / "scope.safetensors").unlink()
    refused = invoke("info", folder)
    assert refused.exit_code and "is not whole without that file" in refused.stderr


def test_a_method_s_options_are_shown():
    document = json.loads(invoke("info", "memit", "--json").stdout)
    assert (document["kind"], document["trains"]) == ("method", False)
    assert document["options"]["num_steps"] == {"default": 50, "help": "The most steps of an edit."}
    assert set(document["options"]) == {"edit_lr", "num_steps", "stop_loss", "whiten_ridge", "whiten_rank", "ridge",
                                        "margin"}  # fmt: skip
    shown = invoke("info", "enn").stdout
    assert "enn: method, needs a trained editor" in shown and "  edit_lr=0.001  Initial step" in shown


def test_of_several_methods_each_takes_the_options_that_it_has(world, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        sys.modules["hf_mend.cli.compare"], "measure", lambda name, *args: given.update({name: args[3]}) or {}
    )
    options = ["num_steps=3", "ridge=2", "target_modules=paper"]
    pairs = [word for option in options for word in ("--config", option)]
    invoke("compare", "ft", "gradient", "--data", world / "facts.json", "-o", tmp_path, "-m", world / "base", *pairs)
    assert given == {"ft": [options[0], options[2]], "gradient": options[1:]}


def test_training_gives_an_editor_that_the_other_commands_take(world, tmp_path):
    done = invoke("train", world / "facts.json", "-m", world / "base", "-o", tmp_path / "mine", "--steps", 2,
                  "--batch-size", 4, "--rank", 4, "--eval-facts", world / "facts.json", "--eval-limit", 3,
                  "--questions", world / "questions.jsonl", "--layers", "1,2", "--target-modules", "paper",
                  "--save-steps", 1, "--json", *SHORT_SCOPE)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["steps"] == 2 and document["metrics"]["eval_edits"] == 3
    assert json.loads(invoke("info", tmp_path / "mine", "--json").stdout)["config"]["layers_to_transform"] == [1, 2]
    more = invoke("train", world / "facts.json", "-m", world / "base", "-o", tmp_path / "mine", "--steps", 3,
                  "--batch-size", 4, "--rank", 4, "--layers", "1,2", "--target-modules", "paper",
                  "--resume", *SHORT_SCOPE)  # fmt: skip
    assert more.exit_code == 0, more.stderr
    assert "after 3 steps" in more.stdout


def test_a_scope_is_trained_for_a_model_without_editor_or_facts(world, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mend.training.scope_training._OTHER_FACTS", 8)
    command = ("scope", "-m", world / "base", "-o", tmp_path / "mine", "--steps", 2, "--rounds", 2,
               "--packaged-facts", 12, "--no-bf16")  # fmt: skip
    done = invoke(*command, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["steps"] == 4 and not (tmp_path / "mine-checkpoint.pt").exists()
    model = EditableModel.from_pretrained(build_model("llama"), tmp_path / "mine", make_tokenizer())
    assert model.editor_config.method == "gradient" and model.editor_config.margin == 3.0
    assert float(model.scope.threshold) == pytest.approx(document["threshold"])
    again = invoke(*command[:3], "-o", tmp_path / "again", *command[5:])
    assert again.exit_code == 0 and "after 4 steps" in again.stdout
    first, second = (load_file(tmp_path / name / "scope.safetensors") for name in ("mine", "again"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    edited = invoke("edit", PROMPT, TARGET, "-e", tmp_path / "mine", "-m", world / "base", "--json")
    assert json.loads(edited.stdout)["target"] == TARGET
    (tmp_path / "file").write_text("")
    refused = invoke("scope", "-m", world / "base", "-o", tmp_path / "file")
    assert refused.exit_code == 2 and "file" in refused.stderr


def train_command(world, *options):
    return ("train", world / "facts.json", "-m", world / "base", "--steps", 1, "--batch-size", 4, "--rank", 4,
            *SHORT_SCOPE, *options)  # fmt: skip


def test_editor_and_scope_are_trained_by_one_command(world, tmp_path):
    done = invoke(*train_command(world, "-o", tmp_path / "mine"))
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "mine" / "editor_config.json").read_text())["scope"] is True
    assert "| steps of the scope | 2 |" in (tmp_path / "mine" / "README.md").read_text()
    model = EditableModel.from_pretrained(build_model("llama"), tmp_path / "mine", make_tokenizer())
    assert model.scope.centre.abs().sum() > 0, "zero before training"
    # Gone on from, it keeps its scope, and no option can take that away.
    more = invoke(*train_command(world, "-o", tmp_path / "more", "--start-from", tmp_path / "mine"))
    assert more.exit_code == 0, more.stderr
    assert (tmp_path / "more" / "scope.safetensors").is_file()
    wrong = invoke(*train_command(world, "-o", tmp_path / "x", "--start-from", tmp_path / "mine", "--no-scope"))
    assert wrong.exit_code == 2 and "--start-from takes one as it was saved" in wrong.stderr


def test_an_editor_whose_edits_act_everywhere_is_trained_when_asked_for(world, tmp_path):
    done = invoke(*train_command(world, "-o", tmp_path / "plain", "--no-scope"))
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "plain" / "scope.safetensors").exists()
    path = tmp_path / "plain" / "editor_config.json"
    config = json.loads(path.read_text())
    assert config.pop("scope") is False
    # As editors were saved that knew of no scope.
    path.write_text(json.dumps(config))
    assert EditableModel.from_pretrained(build_model("llama"), tmp_path / "plain", make_tokenizer()).scope is None
    more = invoke(*train_command(world, "-o", tmp_path / "more", "--start-from", tmp_path / "plain"))
    assert more.exit_code == 0, more.stderr
    assert not (tmp_path / "more" / "scope.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "scope"),
    [({}, True), ({"method": "malmen"}, True), ({"method": "ke"}, True), ({"method": "enn"}, False),
     ({"method": "enn", "config": ["method=mend"]}, True), ({"config": ["scope=false"]}, False),
     ({"scope": False}, False), ({"method": "ke", "scope": True}, True)],
)  # fmt: skip
def test_trained_editors_have_a_scope_by_default(options, scope):
    """Of ENN, the change of the weights acts wherever there is an edit, so that it is none."""
    assert EditorOptions(**options).as_config().scope is scope


@pytest.mark.parametrize("method", ["ke", "enn"])
def test_training_a_baseline(world, tmp_path, method):
    done = invoke("train", world / "facts.json", "-m", world / "base", "-o", tmp_path / "mine", "--method", method,
                  "--steps", 1, "--batch-size", 2, "--layers", "1,2", "--json", *SHORT_SCOPE,
                  *(["--rank", 4] if method == "ke" else []))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    edit = invoke("edit", RECORDS[0].prompt, RECORDS[0].target, "-m", world / "base", "-e", tmp_path / "mine",
                  "--json")  # fmt: skip
    assert edit.exit_code in (0, 1), edit.stderr
    assert json.loads(edit.stdout)["before"]


def test_a_file_of_edits_in_one_call(world, tmp_path):
    done = invoke("edit", "--facts", world / "facts.json", "-m", world / "base", "--save", tmp_path / "all", "--json")
    document = json.loads(done.stdout)
    assert document["edits"] == len(RECORDS) == len(document["results"])
    assert document["took"] == sum(result["state"] == "took" for result in document["results"])
    missed = len(RECORDS) - document["took"] - document["already_said"]
    assert document["did_not_take"] == missed and done.exit_code == (1 if missed else 0)
    assert 0 <= document["paraphrases"] <= 1 and 0 <= document["locality"] <= 1
    shown = invoke("edit", "--facts", world / "facts.json", "-m", world / "base").stdout.splitlines()
    assert shown[-1].startswith(f"{document['took']} of {len(RECORDS)} edits took")
    assert shown[0].startswith("record 0  ")


def test_any_option_of_the_library_can_be_given(world, tmp_path):
    done = invoke("train", world / "facts.json", "-m", world / "base", "-o", tmp_path / "mine", "--steps", 1,
                  "--rank", 4, "--config", "whiten=false", "--config", "init=xavier", "--training",
                  "per_device_train_batch_size=3", "--training", "lr_scheduler_type=constant",
                  "--no-scope")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "mine" / "editor_config.json").read_text())
    assert (config["whiten"], config["init"]) == (False, "xavier")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| facts a step | 3 |" in card and "| learning rate | 0.001, constant |" in card
    # Also what has an option of its own.
    done = invoke("train", world / "facts.json", "-m", world / "base", "-o", tmp_path / "other", "--steps", 1,
                  "--config", "rank=3", "--config", "method=malmen", "--config", "layers_to_transform=[2]", "--config",
                  "target_modules=paper", "--config", "scope=false")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "other" / "editor_config.json").read_text())
    found = [config[name] for name in ("rank", "method", "layers_to_transform", "target_modules")]
    assert found == [3, "malmen", [2], "paper"]


WRONG = {
    "no target": (("edit", "a", "-e", "editor"), "give PROMPT and TARGET, or a file of --facts"),
    "a prompt and a file": (("edit", "a", "b", "--facts", "facts.json"), "leave the others out"),
    "no such field": (("train", "facts.json", "-o", "x", "--config", "size=3"), "with a field of EditorConfig"),
    "an option of other methods": (
        ("train", "facts.json", "-o", "x", "--method", "enn", "--rank", "4"),
        "the method 'enn' has no option 'rank' (those that have it: mend, ke, lora, malmen); its options are",
    ),
    "a field of another method": (
        ("train", "facts.json", "-o", "x", "--config", "kl_weight=1"),
        "the method 'mend' has no option 'kl_weight' (those that have it: ft-kl)",
    ),
    "an option that a measured method lacks": (
        ("eval", "gradient", "facts.json", "-m", "base", "--config", "num_steps=3"),
        "the method 'gradient' has no option 'num_steps'",
    ),
    "an option that none of the methods has": (
        ("compare", "gradient", "ultraedit", "--data", "facts.json", "-o", "x", "-m", "base", "--config", "rank=3"),
        "the method 'gradient' has no option 'rank'",
    ),
    "no value": (("train", "facts.json", "-o", "x", "--training", "seed"), "with a field of EditorTrainingArguments"),
    "no such editor": (("edit", "a", "b", "-e", "no/such/folder/here"), "neither a folder here nor the id of"),
    "an empty target": (("edit", PROMPT, " ", "-e", "editor"), "has an empty target"),
    "no chat template": (("edit", "a", "b", "-e", "editor", "--chat"), "leave chat=False"),
    "an unknown dtype": (("edit", "a", "b", "-e", "editor", "--dtype", "int3"), "expected auto, float32"),
    "a device that is not there": (
        ("edit", "a", "b", "-e", "editor", "--device-map", "cuda:99"),
        "the device map is 'cuda:99', which is no device here",
    ),
    "a device that is none": (("edit", "a", "b", "-m", "base", "--device-map", "gpu"), "the device map is 'gpu'"),
    "a file in place of its folder": (("info", "editor/editor.safetensors"), "is a file; give the folder that holds"),
    "a file as the editor": (("edit", "a", "b", "-e", "editor/editor.safetensors"), "is a file; give the folder"),
    "a folder in place of a file of facts": (
        ("edit", "--facts", "editor", "-m", "base"),
        "editor is a folder; give a file of facts",
    ),
    "a store of edits in place of a folder": (("info", "a.store"), "a.store is a store of edits, which model.open_st"),
    "a store of edits to push": (("push", "a.store", "me/x"), "a.store is a store of edits, which model.open_store"),
    "a store of edits as edits": (
        ("edit", "a", "b", "-e", "editor", "--edits", "a.store"),
        "a.store is a store of edits, which model.open_store('a.store') opens",
    ),
    "an unknown quantization": (("edit", "a", "b", "-e", "editor", "--quantization", "3bit"), "expected 4bit or 8bit"),
    "no such edits": (("edit", "a", "b", "-e", "editor", "--edits", "editor"), "edits.safetensors does not exist"),
    "no such base": (("edit", "a", "b", "-e", "editor", "-m", "./nothing"), "nothing"),
    "neither editor nor edits": (("info", "base"), "holds no editor, no saved edits and no LoRA adapter"),
    "no facts": (("train", "none.json", "-o", "x"), "none.json does not exist; give a file of facts"),
    "facts of another layout": (("train", "base/config.json", "-o", "x"), "which are no known layout's"),
    "layers that are no indices": (("train", "facts.json", "-o", "x", "--layers", "last"), "expected block indices"),
    "an unknown method": (("train", "facts.json", "-m", "base", "-o", "x", "--method", "magic"), "the methods are"),
    "a form that is none": (("export", "editor", "x", "--to", "gguf"), "expected lora or merged"),
    "no edits to export": (("export", "editor", "x"), "edits.safetensors does not exist"),
    "nothing to push": (("push", "base", "me/x"), "holds no editor, no saved edits and no LoRA adapter"),
    "a metric without its field": (("eval", "editor", "facts.json", "--metrics", "portability"), "needs the field"),
    "a metric that is none": (("eval", "editor", "facts.json", "--metrics", "taste"), "there is no metric 'taste'"),
    "edits that are no numbers": (
        ("eval", "editor", "facts.json", "--edits", "1,many"),
        "expected numbers with commas",
    ),
    "more edits than facts": (("eval", "editor", "facts.json", "--edits", "99"), "need as many facts"),
    "no data": (("eval", "editor", "none.json"), "there is no file none.json"),
    "unreadable data": (("eval", "editor", "base/model.safetensors"), "is not valid JSON"),
    "a method that needs training": (("eval", "mend", "facts.json", "-m", "base"), "hf-mend train --method mend"),
    "a method's field for an editor": (
        ("eval", "editor", "facts.json", "--config", "ridge=1"),
        "--config is for methods",
    ),
    "nothing to measure": (("eval", "editor", "facts.json", "--no-wild", "--no-teacher-forced"), "leaves nothing to"),
    "a card of a method": (("eval", "gradient", "facts.json", "--card"), "writes into an editor's folder"),
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


def test_a_wrong_dtype_is_told_before_torch_is_imported():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_mend.cli import app\n"
        "done = CliRunner().invoke(app, ['edit', 'a', 'b', '--dtype', 'bf16'])\n"
        "assert done.exit_code == 2 and \"the dtype is 'bf16', expected auto, float32\" in done.stderr, done.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_long_texts_are_shortened_in_print(world, tmp_path):
    model = editable(build_model("llama"), make_tokenizer())
    edit = model.edit(PROMPT, TARGET, max_steps=60)
    model.edits[0].prompt = "river " * 500
    model.save_edits(tmp_path)
    shown = invoke("info", tmp_path)
    assert edit.id in shown.stdout and len(shown.stdout) < 400
    assert json.loads(invoke("info", tmp_path, "--json").stdout)["edits"][0]["prompt"] == "river " * 500
    listed = invoke("chat", "-e", world / "editor", "--edits", tmp_path, input="/list\n/undo\n")
    assert edit.id in listed.stdout and len(listed.stdout) < 400


def test_a_comparison_s_command_runs_again_where_it_was_run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    (world / "data").mkdir(exist_ok=True)
    shutil.copy(world / "facts.json", world / "data" / "facts.json")
    done = invoke("compare", "mine=./editor", "gradient", "--data", "data/facts.json", "-m", "./base", "-o", "out/a",
                  "--limit", 1, "--metrics", "success", "--json", "--no-wild")  # fmt: skip
    document = json.loads(done.stdout)
    assert document["command"] == (
        "hf-mend compare mine=./editor gradient=gradient --data data/facts.json --metrics success --limit 1 "
        "--no-wild --base-model ./base --output out/a"
    )
    again = invoke(*shlex.split(document["command"])[1:], "--json")
    assert json.loads(again.stdout) == document, again.stderr
    shutil.rmtree(world / "out")


def test_the_traceback_is_shown_on_demand(world, monkeypatch):
    wrong = ("edit", "a", " ", "-e", world / "editor")
    assert isinstance(invoke("--debug", *wrong).exception, ValueError)
    monkeypatch.setenv("HF_MEND_DEBUG", "1")
    assert isinstance(invoke(*wrong).exception, ValueError)


@pytest.mark.parametrize("start", ["forked", pytest.param("new", marks=pytest.mark.slow)])
def test_a_process_prints_one_json_document_and_keeps_the_rest_off_stdout(world, start):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def new(*words):
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)

    command = ["-m", "hf_mend", "edit", PROMPT, TARGET, "--editor", str(world / "editor"), "--json"]
    done = run_python(*command, env=environment) if start == "forked" else new(*command)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["prompt"] == PROMPT
    quiet = new("-m", "hf_mend", "info", str(world / "editor"), "--json")
    assert json.loads(quiet.stdout)["method"] == "mend"
    assert quiet.stderr == "", "what other libraries say at import is no part of the answer"
    wrong = new("-m", "hf_mend", "train", "none.json", "-o", "x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "hf-mend: none.json does not exist; give a file of facts\n"


def test_an_editor_is_measured(world, tmp_path):
    shutil.copytree(world / "editor", tmp_path / "editor")
    arguments = ("eval", tmp_path / "editor", world / "facts.json", "--questions", world / "questions.jsonl",
                 "--edits", "1,3", "--limit", 4, "--seed", 7, "-o", tmp_path / "out", "--card",
                 "--no-wild")  # fmt: skip
    done = invoke(*arguments)
    assert done.exit_code == 0, done.stderr
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    (result,) = document["results"]
    assert [(state["edits"], state["measured"]) for state in result["states"]] == [(1, 4), (3, 4)]
    shares = ("edit_success", "generality", "neighborhood", "unrelated", "drawdown", "exact_match", "perplexity")
    assert set(shares) <= set(result["states"][0]["metrics"]) and result["method"] == "mend"
    command = "hf-mend eval editor facts.json --edits 1,3 --limit 4 --seed 7 --questions questions.jsonl --no-wild"
    assert document["command"] == command
    success = result["states"][1]["metrics"]["edit_success"]
    assert re.search(rf"^\| edit success \| .* \| {success:.3f} \[", done.stdout, re.M)
    assert (tmp_path / "out" / "results.md").read_text().startswith(done.stdout.partition("\n\n")[0])
    card = (tmp_path / "editor" / "README.md").read_text()
    assert command in card and "| facts.json, 3 edits kept at once | 4 |" in card and "model-index" in card
    lines = (tmp_path / "out" / "progress.jsonl").read_text().splitlines()
    again = invoke(*arguments, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["results"] == [result], "taken from the file, times and all"
    assert (tmp_path / "out" / "progress.jsonl").read_text().splitlines() == lines


def test_an_editor_is_measured_in_the_wild(world, tmp_path):
    shutil.copytree(world / "editor", tmp_path / "editor")
    arguments = ("eval", tmp_path / "editor", world / "facts.json", "--questions", world / "questions.jsonl",
                 "--edits", "1,2", "--limit", 2, "-o", tmp_path / "out", "--card", "--metrics", "success")  # fmt: skip
    done = invoke(*arguments)
    assert done.exit_code == 0, done.stderr
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [(state["edits"], state["measured"], state["scope"]) for state in result["wild"]] == [
        (1, 2, True),
        (2, 2, True),
    ]
    assert len(result["states"]) == 2 and {"prompt", "behind text", "unrelated: bits"} <= set(
        result["wild"][0]["metrics"]
    )
    assert "perplexity" in result["wild"][1]["metrics"] and result["wild"][1]["decisions"] == {}
    assert (
        done.stdout.index("In the wild") < done.stdout.index("| behind text |") < done.stdout.index("Teacher-forced:")
    )
    card = (tmp_path / "editor" / "README.md").read_text()
    assert "As people meet edits" in card and "Teacher-forced, as the field measures" in card
    assert "| facts.json, 2 edits kept at once (calls of 10) | 2 |" in card
    alone = invoke(*arguments[:-5], "--no-teacher-forced", "--no-scope", "--json")
    assert alone.exit_code == 0, alone.stderr
    document = json.loads(alone.stdout)
    assert document["results"][0]["states"] == [] and document["results"][0]["wild"] == result["wild"], (
        "it has no scope"
    )
    assert document["command"].endswith("--no-teacher-forced --no-scope")


@pytest.mark.parametrize(
    ("method", "field", "option"),
    [("gradient", "margin=1.5", "--edits-per-call"), ("ft", "num_steps=3", "--in-calls-of")],  # the earlier name
)
def test_a_method_is_measured_in_calls(world, method, field, option):
    done = invoke("eval", method, world / "facts.json", "-m", world / "base", "--edits", 4, option, 2,
                  "--metrics", "success", "--config", field, "--json", "--limit", 4, "--no-wild")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    (state,) = result["states"]
    assert (state["edits"], state["edits_per_call"], result["method"]) == (4, 2, method)


def test_a_comparison_tells_how_long_a_training_took(world, tmp_path):
    base, tokenizer = (kind.from_pretrained(world / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    model = EditableModel.from_pretrained(base, world / "editor", tokenizer)
    records = list(read_edits(world / "facts.json"))
    trainer = EditorTrainer(
        model, EditorTrainingArguments(str(tmp_path / "trained"), max_steps=1, report_to=[], use_cpu=True), records
    )
    trainer.train()
    trainer.save_model()
    (tmp_path / "bare").mkdir()
    for name in ("editor_config.json", "editor.safetensors"):
        shutil.copy(world / "editor" / name, tmp_path / "bare" / name)
    done = invoke("compare", tmp_path / "trained", tmp_path / "bare", "gradient", "--data", world / "facts.json", "-m",
                  world / "base", "--metrics", "success", "--limit", 1, "-o", tmp_path / "out",
                  "--no-wild")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    times = [result["training_time"] for result in results]
    assert re.fullmatch(r"\d+\.\d minutes", times[0]) and times[1:] == [None, None]
    head, _, trained, bare, method = (tmp_path / "out" / "results.md").read_text().splitlines()[:5]
    assert head.endswith("| peak memory, MB | training |") and trained.endswith(f"| {times[0]} |")
    assert bare.endswith("|  |") and method.endswith("|  |")


def test_editors_and_methods_are_compared(world, tmp_path):
    arguments = ("compare", f"trained={world / 'editor'}", "gradient", "--data", world / "facts.json", "-m",
                 world / "base", "--edits", "1,2", "--limit", 2, "-o", tmp_path / "out", "--no-wild")  # fmt: skip
    done = invoke(*arguments, "--metrics", "success,neighborhood")
    assert done.exit_code == 0, done.stderr
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["name"], r["method"], len(r["states"])) for r in document["results"]] == [
        ("trained", "mend", 2), ("gradient", "gradient", 2)
    ]  # fmt: skip
    assert document["command"] == (
        "hf-mend compare trained=editor gradient=gradient --data facts.json --edits 1,2 "
        "--metrics success,neighborhood --limit 2 --no-wild --base-model base --output out"
    )
    alone = invoke("eval", "gradient", world / "facts.json", "-m", world / "base", "--edits", "1,2", "--limit", 2,
                   "--metrics", "success,neighborhood", "--json", "--no-wild")  # fmt: skip
    states = json.loads(alone.stdout)["results"][0]["states"]
    assert [s["metrics"] for s in states] == [s["metrics"] for s in document["results"][1]["states"]]
    table = (tmp_path / "out" / "results.md").read_text()
    assert len(re.findall(r"^\| (?:trained|gradient) \| [12] edits? \|", table, re.M)) == 4
    printed = done.stdout.partition("\n\nWritten:")[0].splitlines()
    assert len(re.findall(r"^(?:trained|gradient) +[12] edits? ", done.stdout, re.M)) == 4
    assert all(len(line) <= 80 for line in printed), "the printed table fits a terminal"
    assert (tmp_path / "out" / "report.html").read_text().count("<tr>") >= 5
    lines = (tmp_path / "out" / "progress.jsonl").read_text().splitlines()
    more = invoke(*arguments, "--metrics", "success,neighborhood", "--json")
    assert json.loads(more.stdout)["results"] == document["results"]
    assert (tmp_path / "out" / "progress.jsonl").read_text().splitlines() == lines
    twice = invoke("compare", "gradient", "gradient", "--data", world / "facts.json", "-o", tmp_path / "x")
    assert twice.exit_code == 2 and "are called 'gradient'; give them titles" in twice.stderr


def test_a_comparison_in_the_wild_has_the_figures_of_each_evaluation(world, tmp_path):
    measured = ("-m", world / "base", "--limit", 2, "--metrics", "success")
    done = invoke("compare", "gradient", "ft", "--data", world / "facts.json", *measured, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    alone = invoke("eval", "ft", world / "facts.json", *measured, "--json")
    assert json.loads(alone.stdout)["results"][0]["wild"] == results[1]["wild"]
    for text in (done.stdout, (tmp_path / "out" / "results.md").read_text()):
        wild, _, forced = text.partition("Teacher-forced:")
        assert wild.startswith("In the wild (free answers, in all forms of asking):") and "paraphrase" in wild
        assert len(re.findall(r"^(?:\| )?(?:gradient|ft) ", wild, re.M)) == 2
        assert len(re.findall(r"^(?:\| )?(?:gradient|ft) ", forced, re.M)) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<table>") == 3 and "In the wild" in page
    nothing = invoke("compare", "gradient", "--data", world / "facts.json", *measured, "-o", tmp_path / "x",
                     "--no-wild", "--no-teacher-forced")  # fmt: skip
    assert nothing.exit_code == 2 and "leaves nothing to measure" in nothing.stderr


def test_messages_of_errors_are_one_line():
    assert one_line(ValueError("two\n   lines")) == "two lines"
    assert one_line(KeyError("no edit has the id 'x'")) == "no edit has the id 'x'"
    assert one_line(ValueError()) == "ValueError"


@pytest.fixture(scope="module")
def kept(world, tmp_path_factory) -> Path:
    """A folder with two edits, saved."""
    folder = tmp_path_factory.mktemp("kept") / "edits"
    for record in RECORDS[:2]:
        before = ("--edits", folder) if folder.exists() else ()
        invoke(
            "edit", record.prompt, record.target, "-e", world / "editor", *before, "--save", folder, "--max-steps", 60
        )
    return folder


def test_edits_are_exported_as_an_adapter_without_the_editor(world, kept, tmp_path):
    from peft import PeftModel

    done = invoke("export", kept, tmp_path / "adapter", "-m", world / "base", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"edits": 2, "to": "lora", "output": str(tmp_path / "adapter")}
    model = EditableModel.from_pretrained(build_model("llama"), world / "editor", make_tokenizer())
    model.load_edits(kept)
    expected = all_logits(model, model.tokenizer)
    plain = PeftModel.from_pretrained(build_model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(all_logits(plain, model.tokenizer), expected, rtol=1e-4, atol=1e-4)
    assert "rank" in invoke("info", tmp_path / "adapter").stdout


def test_edits_with_a_scope_are_exported_without_it_and_without_the_editor(tmp_path, caplog):
    """Their scope needs the editor; an adapter has none, and says so."""
    from peft import PeftModel

    model = scoped(build_model("llama"), make_tokenizer())
    model.edit(PROMPT, TARGET, keep_failed=True)
    model.save_edits(tmp_path / "edits")
    model.save_lora(tmp_path / "expected")
    model.unload().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    done = invoke("export", tmp_path / "edits", tmp_path / "adapter", "-m", tmp_path / "base", "--json")
    assert done.exit_code == 0, done.stderr
    assert "in merged weights and LoRA adapters they act everywhere" in caplog.text
    found, expected = (
        all_logits(PeftModel.from_pretrained(build_model("llama"), tmp_path / name), make_tokenizer())
        for name in ("adapter", "expected")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_highest_rank(world, kept, tmp_path):
    from safetensors.torch import load_file

    arguments = ("export", kept, tmp_path / "adapter", "-m", world / "base", "--max-rank", 1)
    told = invoke(*arguments)
    assert told.exit_code == 0 and "Truncated to rank 1: the largest relative error of a layer is 0." in told.stdout
    assert 0 < json.loads(invoke(*arguments, "--json").stdout)["error"] < 1
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {1}
    refused = invoke("export", kept, tmp_path / "x", "-m", world / "base", "--to", "merged", "--max-rank", 1)
    assert refused.exit_code != 0 and "--max-rank 1 goes with --to lora" in refused.stderr


def test_edits_are_merged_into_a_plain_model(world, kept, tmp_path):
    done = invoke("export", kept, tmp_path / "merged", "--to", "merged", "-m", world / "base")
    assert done.exit_code == 0, done.stderr
    model = EditableModel.from_pretrained(build_model("llama"), world / "editor", make_tokenizer())
    model.load_edits(kept)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o644}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = all_logits(model, model.tokenizer)
    torch.testing.assert_close(all_logits(plain, AutoTokenizer.from_pretrained(tmp_path / "merged")), expected,
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_conversation_from_a_pipe(world, tmp_path):
    lines = [PROMPT, f"/edit {PROMPT} => oslo town", PROMPT, "/list", f"/save {tmp_path / 'kept'}", "/undo", PROMPT,
             f"/load {tmp_path / 'kept'}", "/help", "/quit", "/not reached"]  # fmt: skip
    arguments = ("chat", "-e", world / "editor", "--max-new-tokens", 6)
    done = invoke(*arguments, "--json", input="\n".join(lines))
    turns = json.loads(done.stdout)["turns"]
    assert len(turns) == 9
    first, edited, second, listed, saved, undone, third, loaded, _ = turns
    assert first["before"] == first["after"] == second["before"] == third["after"], "undo brings the answer back"
    assert edited["edit"]["target"] == "oslo town" and second["after"] != second["before"]
    assert [edit["id"] for edit in listed["edits"]] == [undone["undone"]["id"]] == [edited["edit"]["id"]]
    assert saved["count"] == 1 and loaded["loaded"] == listed["edits"]
    assert done.exit_code == (0 if edited["ok"] else 1)
    shown = invoke(*arguments, input="\n".join(lines[:3]))
    assert re.search(r"^before +\| after$", shown.stdout, re.M)


def test_what_is_wrong_in_a_conversation_is_said_and_it_goes_on(world):
    lines = ["/edit no arrow", "/undo", "/undo nothing", "/dance", "/save", "/load no/such/folder/here",
             f"/edit {PROMPT} =>", "/list"]  # fmt: skip
    done = invoke("chat", "-e", world / "editor", input="\n".join(lines) + "\n")
    assert done.exit_code == 1
    said = done.stdout.splitlines()
    expected = ["write /edit PROMPT => TARGET", "no edit to undo", "no edit to undo", "the commands are /edit",
                "write /save FOLDER", "neither a folder", "has an empty target"]  # fmt: skip
    for part, line in zip(expected, said, strict=False):
        assert line.startswith("! ") and part in line
    assert said[-1] == "no edits yet"


def test_two_columns():
    text = side_by_side("one two three", "", width=23)
    assert text.splitlines() == ["before     | after", "one two    | (nothing)", "three      |"]


def test_push_and_pull_of_an_editor_and_of_edits(world, kept, tmp_path, hub):
    for folder, name in ((world / "editor", "me/editor"), (kept, "me/edits")):
        pushed = invoke("push", folder, name, "--message", "First", "--json")
        assert pushed.exit_code == 0, pushed.stderr
        document = json.loads(pushed.stdout)
        assert document["commit"] in json.loads(invoke("pull", name, tmp_path / "here", "--json").stdout)["commit"]
        for file in document["files"]:
            same = (tmp_path / "here" / file).read_bytes() == (folder / file).read_bytes()
            assert same or file == "README.md"
        shutil.rmtree(tmp_path / "here")
    card = invoke("pull", "me/editor", tmp_path / "again") and (tmp_path / "again" / "README.md").read_text()
    assert 'from_pretrained("me/editor")' in card
    assert json.loads(invoke("info", "me/editor", "--json").stdout)["kind"] == "editor"
    said = invoke("chat", "-e", "me/editor", "-m", world / "base", "--edits", "me/edits", "--json", input="/list\n")
    assert [edit["target"] for edit in json.loads(said.stdout)["turns"][0]["edits"]] == [r.target for r in RECORDS[:2]]


def test_what_the_hub_does_not_give_is_named(kept, tmp_path, hub, monkeypatch):
    def said(*arguments):
        done = invoke(*arguments)
        assert done.exit_code == 2 and done.stdout == ""
        return done.stderr.strip().splitlines()[-1]

    assert "me/nosuch on the Hub does not exist, or is private: check the name" in said("info", "me/nosuch")
    invoke("push", kept, "me/edits")
    assert "me/edits on the Hub has no revision 'v9'" in said("info", "me/edits", "--revision", "v9")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    for command in (("info", "nosuch"), ("info", "me/nosuch", "--revision", "v1"), ("pull", "me/no", tmp_path / "x")):
        line = said(*command)
        assert f"{command[1]} on the Hub is not in the cache and could not be fetched" in line
        assert "try again with a connection" in line


def test_a_failed_pull_leaves_the_folder(world, tmp_path, hub):
    invoke("pull", "me/editor", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "words").write_text("mine")
    for name in ("me/nothing", "not/a/repository"):
        failed = invoke("pull", name, tmp_path / "mine")
        assert failed.exit_code == 2 and failed.stdout == ""
        assert failed.stderr.strip().splitlines()[-1].startswith("hf-mend: ")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["words"]
