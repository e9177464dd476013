"""`AutoEditableModel`: base, tokenizer and editor from the editor's name."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend import AutoEditableModel, EditableModel


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
