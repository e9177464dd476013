"""What acts with more edits is the same, made from what acted before or anew."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from support.edits import random_edit
from support.models import editable
from support.scope import scoped

from hf_mend import Edit
from hf_mend.edits.edit import active_edits
from hf_mend.edits.edit_scope import EditScope
from hf_mend.edits.growing import GrowingRows
from hf_mend.edits.layer_sum import LayerSum
from hf_mend.edits.snapshot import Snapshot
from hf_mend.scope.bank import KeyBank


def some_edit(model, number: int, choose: random.Random, with_scope: bool, earlier: list[Edit]) -> Edit:
    """One of a new prompt or an earlier one, enabled or not, which may replace others or require a base delta."""
    edit = random_edit(model, str(number), rank=1, seed=number)
    edit.prompt = f"the prompt {choose.randrange(12)}" if choose.random() < 0.4 else edit.prompt
    edit.enabled = choose.random() < 0.9
    if earlier and choose.random() < 0.1:
        edit.replaces = [choose.choice(earlier).id]
    elif choose.random() < 0.1:
        edit.is_base_delta = True
    elif choose.random() < 0.2 and (deltas := [one.id for one in earlier if one.is_base_delta]):
        edit.requires = choose.choice(deltas)
    if with_scope and not edit.is_base_delta and choose.random() < 0.7:
        generator = torch.Generator().manual_seed(number)
        keys = torch.nn.functional.normalize(torch.randn(2, 128, generator=generator), dim=-1)
        edit.scope = EditScope("scope", keys, torch.tensor([0.5, 0.6]), ["prompt", "chat"])
    return edit


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_scope", [False, True])
def test_a_snapshot_made_from_another_is_the_one_made_anew(llama, tokenizer, seed, with_scope):
    model = (scoped if with_scope else editable)(llama, tokenizer)
    active, choose = model._active, random.Random(seed)
    x, queries = torch.randn(2, model.targets[0].d_in), torch.randn(5, 128)
    edits: list[Edit] = []
    for step in range(25):
        if edits and choose.random() < 0.2:
            del edits[choose.randrange(len(edits))]
        edits = [
            *edits,
            *(some_edit(model, 10 * step + i, choose, with_scope, edits) for i in range(choose.choice([1, 1, 2]))),
        ]
        active.replace(edits)
        now, anew = active.snapshot, Snapshot(model.targets).followed_by(edits, lambda _: [], bank_of)
        assert [e.id for e in now.active] == [e.id for e in anew.active] == [e.id for e in active_edits(edits)]
        assert {key: e.id for key, e in now.standing.items()} == {key: e.id for key, e in anew.standing.items()}
        assert [*now.scoped] == [*anew.scoped] and {t.name for t in now.layers()} == {t.name for t in anew.layers()}
        assert now.replaced == {one for edit in edits for one in edit.replaces}
        for target in model.targets[:1]:
            one, other = (sums.get(target.name, LayerSum(1, 1)) for sums in (now.sums, anew.sums))
            assert bool(one.edits) == bool(other.edits)
            if one.edits:
                assert torch.equal(one(x, torch.device("cpu")), other(x, torch.device("cpu")))
        if now.scoped:
            mine, other = ([one.bank.ids[i] for i in one.bank.choose(queries, -0.6) if i >= 0] for one in (now, anew))
            assert mine == other and now.bank.numbers.keys() == anew.bank.numbers.keys() == now.scoped.keys()


def bank_of(edits, before=None, gone=()) -> KeyBank:
    return KeyBank(edits)


def test_rows_never_change_while_others_grow_from_them():
    rows = GrowingRows(torch.arange(6.0).reshape(3, 2))
    grown, seen = rows, []
    for i in range(40):
        grown = grown.extended([torch.full((1, 2), float(i))])
        seen.append((grown, grown.rows.clone()))
        if i % 7 == 3:  # another goes on from an earlier one
            other = seen[i // 2][0].extended([torch.full((2, 2), -1.0)])
            seen.append((other, other.rows.clone()))
            seen.append((grown.first(2), grown.rows[:2].clone()))
    assert all(torch.equal(one.rows, expected) for one, expected in seen)
    assert torch.equal(rows.rows, torch.arange(6.0).reshape(3, 2))


def test_threads_that_grow_the_same_rows_get_their_own():
    for _ in range(50):
        rows = GrowingRows(torch.zeros(1, 4)).extended([torch.zeros(1, 4)])
        rows, found = rows.first(1), {}

        def grow(number: int, rows: GrowingRows = rows, found: dict = found) -> None:
            found[number] = rows.extended([torch.full((1, 4), float(number))])

        threads = [threading.Thread(target=grow, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(one.rows[1], torch.full((4,), float(number))) for number, one in found.items())


def test_rows_grow_under_inference_mode_and_outside_of_it():
    with torch.inference_mode():
        rows = GrowingRows(torch.zeros(1, 2)).extended([torch.ones(1, 2)])
    rows = rows.extended([torch.ones(1, 2)]).extended([torch.ones(3, 2)])
    weight = torch.ones(2, requires_grad=True)
    loss = (rows.rows @ weight).sum()
    rows.extended([torch.ones(1, 2)])  # behind those that a graph holds
    loss.backward()
    assert weight.grad.tolist() == [5.0, 5.0]
