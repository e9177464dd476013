"""What is on disk: saving is atomic, and nothing damaged or foreign is ever used."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import RECORDS, all_logits, build_model, editable, small_config

from hf_mend import EditableModel, EditorConfig, get_editable_model
from hf_mend.files import replaced_folder
from hf_mend.fingerprint import fingerprint_of


@pytest.fixture
def saved(llama, tokenizer, tmp_path):
    llama.config._name_or_path = "somebody/llama"
    model = get_editable_model(llama, small_config(), tokenizer)
    model.save_pretrained(tmp_path / "editor")
    return tmp_path / "editor"


def load(folder, tokenizer, base=None):
    return EditableModel.from_pretrained(base if base is not None else build_model("llama"), folder, tokenizer)


def test_nothing_of_this_machine_is_stored(saved):
    text = (saved / "editor_config.json").read_text() + (saved / "README.md").read_text()
    assert "somebody/llama" in text and str(saved) not in text


@pytest.mark.parametrize("name", ["editor_config.json", "editor.safetensors"])
def test_missing_files(saved, tokenizer, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        load(saved, tokenizer)


def test_neither_folder_nor_repository(tokenizer):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor the id of a repository"):
        load("no/such/folder/here", tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is not valid JSON"),
        (lambda text: "[]", "holds a list, expected a JSON object"),
        (lambda text: text.replace('"rank": 8', '"rank": -1'), "rank is -1, expected a whole number"),
        (lambda text: text.replace('"rank": 8', '"rank": "8"'), "rank is '8', expected a whole number"),
        (lambda text: text.replace('"rank"', '"ranks"'), r"unknown fields \['ranks'\]"),
        (lambda text: text.replace('"rank": 8', '"rank": 4'), "was altered, or they belong to different editors"),
        (lambda text: text.replace('"method": "mend"', '"method": "magic"'), "method is 'magic'; the methods are"),
        (lambda text: text.replace('"shared": true', '"shared": false'), "does not fit its configuration"),
        (lambda text: text.replace('"architecture"', '"architect"'), "base_fingerprint was altered"),
    ],
)
def test_altered_configurations(saved, tokenizer, change, message):
    path = saved / "editor_config.json"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    base = build_model("llama").train()
    with pytest.raises(ValueError, match=message):
        load(saved, tokenizer, base)
    assert base.training and all(p.requires_grad for p in base.parameters()), "the base model is as it was"


def test_truncated_and_foreign_weights(saved, tokenizer):
    path = saved / "editor.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:100], b"", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load(saved, tokenizer)


def test_weights_that_are_not_finite(saved, tokenizer):
    model = load(saved, tokenizer)
    with torch.no_grad():
        model.editor.groups[0].log_step[0] = float("nan")
    model.save_pretrained(saved)
    with pytest.raises(ValueError, match="log_step holds NaN or infinity"):
        load(saved, tokenizer)


def test_a_base_of_other_shapes(saved, tokenizer):
    base = build_model("opt")
    with pytest.raises(ValueError, match="(matches no layer|do not fit)"):
        load(saved, tokenizer, base)
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = LlamaForCausalLM(LlamaConfig(vocab_size=160, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                         num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match=r"made for 'somebody/llama', whose edited layers do not fit"):
        load(saved, tokenizer, wider)


def test_another_base_of_the_same_shapes_gives_a_warning_that_names_both(saved, tokenizer, caplog):
    other = build_model("llama", seed=5)
    other.config._name_or_path = "another/llama"
    load(saved, tokenizer)
    assert not caplog.records
    load(saved, tokenizer, other)
    assert re.search("somebody/llama.*another/llama", caplog.text)


def test_the_fingerprint_is_the_same_in_bfloat16(llama, tokenizer):
    model = get_editable_model(llama.bfloat16(), small_config(), tokenizer)
    half = fingerprint_of(llama, model.targets)
    assert fingerprint_of(llama.float(), model.targets) == half
    with torch.no_grad():
        model.targets[0].module.weight.mul_(1.5)
    assert fingerprint_of(llama, model.targets) != half


def test_edits_of_another_model_do_not_load(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    model.save_edits(tmp_path)
    with pytest.raises(ValueError, match="the model carries the edit"):
        model.load_edits(tmp_path)
    assert len(model.edits) == 1
    other = editable(build_model("gpt2"), tokenizer)
    with pytest.raises(ValueError, match="do not fit"):
        other.load_edits(tmp_path)
    assert other.edits == []
    path = tmp_path / "edits.safetensors"
    path.write_bytes(path.read_bytes().replace(b'{\\"id\\"', b'{\\"ix\\"'))
    fresh = editable(build_model("llama"), tokenizer)
    with pytest.raises(ValueError, match="not a collection of edits, or its header was altered"):
        fresh.load_edits(tmp_path)
    with pytest.raises(FileNotFoundError):
        fresh.load_edits(tmp_path / "nothing")


def test_a_users_files_and_card_are_kept(saved, tokenizer):
    (saved / "README.md").write_text("my own words")
    (saved / "notes.txt").write_text("mine")
    load(saved, tokenizer).save_pretrained(saved)
    assert (saved / "README.md").read_text() == "my own words" and (saved / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_earlier_folder(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(RuntimeError), replaced_folder(saved) as folder:
        (folder / "editor.safetensors").write_bytes(b"half")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_process_killed_in_the_middle_leaves_the_earlier_folder_whole(saved, tokenizer):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    script = """
import os, signal, sys
from hf_mend.files import replaced_folder
with replaced_folder(sys.argv[1]) as folder:
    (folder / "editor.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(saved)], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    load(saved, tokenizer)


def test_a_process_killed_between_the_two_renames(saved, tokenizer):
    os.rename(saved, saved.parent / f".{saved.name}.previous")
    model = load(saved, tokenizer)
    assert model.editor_config.rank == 8 and saved.is_dir()


def test_loading_runs_no_code_and_reads_no_pickle(saved, tokenizer, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr("pickle.load", forbidden)
    load(saved, tokenizer)


# ---- the configuration ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1"),
        ({"rank": True}, "rank is True"),
        ({"transform": "half"}, "transform is 'half', expected one of"),
        ({"init": "zeros"}, "init is 'zeros', expected 'identity' or 'xavier'"),
        ({"edit_lr": -1.0}, "edit_lr is -1.0, expected a positive number"),
        ({"edit_lr": float("nan")}, "edit_lr is nan"),
        ({"task_type": "CLS"}, "task_type is 'CLS'"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform is"),
        ({"normalize": 1}, "normalize is 1, expected True or False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EditorConfig(**options)


def test_configuration_round_trip(tmp_path):
    config = EditorConfig(target_modules=["fc1"], layers_to_transform=[1], rank=3, transform="x")
    path = tmp_path / "editor_config.json"
    path.write_text(config.to_json())
    assert EditorConfig.from_json_file(path) == config
    assert json.loads(config.to_json())["target_modules"] == ["fc1"]


def test_logits_do_not_depend_on_saving(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    before = all_logits(model, tokenizer)
    model.save_pretrained(tmp_path / "x")
    assert torch.equal(all_logits(model, tokenizer), before)
