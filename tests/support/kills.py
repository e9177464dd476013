"""Processes that write and are killed: each tells what it has done, and what the disk holds is compared with that."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from hf_mend import EditorTrainer, EditStore
from hf_mend.training.soundness import last_whole_checkpoint

from .append_to_store import small_edit
from .edits import random_edit
from .models import RECORDS, EditableModel, build_model, editable
from .training import QUESTIONS, arguments, fresh


Tell = Callable[[int], None]


def killed(work: Callable[[Tell], None], delay: float) -> list[int]:
    """
    Run work in a process of its own, kill it so many seconds after the first number that it tells, and return the
    numbers that it told.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda number: os.write(writing, number.to_bytes(4, "little")) and None)
        finally:
            os._exit(1)
    os.close(writing)
    told = os.read(reading, 4)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 1 << 16):
        told += more
    os.close(reading)
    return [int.from_bytes(told[i : i + 4], "little") for i in range(0, len(told) - 3, 4)]


class StoredEdits:
    """Calls of three edits each with an open store; every third is taken back in one call, and the store compacted."""

    name = "edits with an open store"
    seconds = 0.2

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast):
        self.path, self.base, self.tokenizer = folder / "store", build_model("llama"), tokenizer

    def work(self, tell: Tell) -> None:
        model = editable(self.base, self.tokenizer)
        model.open_store(self.path)
        first = len(model.edits) and 1 + max(int(edit.id.split("-")[0]) for edit in model.edits)
        tell(first)
        for number in range(first + 1, first + 1000):
            model._active.replace([*model.edits, *(random_edit(model, f"{number}-{i}", 1, number) for i in range(3))])
            tell(number)
            if number % 3 == 0:
                model._active.remove([f"{number}-{i}" for i in range(3)])
                EditStore(self.path).compact()
                tell(number + 1_000_000)

    def check(self, told: list[int]) -> list[str]:
        edits = editable(self.base, self.tokenizer).open_store(self.path) if self.path.exists() else []
        held: dict[int, int] = {}
        for edit in edits:
            number = int(edit.id.split("-")[0])
            held[number] = held.get(number, 0) + 1
        done = [number for number in told[1:] if number < 1_000_000]
        last = max(done, default=told[0])
        wrong = [f"call {n} is half there" for n, count in held.items() if count != 3]
        lost = [n for n in done if n not in held and n % 3]
        back = [n - 1_000_000 for n in told[1:] if n > 1_000_000 and n - 1_000_000 in held]
        beyond = [n for n in held if n > last + 1]
        if os.path.exists(self.path) and os.path.getsize(self.path) > 300_000:
            self.path.unlink()
        return wrong + [f"call {n} is lost" for n in lost] + [f"undo of {n} is lost" for n in back] + [
            f"call {n} was never made" for n in beyond
        ]  # fmt: skip


