"""Offloaded bases: weights on disk or in CPU memory, fetched block by block as Accelerate does."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from support.models import RECORDS, EditableModel, all_logits, build_model, editable
from support.slow import slow_but
from support.training import QUESTIONS, arguments, losses

from hf_mend import EditorTrainer


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


@pytest.mark.parametrize("architecture", OFFLOADED)
def test_no_offloaded_weight_is_held_for_the_backward_pass(tokenizer, tmp_path, monkeypatch, architecture):
    model = editable(offloaded(architecture, "disk", tmp_path), tokenizer)
    shapes = {tuple(p.shape) for block in model.split.blocks for p in block.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    held: list[int] = []
    backward = torch.autograd.grad

    def count_first(loss, *args, **kwargs):
        seen, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            for name in dir(node):
                if name.startswith("_raw_saved_"):
                    held.extend(_weights_in(getattr(node, name), shapes))
        return backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", count_first)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=2)
    assert held == []
    assert all(p.is_meta for block in model.split.blocks for p in block.parameters())
    held.clear()
    plain = editable(build_model(architecture), tokenizer)
    plain.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=2)
    assert held  # where weights are in memory anyway they are not computed twice


def _weights_in(saved, shapes) -> list[tuple[int, ...]]:
    """Shapes of the weights that a graph node keeps; what a checkpoint recomputes is a placeholder, not a tensor."""
    found = []
    for one in saved if isinstance(saved, tuple) else [saved]:
        data = getattr(one, "data", None)
        if isinstance(data, torch.Tensor) and tuple(data.shape) in shapes:
            found.append(tuple(data.shape))
    return found


@pytest.mark.parametrize("architecture", slow_but(["llama"], ["llama", "t5"]))
def test_an_editor_of_an_offloaded_base_trains_and_is_saved(tokenizer, tmp_path, architecture):
    trainers = []
    for name, base in (("plain", build_model(architecture)), ("disk", offloaded(architecture, "disk", tmp_path))):
        options = {"max_steps": 2, "hidden_states_dir": str(tmp_path / name / "states")}
        trainers.append(
            EditorTrainer(
                editable(base, tokenizer), arguments(tmp_path / name, **options), RECORDS[:4], questions=QUESTIONS
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
