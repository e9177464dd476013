"""Many tensors as few: the same values, in one kernel and one transfer."""

from __future__ import annotations

import pytest
import torch
from support.counting import Counting

from hf_mend.bases.fused import fetched, largest, of_one_shape, stacked
from hf_mend.bases.known_mask import known_mask, mask_of_ones


def test_the_parts_of_a_tensor_are_stacked_without_a_copy():
    whole = torch.randn(3, 2, 4)
    with torch.no_grad():
        assert stacked([whole[i] for i in range(3)]) is whole
        assert stacked([*whole]) is whole


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 1], [0, 1, 1], [1, 2]])
def test_other_parts_are_copied_in_their_order(order):
    whole = torch.randn(3, 2, 4)
    parts = [whole[i] for i in order]
    assert torch.equal(stacked(parts), torch.stack(parts)) and len(stacked(parts)) == len(order)


def test_parts_of_parts_are_no_parts():
    whole = torch.randn(3, 2, 4)
    parts = [whole[i, :, :2] for i in range(3)]
    assert torch.equal(stacked(parts), whole[:, :, :2])
    assert torch.equal(stacked([whole[:, i] for i in range(2)]), whole.transpose(0, 1))


def test_a_gradient_flows_through_what_is_stacked():
    leaf = torch.randn(2, 3, requires_grad=True)
    doubled = leaf * 2
    stacked([doubled[0], doubled[1]]).sum().backward()
    assert torch.equal(leaf.grad, torch.full((2, 3), 2.0))


def test_tensors_come_as_they_are_in_one_transfer():
    layer = torch.nn.Linear(3, 2)
    with Counting(layer) as counting:
        there = layer(torch.randn(5, 3))
        given = [there > 0, there, there.argmax(-1), there.double(), there.half(), there[:0], there.sum()]
        found = fetched(given)
    assert counting.waits == 1
    for one, other in zip(given, found, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(6))
def test_no_value_that_is_not_finite_is_overlooked(bad, place):
    pairs = {name: (torch.randn(1, 4, width), torch.randn(1, 4, 3)) for name, width in (("a", 5), ("b", 5), ("c", 2))}
    assert [len(names) for names in of_one_shape(pairs)] == [2, 1]
    assert largest(pairs).isfinite().all() and float(largest(pairs).max()) == max(
        float(side.abs().max()) for pair in pairs.values() for side in pair
    )
    pairs["abc"[place // 2]][place % 2][0, 2, 1] = bad
    assert not largest(pairs).isfinite().all()
    assert largest({}).isfinite().all()


def test_masks_that_the_host_knows_answer_without_the_device_and_are_else_masks():
    layer = torch.nn.Linear(3, 2)
    with Counting(layer) as counting:
        mask = mask_of_ones(torch.ones(2, 5, dtype=torch.long).to(layer.weight.device))
        as_bool = mask.to(dtype=torch.bool)
        assert mask.all() and as_bool.all() and as_bool[:, :3].all() and as_bool.sum() == 10
        padded = torch.tensor([[0, 1, 1], [1, 1, 1]]).to(layer.weight.device)
        padded = known_mask(padded, 5)
        assert not padded.all() and padded.sum() == 5 and not padded.to(dtype=torch.bool)[:, :7].all()
    assert counting.waits == 0
    for found in (mask.cumsum(-1), mask * 2, 1 - mask, mask.sum(-1), mask[:, None], mask == 0, padded[:, 1:]):
        assert type(found) is torch.Tensor
    assert mask.sum(-1).tolist() == [5, 5] and not (mask == 0).any()
    assert padded.sum(-1).tolist() == [2, 3] and padded[:, 1:].all() and not padded[:, :2].all()
