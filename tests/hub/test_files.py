"""What is on disk: saving is atomic, and nothing damaged or foreign is ever used."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, small_config

from hf_mend import EditorConfig, get_editable_model
from hf_mend.auto import load_edited
from hf_mend.bases.fingerprint import fingerprint_of
from hf_mend.hub.atomic import replaced_folder
from hf_mend.hub.files import read_json_file, read_tensors


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


def test_edits_of_other_layers_load_and_are_exported(llama, tokenizer, tmp_path):
    """What counts is the base, whatever layers the model's editor would edit."""
    model = EditableModel(build_model("llama"), tokenizer=tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, force=True)
    model.save_edits(tmp_path / "one")
    other = EditableModel(build_model("llama"), EditorConfig(layers_to_transform=[1]), tokenizer)
    other.load_edits(tmp_path / "one")
    torch.testing.assert_close(all_logits(other, tokenizer), all_logits(model, tokenizer), rtol=1e-4, atol=1e-4)
    other.save_edits(tmp_path / "two")
    build_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load_edited(str(tmp_path / "two"), str(tmp_path / "base"))
    torch.testing.assert_close(all_logits(loaded, tokenizer), all_logits(model, tokenizer), rtol=1e-4, atol=1e-4)


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
from hf_mend.hub.atomic import replaced_folder
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


# ---- what a stranger's files may try ----


