"""Calls that an interrupt may end, and what must be true of a model that one was called on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hf_mend import Edit, EditableModel
from hf_mend.bases import threads
from hf_mend.edits import growing, layer_sum

from .edits import random_edit
from .injection import InjectedError, interrupted, lines_of
from .models import RECORDS, all_logits, build_model, editable
from .scope import scoped


PROMPT, TARGET = RECORDS[4].prompt, "rome"
Call = Callable[[EditableModel], object]


def _disabled(model: EditableModel) -> None:
    with model.disable_edits():
        pass


def _edited(model: EditableModel) -> None:
    with model.edited(PROMPT, TARGET, max_steps=1, force=True):
        pass


def _carrying(model: EditableModel) -> None:
    with model.carrying(list(model.edits)[:1]):
        all_logits(model, model.tokenizer)


CALLS: dict[str, Call] = {
    "edit": lambda model: model.edit(PROMPT, TARGET, max_steps=2, force=True),
    "edit taken back": lambda model: model.edit(PROMPT, TARGET, max_steps=1, force=True, keep_failed=False),
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
# Those of models whose edits have a scope alone.
SCOPED_CALLS: dict[str, Call] = {
    "include": lambda model: model.include(model.edits[0].id, RECORDS[5].prompt),
    "exclude": lambda model: model.exclude(model.edits[0].id, RECORDS[5].prompt),
    "which_edits": lambda model: model.which_edits(PROMPT),
}
Kind = tuple[str, bool, bool]  # a call, of a model with a scope, of one with a store


def kinds() -> list[Kind]:
    """All calls, of models with and without scopes and stores."""
    plain = [(name, False, False) for name in [*CALLS, "load_edits", "load_lora"]]
    with_scope = [(name, True, False) for name in [*CALLS, *SCOPED_CALLS, "load_edits"] if name != "compress_edits"]
    stored = [(name, False, True) for name in ("edit", "edit taken back", "undo", "undo_all", "disable_edit")]
    stored += [(name, True, True) for name in ("edit", "undo", "exclude")]
    return [*plain, *with_scope, *stored]


class Checked:
    """A model with some edits, and what its edits and logits are before a call and after it."""

    def __init__(self, model: EditableModel, edits: Sequence[Edit], call: Call):
        self.model, self.call = model, call
        self.plain = self._logits()
        model._active.replace(edits)
        self.before = list(model.edits), self._logits()
        self.lines = lines_of(self.run)
        self.after = [*map(_said, model.edits)], self._logits()

    def run(self) -> object:
        return self.call(self.model)

    def set_up(self) -> None:
        """Give the model the edits that it had."""
        self.model._active.replace(self.before[0])

    def _logits(self) -> torch.Tensor:
        return all_logits(self.model, self.model.tokenizer)

    def interrupt(self, numbers: Iterable[int], error: type[BaseException] = InjectedError) -> list[str]:
        """Interrupt the call at each of these lines, and return where what was left is wrong."""
        wrong = []
        for number in numbers:
            self.set_up()
            where = interrupted(self.run, number, error)
            wrong += [f"{where}: {fault}" for fault in self.faults()]
        return wrong

    def faults(self) -> list[str]:
        """Say what is wrong with the model after the call, which was interrupted, and undo all edits."""
        wrong = []
        edits, logits = self.model.edits, self._logits()
        not_done = [*map(_with_id, edits)] == [*map(_with_id, self.before[0])] and torch.equal(logits, self.before[1])
        done = [*map(_said, edits)] == self.after[0] and torch.equal(logits, self.after[1])
        if not (not_done or done):
            wrong.append("not the logits of the edits")
        store = self.model._active.store
        if store is not None and _told(store.refresh()) != _told(edits):
            wrong.append("the store and the model hold different edits")
        self.model.undo_all()
        if not torch.equal(self._logits(), self.plain):
            wrong.append("not the base's logits after undo_all")
        if self._leftovers():
            wrong.append("hooks or forwards are left")
        active = self.model._active
        return wrong + held_locks(active.lock, active._hooking, *([] if store is None else [store._alone]))

    def _leftovers(self) -> bool:
        modules = [*self.model.base_model.modules()]
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        return hooked or any("forward" in module.__dict__ for module in modules)


def held_locks(*locks: Any) -> list[str]:
    """Say which locks of the library this thread holds, which is in no call: other threads would wait for ever."""
    every = [*locks, threads._replacing, growing._growing, layer_sum._summing]
    return [f"{lock} is held" for lock in every if lock._is_owned()]


def _said(edit: Edit) -> tuple[str, str, bool, int]:
    return edit.prompt, edit.target, edit.enabled, 0 if edit.scope is None else len(edit.scope.texts)


def _with_id(edit: Edit) -> tuple[object, ...]:
    return edit.id, *_said(edit)


def _told(edits: Iterable[Edit]) -> list[tuple[str, bool]]:
    return sorted((edit.id, edit.enabled) for edit in edits)


def checked(
    name: str, tokenizer: PreTrainedTokenizerFast, folder: Path, with_scope: bool = False, with_store: bool = False
) -> Checked:
    """Make a model with some edits for a call; files are written to the folder."""
    model = (scoped if with_scope else editable)(build_model("llama"), tokenizer)
    if with_scope:
        model.edit(RECORDS[0].prompt, "rome", max_steps=1, force=True)
        model.edit(PROMPT, "lima", max_steps=1, force=True)
        edits = list(model.edits)
    else:
        edits = [random_edit(model, str(i), seed=i) for i in range(3)]
    if name in ("load_edits", "load_lora"):
        if with_scope:
            model.undo_all()
            model.edit(RECORDS[2].prompt, "oslo", max_steps=1, force=True)
        else:
            model._active.replace([random_edit(model, f"other {i}", seed=10 + i) for i in range(3)])
        (model.save_edits if name == "load_edits" else model.save_lora)(folder)
        model.undo_all()
        return Checked(model, edits, lambda model: getattr(model, name)(folder))
    model.undo_all()
    if with_store:
        model.open_store(folder / "store")
    return Checked(model, edits, (CALLS | SCOPED_CALLS)[name])


def interrupted_merges(
    tokenizer: PreTrainedTokenizerFast, architecture: str = "llama", safe: bool = False
) -> tuple[Callable[..., list[str]], list[tuple[str, int]]]:
    """
    Return a function that interrupts `merge_and_unload` at lines, as `Checked.interrupt` does other calls, and its
    lines.
    """
    base = build_model(architecture)
    model = editable(copy.deepcopy(base), tokenizer)
    edit = random_edit(model)
    model._active.replace([edit])
    before = all_logits(model, tokenizer)
    lines = lines_of(lambda: model.merge_and_unload(safe))
    after, plain = all_logits(model.base_model, tokenizer), all_logits(base, tokenizer)

    def interrupt(numbers: Iterable[int], error: type[BaseException] = InjectedError) -> list[str]:
        wrong = []
        for number in numbers:
            model = editable(copy.deepcopy(base), tokenizer)
            model._active.replace([edit])
            where = interrupted(lambda model=model: model.merge_and_unload(safe), number, error)
            if model.edits == [] and torch.equal(all_logits(model.base_model, tokenizer), after):
                continue
            not_done = len(model.edits) == 1 and torch.equal(all_logits(model, tokenizer), before)
            model.undo_all()
            if not (not_done and torch.equal(all_logits(model, tokenizer), plain)):
                wrong.append(f"{where}: neither merged nor as it was")
        return wrong

    return interrupt, lines
