"""Threads that ask, edit and undo on one model: each answer is that of a state that existed."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

import pytest
import torch
from support.edits import random_edit
from support.models import RECORDS, all_logits, build_model, editable
from support.reading import asked_meanwhile, at_once, hooks_of
from support.scope import scoped
from support.slow import slow_but

from hf_mend import EditableModel
from hf_mend.edits.low_rank import dense


ASKED, OTHER = RECORDS[3].prompt, RECORDS[4].prompt  # of the same number of tokens


def test_threads_that_only_ask_after_loading_all_get_the_models_answer(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model._active.replace([random_edit(model, str(i), seed=i, scale=0.01) for i in range(30)])
    model.save_edits(tmp_path)
    expected = all_logits(model, tokenizer)
    for _ in range(20):
        again = editable(build_model("llama"), tokenizer)
        again.load_edits(tmp_path)
        found: list[torch.Tensor] = []
        at_once(*[lambda m=again, f=found: f.append(all_logits(m, tokenizer)) for _ in range(4)])
        assert len(found) == 4 and all(torch.equal(one, expected) for one in found)
        assert torch.equal(all_logits(again, tokenizer), expected)


@pytest.mark.parametrize("architecture", slow_but(["llama", "t5"], ["llama", "gpt2", "t5"]))
@pytest.mark.parametrize("through", ["the model", "its base"])
def test_answers_beside_edits_and_undos_are_those_of_a_state(architecture, tokenizer, through):
    model = editable(build_model(architecture), tokenizer)
    asks = model if through == "the model" else model.base_model
    plain = all_logits(asks, tokenizer, ASKED)
    states = [plain]
    for target in ("rome", "oslo town"):
        model.edit(OTHER, target, max_steps=1, force=True)
        states.append(all_logits(asks, tokenizer, ASKED))
    model.undo_all()
    with asked_meanwhile(lambda: all_logits(asks, tokenizer, ASKED), states, 60):
        for _ in range(3):
            model.edit(OTHER, "rome", max_steps=1, force=True)
            model.edit(OTHER, "oslo town", max_steps=1, force=True)
            model.undo()
            model.undo()
    assert torch.equal(all_logits(asks, tokenizer, ASKED), plain)
    assert hooks_of(model.base_model) == []
    assert not any("forward" in module.__dict__ for module in model.base_model.modules())


def test_answers_beside_scoped_edits_are_those_of_a_state(llama, tokenizer):
    model = scoped(llama, tokenizer)
    text = f"{OTHER} rome"
    states = [all_logits(model, tokenizer, text)]
    model.edit(OTHER, "rome", max_steps=1, force=True)
    states.append(all_logits(model, tokenizer, text))
    assert not torch.equal(*states)
    model.undo()
    for asks in (model, model.base_model):
        with asked_meanwhile(lambda asks=asks: all_logits(asks, tokenizer, text), states, 50):
            for _ in range(4):
                model.edit(OTHER, "rome", max_steps=1, force=True)
                model.undo()
    assert hooks_of(llama) == []


def test_a_generation_keeps_to_the_state_it_began_with(llama, tokenizer):
    model = editable(llama, tokenizer)
    edit = random_edit(model, scale=0.5)
    ids = tokenizer(ASKED, return_tensors="pt")["input_ids"]

    def generate() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=12, do_sample=False)

    states = [generate()]
    model._active.replace([edit])
    states.append(generate())
    assert not torch.equal(*states)
    with asked_meanwhile(generate, states, 20):
        for _ in range(100):
            model._active.replace([])
            time.sleep(0.001)
            model._active.replace([edit])
            time.sleep(0.001)


def test_threads_that_edit_lose_nothing(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    plain = all_logits(model, tokenizer)
    model.open_store(tmp_path / "store")
    kept: list[str] = []

    def work(name: str) -> None:
        for i in range(5):
            kept.append(model.edit(f"{name} {i} of", "rome town", max_steps=1, force=True).id)
            gone = model.edit(f"{name} {i} in", "lima", max_steps=1, force=True).id
            model.undo(gone)

    at_once(*[lambda name=name: work(name) for name in ("kenya", "peru", "japan")])
    assert sorted(model.edits.ids) == sorted(kept) and len(kept) == 15
    again = editable(build_model("llama"), tokenizer)
    assert [edit.id for edit in again.open_store(tmp_path / "store")] == model.edits.ids
    assert torch.equal(all_logits(again, tokenizer), all_logits(model, tokenizer))
    model.undo_all()
    assert torch.equal(all_logits(model, tokenizer), plain) and hooks_of(llama) == []


def test_two_models_on_one_base_edit_at_once(llama, tokenizer):
    first, second = editable(llama, tokenizer), editable(llama, tokenizer)
    plain = all_logits(llama, tokenizer)

    def work(model: EditableModel, name: str) -> None:
        for i in range(6):
            model.edit(f"{name} {i} of", "rome town", max_steps=1, force=True)
            all_logits(model, tokenizer)
            model.undo()

    at_once(lambda: work(first, "peru"), lambda: work(second, "kenya"), lambda: work(first, "japan"))
    assert torch.equal(all_logits(llama, tokenizer), plain) and hooks_of(llama) == []
    assert not any("forward" in module.__dict__ for module in llama.modules())


@pytest.mark.parametrize("make", [editable, scoped])
def test_hooks_that_another_thread_adds_while_a_pass_ends_early_do_not_end_the_edit(llama, tokenizer, make):
    """torch goes through a module's hooks as an error leaves it, and finds that they are not those it began with."""
    model = make(llama, tokenizer)
    expected = model.edit(OTHER, "rome", max_steps=1, force=True), [*model.edits]
    model.undo()
    met = []

    def in_between(module, args, output):  # torch calls it where an error leaves the module
        module.register_forward_hook(lambda *_: None).remove()
        handles.append(module.register_forward_hook(lambda *_: None))
        met.append(output)

    handles = []
    first = llama.register_forward_hook(in_between, always_call=True)
    last = llama.register_forward_hook(lambda *_: None)
    try:
        found = model.edit(OTHER, "rome", max_steps=1, force=True), [*model.edits]
    finally:
        for handle in (first, last, *handles):
            handle.remove()
    assert None in met, "a pass ended early"
    assert found[0].probability_after == expected[0].probability_after
    for one, other in zip(found[1], expected[1], strict=True):
        assert all(torch.equal(dense(one.updates[name]), dense(other.updates[name])) for name in one.updates)
    model.undo_all()
    assert hooks_of(llama) == []