class StoreCalls:
    """Calls of four small edits of a store without a model: nearly all of the time is the store's own."""

    name = "a store's appends"
    seconds = 0.1

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast):
        self.path = folder / "small"

    def work(self, tell: Tell) -> None:
        store = EditStore(self.path)
        first = len(store) // 4
        tell(first)
        for number in range(first + 1, first + 2000):
            store.append([small_edit(f"{number}-{i}", i) for i in range(4)])
            tell(number)

    def check(self, told: list[int]) -> list[str]:
        ids = EditStore(self.path).edits.ids if self.path.exists() else []
        expected = [f"{n}-{i}" for n in range(1, len(ids) // 4 + 1) for i in range(4)]
        calls = len(ids) // 4
        if len(ids) > 2000:
            self.path.unlink()
        if ids != expected:
            return [f"calls are half there: {ids[-5:]}"]
        return [] if told[-1] <= calls <= told[-1] + 1 else [f"{calls} calls are there, {told[-1]} were told"]


class SavedEdits:
    """`save_edits` again and again, each with other edits."""

    name = "save_edits"
    seconds = 0.1

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast):
        self.folder, self.model = folder / "edits", editable(build_model("llama"), tokenizer)

    def work(self, tell: Tell) -> None:
        tell(0)
        for number in range(1, 1000):
            self.model._active.replace([random_edit(self.model, f"{number}-{i}", 1, number) for i in range(3)])
            self.model.save_edits(self.folder)
            tell(number)

    def check(self, told: list[int]) -> list[str]:
        return _one_of_last(self._load, told, self.folder)

    def _load(self) -> int:
        edits = self.model.load_edits(self.folder)
        self.model.undo_all()
        numbers = {int(edit.id.split("-")[0]) for edit in edits}
        assert len(edits) == 3 and len(numbers) == 1, f"edits of several calls: {[edit.id for edit in edits]}"
        return numbers.pop()


class SavedEditors:
    """`save_pretrained` again and again, each with other weights and edits."""

    name = "save_pretrained"
    seconds = 0.3

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast):
        self.folder, self.base, self.tokenizer = folder / "editor", build_model("llama"), tokenizer

    def work(self, tell: Tell) -> None:
        model = editable(self.base, self.tokenizer)
        tell(0)
        for number in range(1, 1000):
            with torch.no_grad():
                for parameter in model.editor.parameters():
                    parameter.fill_(float(number))
            model._active.replace([random_edit(model, f"{number}", 1, number)])
            model.save_pretrained(self.folder, max_shard_size=3000, edits=True)
            tell(number)

    def check(self, told: list[int]) -> list[str]:
        return _one_of_last(self._load, told, self.folder)

    def _load(self) -> int:
        model = EditableModel.from_pretrained(self.base, self.folder, self.tokenizer)
        numbers = {float(value) for parameter in model.editor.parameters() for value in parameter.unique()}
        numbers |= {float(edit.id) for edit in model.load_edits(self.folder)}
        assert len(numbers) == 1, f"weights and edits of several calls: {numbers}"
        return int(numbers.pop())


class Checkpoints:
    """A training that saves at each step; the one after it goes on from the last whole checkpoint."""

    name = "a training's checkpoints"
    seconds = 3.0

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast):
        self.folder, self.tokenizer = folder / "training", tokenizer

    def _trainer(self, steps: int) -> EditorTrainer:
        options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "max_steps": steps}
        return EditorTrainer(
            fresh(self.tokenizer), arguments(self.folder, **options), RECORDS[:4], questions=QUESTIONS
        )

    def work(self, tell: Tell) -> None:
        trainer = self._trainer(1000)
        resume = last_whole_checkpoint(self.folder)
        saved = type(trainer)._save_checkpoint

        def save(self: EditorTrainer, *args: object, **kwargs: object) -> None:
            saved(self, *args, **kwargs)
            tell(self.state.global_step)

        type(trainer)._save_checkpoint = save  # type: ignore[method-assign]
        tell(0 if resume is None else int(resume.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=resume)

    def check(self, told: list[int]) -> list[str]:
        found = last_whole_checkpoint(self.folder)
        step = 0 if found is None else int(found.rpartition("-")[2])
        if found is not None:
            EditableModel.from_pretrained(fresh(self.tokenizer).base_model, found, self.tokenizer)
        if step > 40:
            shutil.rmtree(self.folder)
        return [] if step >= told[-1] else [f"the last whole checkpoint is of step {step}, {told[-1]} was told"]


def _one_of_last(load: Callable[[], int], told: list[int], folder: Path) -> list[str]:
    try:
        found = load()
    except FileNotFoundError:
        return [] if told == [0] else [f"{folder} is not there after {told[-1]} calls"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [] if told[-1] <= found <= told[-1] + 1 else [f"call {found} is there, {told[-1]} were told"]


KINDS = [StoredEdits, StoreCalls, SavedEdits, SavedEditors, Checkpoints]


def attack(kind: type, folder: Path, tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int) -> list[str]:
    """Kill work of a kind so often, and return what was wrong."""
    one, wrong = kind(folder, tokenizer), []
    for _ in range(count):
        told = killed(one.work, one.seconds * rng.random())
        try:
            wrong += one.check(told) if told else ["the process ended before it began"]
        except (AssertionError, ValueError, OSError) as error:
            wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    return wrong
