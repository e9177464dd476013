"""The sum of a layer's edits: thin, then dense, whatever came and went before."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from support.edits import random_edit
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend.edits.edit import stacked
from hf_mend.edits.layer_sum import LayerSum, dense_is_cheaper
from hf_mend.edits.low_rank import side_path


D_IN, D_OUT = 24, 16  # a matrix is cheaper from rank 10 on
CPU = torch.device("cpu")


def pairs(count: int, rank: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank, D_IN, generator=generator), torch.randn(rank, D_OUT, generator=generator))
        for _ in range(count)
    ]


def filled(edits) -> LayerSum:
    return LayerSum(D_IN, D_OUT, edits)


def by_hand(x, edits):
    return x @ sum(v.double().T @ u.double() for u, v in edits).float().T


def test_a_matrix_takes_over_where_it_has_fewer_values():
    assert not dense_is_cheaper(9, D_IN, D_OUT) and dense_is_cheaper(10, D_IN, D_OUT)
    x = torch.randn(3, D_IN)
    for count in (1, 4, 5, 40):
        edits = pairs(count)
        one = filled(edits)
        torch.testing.assert_close(one(x, CPU), by_hand(x, edits), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.matrix(CPU) @ x.T, by_hand(x, edits).T, rtol=1e-4, atol=1e-4)
        assert one.is_dense == (count >= 5)
    assert filled([]).nbytes == 0


def test_memory_stops_growing_with_the_edits():
    weight = 4 * D_IN * D_OUT
    for count in (1, 3, 4, 5, 33, 1100):
        one = filled(pairs(count, rank=2))
        one(torch.zeros(1, D_IN), CPU)
        assert 0 < one.nbytes <= (1 if count < 5 else 3) * weight
    assert one.nbytes == 3 * weight


def test_thin_matrices_grow_without_being_made_anew_for_each_edit():
    wide = LayerSum(4096, 4096)
    edits = [(torch.randn(1, 4096), torch.randn(1, 4096)) for _ in range(200)]
    made = set()
    for count in range(1, 201):
        wide = wide.extended(edits[count - 1 : count])
        wide(torch.zeros(1, 4096), CPU)
        made.add(wide._sum.thin[0].rows.data_ptr())
    assert len(made) <= 8


@pytest.mark.parametrize("most", [6, 80, 1100])
def test_what_came_and_went_leaves_no_trace(most):
    """Any way to a list of edits gives the bits of a sum of that list alone."""
    choose = random.Random(most)
    pool, x = pairs(most + 10), torch.randn(2, D_IN)
    one, now = LayerSum(D_IN, D_OUT), pool[: most // 2]
    for step in range(25):
        kind = choose.choice(["add", "undo last", "undo any", "swap", "many"])
        if kind == "add":
            now = [*now, pool[choose.randrange(len(pool))]]
        elif kind == "undo last" and now:
            now = now[:-1]
        elif kind == "undo any" and now:
            gone = choose.randrange(len(now))
            now = now[:gone] + now[gone + 1 :]
        elif kind == "swap" and now:
            place = choose.randrange(len(now))
            now = now[:place] + [pool[-1]] + now[place:]
        elif kind == "many":
            now = pool[: choose.randrange(most)]
        one = one.extended([now[-1]]) if kind == "add" else one.replaced(now)
        if step % 3:  # not every change is followed by a pass
            assert not now or torch.equal(one(x, CPU), filled(now)(x, CPU))
    if now:
        assert torch.equal(one.matrix(CPU), filled(now).matrix(CPU))


def test_an_undo_near_the_end_does_not_add_up_all_edits_again(monkeypatch):
    edits, x = pairs(3000), torch.randn(1, D_IN)
    one = filled(edits)
    one(x, CPU)
    added = []
    add = LayerSum._add_dense
    monkeypatch.setattr(LayerSum, "_add_dense", lambda self, *args: (added.append(1), add(self, *args))[1])
    for gone, most in ((2999, 32), (2998, 32), (2500, 1024), (2400, 1024)):
        added.clear()
        one = one.replaced(one.edits[:gone] + one.edits[gone + 1 :])
        one(x, CPU)
        assert len(added) <= most


def test_an_interrupt_while_summing_up_loses_and_doubles_nothing(monkeypatch):
    edits, x = pairs(50), torch.randn(2, D_IN)
    one = filled(edits)
    add = LayerSum._add_dense

    added = []

    def interrupted(self, *args):
        add(self, *args)
        added.append(1)
        if len(added) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerSum, "_add_dense", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one(x, CPU)
    assert torch.equal(one(x, CPU), filled(edits)(x, CPU))


def test_sums_made_under_inference_mode_and_autocast_are_the_same(monkeypatch):
    edits = pairs(40)
    expected = filled(edits).matrix(CPU)
    one = filled(edits[:30])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        one(torch.randn(1, D_IN), CPU)
    one = one.replaced(edits)
    assert torch.equal(one.matrix(CPU), expected)
    x = torch.randn(1, D_IN, requires_grad=True)
    one(x, CPU).sum().backward()
    torch.testing.assert_close(x.grad[0], expected.sum(0))


def test_factors_in_float64_are_summed_in_float64():
    edits = pairs(3)
    exact = [(u.double(), v.double()) for u, v in pairs(3, seed=1)]
    one = filled(edits)
    one(torch.zeros(1, D_IN), CPU)
    one = one.replaced([*edits, *exact])
    x = torch.randn(2, D_IN, dtype=torch.float64)
    torch.testing.assert_close(one(x, CPU), side_path(x, tuple(torch.cat([p[i] for p in [*edits, *exact]]).double()
                                                                for i in (0, 1))))  # fmt: skip


def test_sums_move_with_the_layer():
    """A layer that runs elsewhere gets its sum there, made anew."""
    one = filled(pairs(10))
    one(torch.zeros(1, D_IN), CPU)
    assert one(torch.zeros(1, D_IN, device="meta"), torch.device("meta")).device.type == "meta"
    assert torch.equal(one.matrix(CPU), filled(pairs(10)).matrix(CPU))


def test_many_edits_of_a_model_are_undone_to_the_bit(base, tokenizer, architecture):
    model = editable(base, tokenizer)
    plain = all_logits(model, tokenizer)
    edits = [random_edit(model, str(i), seed=i, scale=0.002) for i in range(45)]
    active = model._active
    logits = []
    for count in (0, 3, 30, 44):
        active.replace(edits[:count])
        logits.append(all_logits(model, tokenizer))
    active.replace(edits)
    merged = build_model(architecture)
    with_sum = all_logits(model, tokenizer)
    assert any(one.is_dense for one in active.snapshot.sums.values())
    active.remove(["44"])
    assert torch.equal(all_logits(model, tokenizer), logits[3])
    active.remove([str(i) for i in range(30, 44)])
    assert torch.equal(all_logits(model, tokenizer), logits[2])
    active.remove([str(i) for i in range(3, 30)])
    assert torch.equal(all_logits(model, tokenizer), logits[1])
    model.undo_all()
    assert torch.equal(all_logits(model, tokenizer), plain)
    for name, (u, v) in stacked(edits).items():  # the oracle: weights changed by hand
        weight = merged.get_submodule(name).weight.data
        update = (v.double().T @ u.double()).float()
        weight += update if "Conv1D" not in type(merged.get_submodule(name)).__name__ else update.T
    torch.testing.assert_close(with_sum, all_logits(merged, tokenizer), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_deep_copy_and_its_original_go_their_own_ways(tokenizer, architecture):
    model = editable(build_model(architecture), tokenizer)
    plain = all_logits(model, tokenizer)
    first, second = (random_edit(model, name, seed=seed) for seed, name in enumerate("ab"))
    model._active.replace([first])
    with_first = all_logits(model, tokenizer)
    twin = copy.deepcopy(model)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)
    assert [edit.id for edit in twin.edits] == ["a"] and torch.equal(all_logits(twin, tokenizer), with_first)
    model._active.replace([second])
    with_second = all_logits(model, tokenizer)
    assert torch.equal(all_logits(twin, tokenizer), with_first)
    twin.undo()
    assert torch.equal(all_logits(twin, tokenizer), plain)
    assert [edit.id for edit in model.edits] == ["b"] and torch.equal(all_logits(model, tokenizer), with_second)
    twin._active.replace([first])
    model.merge_and_unload()
    assert torch.equal(all_logits(twin, tokenizer), with_first)


def test_an_edited_model_can_be_pickled(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    plain = all_logits(model, tokenizer)
    model._active.replace([random_edit(model, "a", seed=0)])
    edited = all_logits(model, tokenizer)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.base_model, tmp_path / "base.pt")
    assert torch.equal(all_logits(torch.load(tmp_path / "base.pt", weights_only=False), tokenizer), edited)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(all_logits(loaded, tokenizer), edited)
    loaded.undo()
    assert torch.equal(all_logits(loaded, tokenizer), plain)
    assert torch.equal(all_logits(model, tokenizer), edited)


def test_a_copy_keeps_nothing_in_the_originals_store(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.open_store(tmp_path / "store")
    edit = model.edit(RECORDS[0].prompt, RECORDS[0].target)
    twin = copy.deepcopy(model)
    assert [one.id for one in twin.edits] == [edit.id]
    twin.undo()
    other = editable(build_model("llama"), tokenizer)
    assert [one.id for one in other.open_store(tmp_path / "store")] == [edit.id]