def test_an_error_of_a_pass_that_did_not_end_early_is_told(llama, tokenizer):
    model = editable(llama, tokenizer)

    def broken(module, args):
        raise RuntimeError("OrderedDict mutated during iteration")

    handle = llama.model.layers[0].register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="OrderedDict mutated"):
            model.edit(OTHER, "rome", max_steps=1, force=True)
    finally:
        handle.remove()
    assert hooks_of(llama) == []


def test_two_models_of_one_base_find_the_same_edit_at_once_as_alone(llama, tokenizer):
    alone = editable(llama, tokenizer)
    alone.edit(OTHER, "rome", max_steps=2, force=True)
    expected = alone.edits[0].updates
    alone.undo()
    models = [editable(llama, tokenizer) for _ in range(2)]
    for _ in range(5):
        found: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

        def work(model: EditableModel, found: list = found) -> None:
            with model.edited(OTHER, "rome", max_steps=2, force=True):
                found.append(model.edits[0].updates)

        at_once(*[lambda model=model: work(model) for model in models])
        assert len(found) == 2
        for updates in found:
            assert all(torch.equal(updates[n][i], expected[n][i]) for n in expected for i in (0, 1))


def test_asking_goes_on_while_an_edit_is_made(llama, tokenizer):
    """A reader never waits for an editor's lock."""
    model = editable(llama, tokenizer)
    plain = all_logits(model, tokenizer)
    found: list[torch.Tensor] = []
    with model._active.changing():
        thread = threading.Thread(target=lambda: found.append(all_logits(model, tokenizer)))
        thread.start()
        thread.join(10)
    assert found and torch.equal(found[0], plain)


