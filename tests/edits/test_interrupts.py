"""A call that is interrupted at any line of it has happened or it has not, and the model's answers say which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from support.edits import random_edit
from support.injection import interrupted, lines_of, some_of
from support.models import RECORDS, all_logits, build_model, editable
from support.scope import scoped

from hf_mend import Edit, EditableModel
from hf_mend.edits.layer_sum import LayerSum


PROMPT, TARGET = RECORDS[4].prompt, "rome"


def _disabled(model: EditableModel) -> None:
    with model.disable_edits():
        pass


def _edited(model: EditableModel) -> None:
    with model.edited(PROMPT, TARGET, max_steps=1, force=True):
        pass


def _carrying(model: EditableModel) -> None:
    with model.carrying(list(model.edits)[:1]):
        all_logits(model, model.tokenizer)


CALLS: dict[str, Callable[[EditableModel], object]] = {
    "edit": lambda model: model.edit(PROMPT, TARGET, max_steps=2, force=True),
    "undo": lambda model: model.undo(model.edits[0].id),
    "undo_all": lambda model: model.undo_all(),
    "disable_edit": lambda model: model.disable_edit(model.edits[0].id),
    "compress_edits": lambda model: model.compress_edits(2),
    "disable_edits": _disabled,
    "edited": _edited,
    "carrying": _carrying,
    "a pass": lambda model: all_logits(model, model.tokenizer),
    "generate": lambda model: model.generate(torch.tensor([[5, 9, 7]]), max_new_tokens=2, do_sample=False),
}


class Checked:
    """A model with some edits, and what its edits and logits are before a call and after it."""

    def __init__(self, model: EditableModel, edits: list[Edit], call: Callable[[EditableModel], object]):
        self.model, self.call = model, call
        self.plain = self._logits()
        model._active.replace(edits)
        self.before = list(model.edits), self._logits()
        self.lines = lines_of(self._run)
        self.after = len(model.edits), self._logits()

    def _run(self) -> object:
        return self.call(self.model)

    def _logits(self) -> torch.Tensor:
        return all_logits(self.model, self.model.tokenizer)

    def interrupt(self, numbers: Iterable[int]) -> list[str]:
        """Interrupt the call at each of these lines, and return where what was left is wrong."""
        wrong = []
        for number in numbers:
            self.model._active.replace(self.before[0])
            where = interrupted(self._run, number)
            edits, logits = self.model.edits, self._logits()
            not_done = edits == self.before[0] and torch.equal(logits, self.before[1])
            done = len(edits) == self.after[0] and torch.equal(logits, self.after[1])
            if not (not_done or done):
                wrong.append(f"{where}: not the logits of the edits")
            self.model.undo_all()
            if not torch.equal(self._logits(), self.plain):
                wrong.append(f"{where}: not the base's logits after undo_all")
            if self._leftovers():
                wrong.append(f"{where}: hooks or forwards are left")
        return wrong

    def _leftovers(self) -> bool:
        modules = [*self.model.base_model.modules()]
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        return hooked or any("forward" in module.__dict__ for module in modules)


def _checked(name: str, tokenizer, tmp_path, with_scope: bool, with_store: bool) -> Checked:
    model = (scoped if with_scope else editable)(build_model("llama"), tokenizer)
    if with_scope:
        model.edit(RECORDS[0].prompt, "rome", max_steps=1, force=True)
        model.edit(PROMPT, "lima", max_steps=1, force=True)
        edits = list(model.edits)
        model.undo_all()
    else:
        edits = [random_edit(model, str(i), seed=i) for i in range(3)]
    if name == "load_edits":
        others = [random_edit(model, f"other {i}", seed=10 + i) for i in range(3)]
        model._active.replace(others)
        model.save_edits(tmp_path)
        model.undo_all()
        return Checked(model, edits, lambda model: model.load_edits(tmp_path))
    if with_store:
        model.open_store(tmp_path / "store")
    return Checked(model, edits, CALLS[name])


def _kinds() -> list[tuple[str, bool, bool]]:
    plain = [(name, False, False) for name in [*CALLS, "load_edits"]]
    with_scope = [(name, True, False) for name in CALLS if name != "compress_edits"]
    return [*plain, *with_scope, *((name, False, True) for name in ("edit", "undo", "disable_edit"))]


@pytest.mark.parametrize(("name", "with_scope", "with_store"), _kinds())
def test_a_call_interrupted_at_any_of_some_lines_has_happened_or_not(
    tokenizer, tmp_path, name, with_scope, with_store
):
    checked = _checked(name, tokenizer, tmp_path, with_scope, with_store)
    assert checked.interrupt(some_of(checked.lines, 20)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "with_scope", "with_store"), _kinds())
def test_a_call_interrupted_at_any_line_has_happened_or_not(tokenizer, tmp_path, name, with_scope, with_store):
    checked = _checked(name, tokenizer, tmp_path, with_scope, with_store)
    numbers = {number for seed in range(3) for number in some_of(checked.lines, 10**6, seed)}
    assert checked.interrupt(sorted(numbers)) == []


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
    base = build_model(architecture)
    model = editable(copy.deepcopy(base), tokenizer)
    edit = random_edit(model)
    model._active.replace([edit])
    before = all_logits(model, tokenizer)
    lines = lines_of(lambda: model.merge_and_unload(safe))
    after = all_logits(model.base_model, tokenizer)
    wrong = []
    for number in some_of(lines, 25):
        model = editable(copy.deepcopy(base), tokenizer)
        model._active.replace([edit])
        where = interrupted(lambda model=model: model.merge_and_unload(safe), number)
        done = model.edits == [] and torch.equal(all_logits(model.base_model, tokenizer), after)
        if not done:
            not_done = len(model.edits) == 1 and torch.equal(all_logits(model, tokenizer), before)
            model.undo_all()
            plain = torch.equal(all_logits(model, tokenizer), all_logits(base, tokenizer))
            if not (not_done and plain):
                wrong.append(where)
    assert wrong == []


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
