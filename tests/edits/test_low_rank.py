"""The algebra of edits against weights changed by hand, and undo to the bit."""

from __future__ import annotations

import pytest
import torch
from support.edits import random_edit
from support.models import RECORDS, all_logits, editable

from hf_mend.bases.weights import add_to_weight_, weight_matrix
from hf_mend.edits.active import ActiveEdits
from hf_mend.edits.edit import stacked
from hf_mend.edits.hook import applied
from hf_mend.edits.low_rank import dense, side_path


def test_side_path_is_the_update_added_to_the_weight(base, tokenizer):
    model = editable(base, tokenizer)
    edit = random_edit(model)
    plain = all_logits(base, tokenizer)
    with applied(model.targets, edit.updates):
        beside = all_logits(base, tokenizer)
    with torch.no_grad():
        for target in model.targets:
            weight_matrix(target.module).add_(edit.updates[target.name][1].T @ edit.updates[target.name][0])
    by_hand = all_logits(base, tokenizer)
    assert (by_hand - plain).abs().max() > 1e-2, "the edit must matter for this test to mean anything"
    torch.testing.assert_close(beside, by_hand, rtol=1e-3, atol=1e-4)


def test_grouped_side_path_gives_each_run_of_rows_its_own_edit():
    x = torch.randn(6, 5, 7)
    u, v = torch.randn(3, 2, 7), torch.randn(3, 2, 4)
    out = side_path(x, (u, v))
    for row in range(6):
        torch.testing.assert_close(out[row], x[row] @ u[row // 2].T @ v[row // 2])


def test_grouped_side_path_takes_flattened_activations():
    x = torch.randn(6, 5, 7)
    update = (torch.randn(3, 2, 7), torch.randn(3, 2, 4))
    torch.testing.assert_close(side_path(x.reshape(30, 7), update), side_path(x, update).reshape(30, 4))


def test_undo_restores_the_logits_to_the_bit(base, tokenizer):
    model = editable(base, tokenizer)
    before = all_logits(base, tokenizer)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    assert not torch.equal(all_logits(model, tokenizer), before)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before)
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


def test_undo_by_id_leaves_the_logits_of_the_others_alone(base, tokenizer):
    model = editable(base, tokenizer)
    stack = ActiveEdits(model.targets)
    a, b = random_edit(model, "a", seed=1), random_edit(model, "b", seed=2)
    stack.replace([b])
    only_b = all_logits(base, tokenizer)
    stack.replace([a, b])
    assert not torch.equal(all_logits(base, tokenizer), only_b)
    assert [edit.id for edit in stack.remove(["a"])] == ["a"]
    assert torch.equal(all_logits(base, tokenizer), only_b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_edited_and_restored_in_its_own_dtype(llama, tokenizer, dtype):
    model = editable(llama.to(dtype), tokenizer)
    before = all_logits(model, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    after = all_logits(model, tokenizer)
    assert after.dtype == dtype and not torch.equal(after, before)
    assert all(u.dtype == v.dtype == torch.float32 for u, v in model.edits[0].updates.values())
    model.undo_all()
    assert torch.equal(all_logits(model, tokenizer), before)


def test_stacked_edits_are_their_sum(llama, tokenizer):
    model = editable(llama, tokenizer)
    a, b = random_edit(model, "a", 2, 1), random_edit(model, "b", 5, 2)
    for name, update in stacked([a, b]).items():
        torch.testing.assert_close(dense(update), dense(a.updates[name]) + dense(b.updates[name]))


def test_norms_are_those_of_the_dense_updates(llama, tokenizer):
    edit = random_edit(editable(llama, tokenizer))
    for name, norm in edit.norms().items():
        assert norm == pytest.approx(float(dense(edit.updates[name]).norm()), rel=1e-5)


def test_merge_equals_the_side_path(base, tokenizer):
    model = editable(base, tokenizer)
    model._active.replace([random_edit(model)])
    beside = all_logits(model, tokenizer)
    plain = model.merge_and_unload()
    assert plain is base
    assert not any(module._forward_hooks for module in base.modules())
    torch.testing.assert_close(all_logits(plain, tokenizer), beside, rtol=1e-3, atol=1e-4)


def test_merging_into_a_quantised_weight_says_what_to_do(llama):
    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"int8, not a plain matrix.*save_lora.*unquantised"):
        add_to_weight_(layer, torch.zeros(4, 4))
