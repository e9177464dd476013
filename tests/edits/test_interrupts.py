"""A call that is interrupted at any line of it has happened or it has not, and the model's answers say which."""

from __future__ import annotations

import pytest
import torch
from support.edits import random_edit
from support.injection import InjectedError, interrupted, lines_of, some_of
from support.interrupts import CALLS, checked, interrupted_merges, kinds
from support.models import all_logits, build_model, editable

from hf_mend.edits.layer_sum import LayerSum


@pytest.mark.parametrize(("name", "with_scope", "with_store"), kinds())
def test_a_call_interrupted_at_any_of_some_lines_has_happened_or_not(
    tokenizer, tmp_path, name, with_scope, with_store
):
    model = checked(name, tokenizer, tmp_path, with_scope, with_store)
    assert model.interrupt(some_of(model.lines, 15)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "with_scope", "with_store"), kinds())
def test_a_call_interrupted_at_any_line_has_happened_or_not(tokenizer, tmp_path, name, with_scope, with_store):
    model = checked(name, tokenizer, tmp_path, with_scope, with_store)
    for seed, error in enumerate((InjectedError, KeyboardInterrupt, MemoryError)):
        assert model.interrupt(some_of(model.lines, 10**6, seed), error) == []


@pytest.mark.parametrize("name", ["edit", "undo", "compress_edits"])
def test_a_store_and_its_model_agree_after_an_interrupt(tokenizer, tmp_path, name):
    base = build_model("llama")
    model = editable(base, tokenizer)
    edits = [random_edit(model, str(i), seed=i) for i in range(3)]
    model._active.replace(edits)
    lines = lines_of(lambda: CALLS[name](model))
    model.undo_all()
    for number in some_of(lines, 20, seed=1):
        path = tmp_path / str(number)
        model.open_store(path)
        model._active.replace(edits)
        where = interrupted(lambda: CALLS[name](model), number)
        here = [(edit.id, edit.enabled) for edit in model.edits]
        model.close_store()
        model.undo_all()
        there = [(edit.id, edit.enabled) for edit in model.open_store(path)]
        assert sorted(there) == sorted(here), where
        model.close_store()
        model.undo_all()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merge_interrupted_at_any_line_has_happened_or_not(tokenizer, architecture, safe):
    interrupt, lines = interrupted_merges(tokenizer, architecture, safe)
    assert interrupt(some_of(lines, 25)) == []


def test_a_merge_that_fails_at_its_third_layer_changes_nothing(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer)
    weights = {name: value.clone() for name, value in llama.state_dict().items()}
    model._active.replace([random_edit(model)])
    before, made = all_logits(model, tokenizer), []
    matrix = LayerSum.matrix

    def failing(self, device):
        made.append(self)
        if len(made) == 3:
            raise MemoryError
        return matrix(self, device)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSum, "matrix", failing)
        with pytest.raises(MemoryError):
            model.merge_and_unload()
    assert torch.equal(all_logits(model, tokenizer), before)
    assert all(torch.equal(value, weights[name]) for name, value in llama.state_dict().items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(all_logits(merged, tokenizer), before, rtol=1e-3, atol=1e-4)