def changed(path, **values):
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 65536}, "was altered, or they belong to different editors"),
        ({"rank": 10**30}, "rank is 10000.*at most 65536"),
        ({"num_hidden_layers": 65536}, "num_hidden_layers is 65536, expected .* at most 64"),
        ({"num_hidden_layers": 64}, "does not fit its configuration: missing tensors"),
        ({"layers_to_transform": list(range(10**6))}, "layers_to_transform is .*, expected a list of block indices"),
        ({"layers_to_transform": [10**400]}, "layers_to_transform is"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is"),
        ({"layers_to_transform": [True]}, "layers_to_transform is"),
        ({"edit_lr": 10**400}, "edit_lr is"),
        ({"edit_lr": "1e-3"}, "edit_lr is '1e-3'"),
        ({"revision": {"a": 1}}, "revision is"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is"),
        ({"base_model_name_or_path": "x" * 10**6}, "base_model_name_or_path is 'xxxx.{,250}, expected"),
        ({"layers_pattern": 3}, "layers_pattern is 3"),
        ({"method": "../mend"}, "method is '../mend'; the methods are"),
        ({"method": ["mend"]}, "method is"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type is"),
        ({"target_modules": "x" * 10**6}, "target_modules is 'xxxx.{,250}, expected"),
        ({"target_modules": ["a"] * 10**6}, "target_modules is"),
        ({"target_modules": "(" * 1999}, "is not a regular expression"),
        ({"target_modules": "(a"}, "is not a regular expression"),
        ({"target_modules": "a{9999999999999999999999}"}, "is not a regular expression"),
        ({"base_fingerprint": [1]}, "base_fingerprint is"),
        ({"base_fingerprint": {"layers": {"a": 1}}}, "base_fingerprint was altered"),
        ({"base_fingerprint": {"architecture": "A" * 10**6, "layers": {}, "sha256": 3}}, "fingerprint was altered"),
        ({"base_fingerprint": {"architecture": "A" * 10**6, "layers": {}, "sha256": ""}}, "do not fit .{,600}$"),
    ],
)  # fmt: skip
def test_configurations_of_absurd_size_or_type(saved, tokenizer, values, message):
    changed(saved / "editor_config.json", **values)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved, tokenizer)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"edit_lr": 1e400}', "edit_lr is inf"),
        ('{"edit_lr": NaN}', "NaN is not JSON"),
        ('{"edit_lr": -Infinity}', "is not JSON"),
        ('{"rank": %s}' % ("9" * 5000), "is not valid JSON"),
        ('{"rank": 8, "rank": 4}', "a name stands twice"),
        ('{"base_fingerprint": %s}' % ('{"a":' * 100_000 + "1" + "}" * 100_000), "is not valid JSON"),
        ('{"base_fingerprint": %s}' % ('{"a":' * 200 + "1" + "}" * 200), "is nested more than 32 levels deep"),
        ('{"\ud800": 1}', "(not valid JSON|unknown fields)"),
        ("", "is not valid JSON"),
        ('"' + " " * (33 << 20) + '"', "has .* bytes, too many for a file of settings"),
    ],
)
def test_json_that_is_none_or_too_much(saved, tokenizer, text, message):
    (saved / "editor_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message):
        load(saved, tokenizer)


EVIL = [r"(a+)+$", r"((((.*)*)*)*)*(?<=!)", r"(\w|\w\w|.)*(?<=!)", r"(?:.*.*.*.*.*.*.*.*.*.*)(?<=!)"]
EVIL.append(r"(.|..|...|....)*(?:\1)(?<!l.)(?<=!)")  # the one that even regex takes years for


@pytest.mark.parametrize("pattern", EVIL)
def test_a_regular_expression_cannot_hang(saved, tokenizer, monkeypatch, pattern):
    monkeypatch.setattr("hf_mend.bases.patterns.MATCHING_SECONDS", 0.3)
    changed(saved / "editor_config.json", target_modules=pattern)
    with pytest.raises(ValueError, match="(matches no layer|is not a regular expression of the kind that is matched)"):
        load(saved, tokenizer)


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(a={**TENSOR, "shape": [2**40], "data_offsets": [0, 2**42]}), "file not fully covered"),
        (header(a={**TENSOR, "shape": [2**40]}) + b"1234", "not a whole safetensors file.*invalid shape"),
        (header(a={**TENSOR, "shape": [2**32, 2**32, 2**32]}) + b"1234", "overflow computing buffer size"),
        (header(a={**TENSOR, "shape": [-1]}) + b"1234", "has the header"),
        (header(a={**TENSOR, "shape": [1.0]}) + b"1234", "has the header"),
        (header(a={**TENSOR, "shape": [1] * 50}) + b"1234", "has the header"),
        (header(a={**TENSOR, "dtype": "I64"}) + b"1234", "has dtype 'I64', expected a floating-point one"),
        (header(a={**TENSOR, "dtype": ["F32"]}) + b"1234", "has dtype"),
        (header(a=TENSOR, b=TENSOR) + b"1234", "invalid offset for tensor"),
        (header(a={**TENSOR, "data_offsets": [4, 8]}) + b"12345678", "invalid offset for tensor"),
        (header(a=TENSOR) + b"12345678", "file not fully covered"),
        (header(**{"x" * 5000: TENSOR}) + b"1234", "has a tensor named 'xxx"),
        (header(**{"a\n\x1b[31m": TENSOR}) + b"1234", "has a tensor named"),
        (header(a=[1, 2, 3]), "has the header"),
        (header(a=["F32", [1], [0, 4]]) + b"1234", "has the header"),
        (header(a={**TENSOR, "shape": [2**63, 0], "data_offsets": [0, 0]}), "has the header"),
        (header(a={**TENSOR, "data_offsets": [4, 0]}) + b"1234", "invalid offset"),
        (header(a=TENSOR) + b"12", "not fully covered"),
        (header(a={**TENSOR, "dtype": "I32"}) + b"1234", "has dtype 'I32'"),
        (header(__metadata__=None, a=TENSOR) + b"1234", "metadata are not strings"),
        (header(__metadata__={"a": 1}, a=TENSOR) + b"1234", "metadata are not strings"),
        (header()[:8] + b'{"a":1,"a":2}', "(a name stands twice|is not valid JSON)"),
        (b'\x0d\0\0\0\0\0\0\0{"a":1,"a":2}', "a name stands twice"),
        ((2**63).to_bytes(8, "little") + b"{}", "a header of 9223372036854775808 bytes"),
        ((50 << 20).to_bytes(8, "little") + b" " * (51 << 20), "a header of 52428800 bytes"),
        (b"PK\x03\x04" + b"\0" * 100, "is not a whole safetensors file"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path, content, message):
    path = tmp_path / "editor.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)


