"""A call that is interrupted at any line of it has happened or it has not, and the model's answers say which."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.edits import random_edit
from support.injection import InjectedError, interrupted, lines_of, some_of
from support.interrupts import CALLS, checked, interrupted_merges, kinds
from support.models import all_logits, build_model, editable

from hf_mend import EditStore
from hf_mend.edits.layer_sum import LayerSum


_KEPT: list[object] = []


@pytest.fixture(autouse=True)
def torch_functions():
    """A signal may land between two instructions of torch's own, which leaves its overrides off for this thread."""
    yield
    if not torch._C._is_torch_function_enabled():
        _KEPT.append(torch._C._EnableTorchFunction())
        _KEPT[-1].__enter__()


@pytest.mark.parametrize(("name", "with_scope", "with_store"), kinds())
def test_a_call_interrupted_at_any_of_some_lines_has_happened_or_not(
    tokenizer, tmp_path, name, with_scope, with_store
):
    model = checked(name, tokenizer, tmp_path, with_scope, with_store)
    assert model.interrupt(some_of(model.lines, 8)) == []


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


@pytest.mark.parametrize("name", ["undo", "disable_edit"])
def test_at_every_line_between_a_model_and_its_store_both_have_the_change_or_none(tokenizer, tmp_path, name):
    model = checked(name, tokenizer, tmp_path, with_store=True)
    model.set_up()
    lines = lines_of(model.run)  # not those of the first time, which makes files and fills caches
    between = {line: n for n, line in enumerate(lines, start=1) if line[0].endswith(("active.py", "store.py"))}
    assert len(between) > 50
    assert model.interrupt(sorted(between.values())) == []


def test_a_store_whose_opening_is_interrupted_is_the_models_with_all_or_has_none_of_its_edits(tokenizer, tmp_path):
    model, good, path = editable(build_model("llama"), tokenizer), tmp_path / "good", tmp_path / "store"
    model.open_store(good)
    model._active.replace([random_edit(model, "there", seed=1)])
    model.close_store()
    here = [random_edit(model, "here", seed=2)]

    def made_ready():
        model.close_store()
        model._active.replace(here)
        shutil.copy(good, path)

    for _ in range(2):  # the first time fills caches
        made_ready()
        lines = lines_of(lambda: model.open_store(path))
    between = {line: n for n, line in enumerate(lines, start=1) if line[0].endswith(("active.py", "store.py"))}
    for number in {*between.values(), *some_of(lines, 20)}:
        made_ready()
        where = interrupted(lambda: model.open_store(path), number)
        opened, mine = model._active.store is not None, [edit.id for edit in model.edits]
        assert mine == (["there", "here"] if opened else ["here"]), where
        assert EditStore(path).edits.ids == (["there", "here"] if opened else ["there"]), where


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
