"""The choice among all edits' keys, against a plain loop over them."""

from __future__ import annotations

import pytest
import torch

from hf_mend.edits.edit import Edit
from hf_mend.edits.edit_scope import EditScope
from hf_mend.scope.bank import KeyBank
from hf_mend.scope.network import key_scores, may_pass


def unit(count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 2, 64), dim=-1).flatten(1)


def scoped_edit(number: int, keys: torch.Tensor, threshold: float, excluded: torch.Tensor | None = None) -> Edit:
    scope = EditScope("scope-x", keys, torch.full((len(keys),), threshold), ["prompt"] * len(keys))
    if excluded is not None:
        scope.excluded, scope.excluded_texts = excluded, ["other"] * len(excluded)
    return Edit(f"e{number}", f"p{number}", "t", {}, scope=scope)


@pytest.mark.parametrize("strictness", [-0.6, 0.0, 0.2])
def test_the_chosen_edit_is_the_one_furthest_past_its_threshold(strictness):
    torch.manual_seed(0)
    edits = [scoped_edit(i, unit(3), 0.4 + 0.01 * i) for i in range(20)]
    excluded = edits[3].scope.keys[:1] + 0.05 * torch.randn(1, 128)
    edits[3] = scoped_edit(3, edits[3].scope.keys, 0.43, excluded)
    near = torch.cat([edit.scope.keys[:1] + 0.12 * torch.randn(1, 128) for edit in edits])
    queries = torch.nn.functional.normalize(torch.cat([near, unit(30)]).unflatten(1, (2, 64)), dim=-1).flatten(1)
    found = KeyBank(edits).choose(queries, strictness).tolist()
    for query, number in zip(queries, found, strict=True):
        best, expected = strictness, -1
        for i, edit in enumerate(edits):
            kept_out = edit.scope.excluded if len(edit.scope.excluded) else torch.zeros(0, 128)
            nearest = max([float(key_scores(query[None], one[None])) for one in kept_out], default=-1.0)
            for key, threshold in zip(edit.scope.keys, edit.scope.thresholds, strict=True):
                score = float(key_scores(query[None], key[None]))
                if score > nearest and score - float(threshold) >= best:
                    best, expected = score - float(threshold), i
        assert number == expected
    if strictness == 0.0:
        assert {3} & {*found} == set() and len({*found}) > 15


def test_no_key_that_passes_is_left_out_of_the_whole_look():
    torch.manual_seed(1)
    keys, queries = unit(200), unit(50)
    scores = key_scores(queries, keys).max(0).values
    assert may_pass(queries, keys, scores).all()
    assert not may_pass(queries, keys, torch.full((200,), 0.9)).any()


def test_a_bank_without_edits_chooses_none():
    assert KeyBank([]).choose(unit(3)).tolist() == [-1, -1, -1]


def test_keys_on_a_device_grow_with_the_bank_s_and_the_host_keeps_its_own():
    """`cpu:0` is the same memory and another device to torch."""
    device = torch.device("cpu:0")
    keys = unit(6)
    bank = KeyBank([scoped_edit(i, keys[i : i + 1], 0.99) for i in range(4)])
    before = bank._on(device)
    wider = bank.extended([scoped_edit(i, keys[i : i + 1], 0.99) for i in range(4, 6)])
    there = wider._on(device)
    assert torch.equal(there.keys, keys) and there.owner.tolist() == [*range(6)]
    assert torch.equal(before.keys, keys[:4]) and torch.equal(bank._on(device).keys, keys[:4])
    assert wider._on(keys.device).keys.data_ptr() != there.keys.data_ptr()
    assert wider.choose(keys).tolist() == [*range(6)]