def test_a_lying_header_takes_no_memory(saved, tokenizer):
    """Of the configuration's claim, the header's, or both together."""
    path = saved / "editor.safetensors"
    whole = path.read_bytes()
    entries = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    name = next(name for name in entries if name.endswith("up"))
    entries[name]["shape"] = [2**20, 2**20]
    path.write_bytes(header(**entries) + whole[8 + int.from_bytes(whole[:8], "little") :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="its configuration says"):
        load(saved, tokenizer)
    with pytest.raises(ValueError, match="is not a whole safetensors file.*invalid shape"):
        read_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_weights_too_large_for_float32(tmp_path):
    save_file({"a": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "editor.safetensors")
    with pytest.raises(ValueError, match="a holds NaN or infinity"):
        read_tensors(tmp_path / "editor.safetensors")


def test_saving_writes_through_no_link(saved, tokenizer, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("editor_config.json", "README.md", "editor.safetensors"):
        shutil.copy(saved / name, outside / name)
        (saved / name).unlink()
        (saved / name).symlink_to(outside / name)
    (saved / "more").symlink_to(outside / "nothing")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    model = load(saved, tokenizer)
    model.editor_config.edit_lr = 0.5
    model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert load(saved, tokenizer).editor_config.edit_lr == 0.5
    assert not any((saved / name).is_symlink() for name in before)


def test_saving_where_the_folder_cannot_be_renamed(saved, tokenizer, monkeypatch):
    model = load(saved, tokenizer)
    model.save_pretrained(saved, max_shard_size="10KB")
    (saved / "notes.txt").write_text("mine")
    monkeypatch.chdir(saved)
    model.editor_config.edit_lr = 0.25
    model.save_pretrained(".")
    assert {path.name for path in saved.iterdir()} == {
        "README.md", "config.json", "editor_config.json", "editor.safetensors", "notes.txt",
    }  # fmt: skip
    assert load(".", tokenizer).editor_config.edit_lr == 0.25
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_through_a_link_to_a_folder(saved, tokenizer, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    for lr in (0.25, 0.5):
        model = load(tmp_path / "link", tokenizer)
        model.editor_config.edit_lr = lr
        model.save_pretrained(tmp_path / "link")
        assert load(saved, tokenizer).editor_config.edit_lr == lr and (tmp_path / "link").is_symlink()


# ---- shards ----


def test_a_large_editor_in_shards(saved, tokenizer):
    whole = load(saved, tokenizer)
    whole.save_pretrained(saved, max_shard_size=20_000)
    index = json.loads((saved / "editor.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and not (saved / "editor.safetensors").exists()
    assert {path.name for path in saved.glob("*.safetensors")} == set(shards)
    # Another reader of the same format sees the same tensors.
    there = {name: value for shard in shards for name, value in load_file(saved / shard).items()}
    state = whole.editor.state_dict()
    assert there.keys() == state.keys() and all(torch.equal(there[name], state[name]) for name in state)
    again = load(saved, tokenizer)
    assert all(torch.equal(value, state[name]) for name, value in again.editor.state_dict().items())
    again.save_pretrained(saved, max_shard_size="1GB")
    assert {path.name for path in saved.iterdir()} == {
        "README.md", "config.json", "editor_config.json", "editor.safetensors",
    }  # fmt: skip
    assert load(saved, tokenizer).editor_config == whole.editor_config


def test_shards_that_do_not_fit_their_index(saved, tokenizer):
    load(saved, tokenizer).save_pretrained(saved, max_shard_size=20_000)
    path = saved / "editor.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    first, other = (index["weight_map"][name] for name in (names[0], names[-1]))
    assert first != other

    def with_map(**changes):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], **changes}}))

    with_map(**{names[0]: other})
    with pytest.raises(ValueError, match="missing tensors|unexpected"):
        load(saved, tokenizer)
    with_map(**{names[0]: "../editor/" + first})
    with pytest.raises(ValueError, match="names the file .*expected one like editor-00001-of-00002.safetensors"):
        load(saved, tokenizer)
    with_map(**{"another.tensor": first})
    with pytest.raises(ValueError, match="unexpected .*another.tensor"):
        load(saved, tokenizer)
    path.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="has no weight_map"):
        load(saved, tokenizer)
    with_map()
    assert load(saved, tokenizer)
    shutil.copy(saved / first, saved / "kept")
    (saved / first).write_bytes((saved / first).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{first} is not a whole safetensors file"):
        load(saved, tokenizer)
    (saved / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"{first} does not exist"):
        load(saved, tokenizer)


# ---- edits of a stranger ----

EDIT = {"id": "a", "prompt": "p", "target": "t", "metadata": {}}


@pytest.mark.parametrize(
    ("entries", "names", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, ("0.x.u", "0.x.v"), "is not valid JSON"),
        (json.dumps([{**EDIT, "metadata": {"a": "b" * 10}}])[:-1], ("0.x.u", "0.x.v"), "is not valid JSON"),
        (json.dumps({"0": EDIT}), ("0.x.u", "0.x.v"), "not a collection of edits"),
        (json.dumps([{**EDIT, "id": 3}]), ("0.x.u", "0.x.v"), "not a collection of edits"),
        (json.dumps([{**EDIT, "prompt": {"a": 1}}]), ("0.x.u", "0.x.v"), "not a collection of edits"),
        (json.dumps([{**EDIT, "metadata": {"time": [1]}}]), ("0.x.u", "0.x.v"), "not a collection of edits"),
        (json.dumps([EDIT]), ("-1.x.u", "-1.x.v"), "not a collection of edits"),
        (json.dumps([EDIT]), ("00.x.u", "00.x.v"), "not a collection of edits"),
        (json.dumps([EDIT]), ("\u0660.x.u", "\u0660.x.v"), "not a collection of edits"),
        (json.dumps([EDIT]), ("1.x.u", "1.x.v"), "not a collection of edits"),
        (json.dumps([EDIT]), ("0.x.u", "0.y.v"), "not a collection of edits"),
        (json.dumps([EDIT]), ("0.x.u", "0.x.w"), "not a collection of edits"),
        (json.dumps([EDIT]), ("0..u", "0..v"), "not a collection of edits"),
        (json.dumps([EDIT]), ("0.x.u", "0.x.v"), "belong to another model or editor"),
    ],
)  # fmt: skip
def test_headers_of_edits_that_lie(llama, tokenizer, tmp_path, entries, names, message):
    model = editable(llama, tokenizer)
    tensors = {name: torch.zeros(1, 4) for name in names}
    save_file(tensors, tmp_path / "edits.safetensors", metadata={"edits": entries})
    with pytest.raises(ValueError, match=message) as caught:
        model.load_edits(tmp_path)
    assert model.edits == [] and len(str(caught.value)) < 3000


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "settings.json").write_bytes(b'{"name": "Llama\xc2\xe9"}')
    with pytest.raises(ValueError, match="settings.json is not valid JSON .*'utf-8' codec can't decode"):
        read_json_file(tmp_path / "settings.json")


def test_an_error_of_safetensors_is_cut_short(tmp_path):
    path = tmp_path / "edits.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": "x" * 100_000}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="is not a whole safetensors file") as caught:
        read_tensors(path)
    assert len(str(caught.value)) < 1000