def test_a_pass_keeps_its_edits_until_it_ends(llama, tokenizer):
    """An edit and its undo in the middle of a pass of another thread, at each layer of it."""
    model = editable(llama, tokenizer)
    edit = random_edit(model, scale=0.5)
    plain = all_logits(model, tokenizer)
    model._active.replace([edit])
    edited = all_logits(model, tokenizer)
    for asks in (model, model.base_model):
        for block in range(4):
            for first, then, expected in (([], [edit], plain), ([edit], [], edited)):
                model._active.replace(first)

                def change(*_: object, then: list = then) -> None:
                    thread = threading.Thread(target=model._active.replace, args=(then,))
                    thread.start()
                    thread.join()

                handle = llama.model.layers[block].register_forward_pre_hook(change)
                assert torch.equal(all_logits(asks, tokenizer), expected)
                handle.remove()
                assert torch.equal(all_logits(asks, tokenizer), edited if then else plain)
    model.undo_all()
    assert hooks_of(llama) == []


def test_what_is_disabled_or_carried_for_a_while_is_so_in_that_thread_alone(llama, tokenizer):
    model = editable(llama, tokenizer)
    plain, (mine, theirs) = all_logits(model, tokenizer), (random_edit(model, n, seed=i) for i, n in enumerate("ab"))
    model._active.replace([mine])
    with_mine = all_logits(model, tokenizer)
    elsewhere: list[torch.Tensor] = []

    def ask() -> None:
        elsewhere.append(all_logits(model, tokenizer))

    for context, here in ((model.disable_edits(), plain), (model.carrying([theirs]), None)):
        elsewhere.clear()
        with context:
            answer = all_logits(model, tokenizer)
            assert not torch.equal(answer, with_mine) and (here is None or torch.equal(answer, here))
            at_once(ask)
            taken_along = threading.Thread(target=contextvars.copy_context().run, args=(ask,))
            taken_along.start()
            taken_along.join()
        assert torch.equal(elsewhere[0], with_mine) and torch.equal(elsewhere[1], answer)
        assert torch.equal(all_logits(model, tokenizer), with_mine)
    with model.carrying([theirs]):
        model.undo_all()
        assert model.edits == []
    assert model.edits.ids == ["a"] and torch.equal(all_logits(model, tokenizer), with_mine)


def test_the_edits_of_an_asyncio_task_are_its_own(llama, tokenizer):
    model = editable(llama, tokenizer)
    visitors = [random_edit(model, str(i), seed=i, scale=0.3) for i in range(4)]
    expected = []
    for edit in visitors:
        with model.carrying([edit]):
            expected.append(all_logits(model, tokenizer))

    async def visit(number: int) -> bool:
        right = True
        for _ in range(5):
            with model.carrying([visitors[number]]):
                await asyncio.sleep(0)
                answer = await asyncio.to_thread(all_logits, model, tokenizer)
                right &= torch.equal(answer, expected[number]) and model.edits.ids == [str(number)]
        return right

    async def everyone() -> list[bool]:
        return await asyncio.gather(*map(visit, range(4)))

    assert asyncio.run(everyone()) == [True] * 4
    assert hooks_of(llama) == []


@pytest.mark.slow
def test_ten_thousand_answers_beside_edits_and_undos(llama, tokenizer):
    model = editable(llama, tokenizer)
    states, targets = [all_logits(model, tokenizer, ASKED)], ("rome", "oslo town", "lima")
    for target in targets:
        model.edit(OTHER, target, max_steps=2, force=True)
        states.append(all_logits(model, tokenizer, ASKED))
    model.undo_all()
    with asked_meanwhile(lambda: all_logits(model, tokenizer, ASKED), states, 10_000):
        for _ in range(40):
            for target in targets:
                model.edit(OTHER, target, max_steps=2, force=True)
            for _ in targets:
                model.undo()
    assert torch.equal(all_logits(model, tokenizer, ASKED), states[0])
