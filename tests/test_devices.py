"""Offloaded bases: weights on disk or in CPU memory, fetched block by block as Accelerate does."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import RECORDS, all_logits, build_model, editable
from test_trainer import QUESTIONS, arguments, losses

from hf_mend import EditableModel, EditorTrainer


OFFLOADED = ["llama", "gpt2", "t5", "bart"]


def offloaded(architecture: str, how: str, folder) -> torch.nn.Module:
    base = build_model(architecture)
    if how == "cpu":
        return cpu_offload(base, execution_device=torch.device("cpu"))
    return disk_offload(base, str(folder / "weights"), execution_device=torch.device("cpu"), offload_buffers=False)


@pytest.mark.parametrize("architecture", OFFLOADED)
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_base_is_edited_as_one_in_memory(tokenizer, tmp_path, architecture, how):
    plain = editable(build_model(architecture), tokenizer)
    model = editable(offloaded(architecture, how, tmp_path), tokenizer)
    assert any(p.is_meta for p in model.base_model.parameters())
    before = all_logits(model, tokenizer)
    torch.testing.assert_close(before, all_logits(plain, tokenizer))
    for one in (plain, model):
        one.edit(RECORDS[0].prompt, RECORDS[0].target)
    edited = all_logits(model, tokenizer)
    assert not torch.equal(edited, before)
    torch.testing.assert_close(edited, all_logits(plain, tokenizer), rtol=1e-4, atol=1e-4)
    inputs = tokenizer("the capital of peru is", return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=4, do_sample=False),
        plain.generate(**inputs, max_new_tokens=4, do_sample=False),
    )
    model.save_edits(tmp_path / "edits")
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before)
    model.load_edits(tmp_path / "edits")
    assert torch.equal(all_logits(model, tokenizer), edited)
    assert all(p.is_meta for p in model.targets[0].module.parameters())  # nothing stays in memory


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_an_editor_of_an_offloaded_base_trains_and_is_saved(tokenizer, tmp_path, architecture):
    trainers = []
    for name, base in (("plain", build_model(architecture)), ("disk", offloaded(architecture, "disk", tmp_path))):
        options = {"max_steps": 3, "hidden_states_dir": str(tmp_path / name / "states")}
        trainers.append(
            EditorTrainer(
                editable(base, tokenizer), arguments(tmp_path / name, **options), RECORDS, questions=QUESTIONS
            )
        )
        trainers[-1].train()
    assert losses(trainers[1]) == pytest.approx(losses(trainers[0]), rel=1e-3)
    trainers[1].model.save_pretrained(tmp_path / "editor")
    again = EditableModel.from_pretrained(
        offloaded(architecture, "cpu", tmp_path / "again"), tmp_path / "editor", tokenizer=tokenizer
    )
    assert again.edit(RECORDS[0].prompt, RECORDS[0].target).steps >= 1


def test_merging_into_an_offloaded_base_says_what_to_do(tokenizer, tmp_path):
    model = editable(offloaded("llama", "disk", tmp_path), tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    with pytest.raises(TypeError, match="offloaded.*load the base model in memory"):
        model.merge_and_unload()
    model.undo()
