"""The scope's network, against a plain softmax over the text and itself in other pieces."""

from __future__ import annotations

import math

import pytest
import torch

from hf_mend.scope.network import HEADS, KEY_PARTS, ScopeNetwork, TokenStates, key_scores


@pytest.fixture(scope="module")
def scope() -> ScopeNetwork:
    torch.manual_seed(0)
    scope = ScopeNetwork(16)
    scope.standardise(torch.randn(200, 16) * 3 + 1)
    return scope.requires_grad_(False)


def test_a_key_is_the_weighted_mean_that_the_docstring_says(scope):
    hidden = torch.randn(1, 7, 16)
    key = scope.keys(scope.token_states(hidden), last=1)[0, 0]
    x = ((hidden[0] - scope.centre) / scope.spread).clamp(-5, 5)
    heads = []
    for head in range(HEADS):
        a = x @ scope.gates.weight[head] + scope.gates.bias[head]
        f = torch.nn.functional.softplus(x @ scope.gates.weight[HEADS + head] + scope.gates.bias[HEADS + head])
        weights = torch.tensor([math.exp(a[t] - f[t + 1 :].sum()) for t in range(7)])
        heads.append((weights / weights.sum()) @ (x @ scope.values[head]))
    expected = scope.key(torch.cat(heads))
    assert torch.allclose(key, expected, atol=1e-5)
    assert torch.allclose(key.reshape(KEY_PARTS, -1).norm(dim=-1), torch.ones(KEY_PARTS))


@pytest.mark.parametrize("pieces", [(5, 4), (8, 1), (1,) * 9])
def test_a_text_in_pieces_has_the_keys_of_the_whole(scope, pieces):
    hidden = torch.randn(2, 9, 16)
    mask = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]])
    whole = scope.keys(scope.token_states(hidden, mask))
    past, found, start = None, [], 0
    for size in pieces:
        new = scope.token_states(hidden[:, start : start + size], mask[:, start : start + size], past)
        if past is not None:
            new = TokenStates(torch.cat([past.gates, new.gates], 2), torch.cat([past.values, new.values], 2))
        found.append(scope.keys(new, last=size))
        past, start = new, start + size
    assert torch.allclose(torch.cat(found, 1)[mask.bool()], whole[mask.bool()], atol=1e-5)


def test_padding_changes_nothing(scope):
    hidden = torch.randn(1, 6, 16)
    alone = scope.keys(scope.token_states(hidden))[0]
    rubbish = torch.full((1, 3, 16), 7.0)
    left = torch.cat([rubbish, hidden], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    assert torch.allclose(scope.keys(scope.token_states(left, mask))[0, 3:], alone, atol=1e-5)
    right = torch.cat([hidden, rubbish], 1)
    assert torch.allclose(scope.keys(scope.token_states(right, mask.flip(-1)))[0, :6], alone, atol=1e-5)
    only = scope.keys(scope.token_states(rubbish, torch.zeros(1, 3)))
    assert torch.isfinite(only).all()


def test_a_long_text_is_taken_in_several_runs(scope, monkeypatch):
    hidden = torch.randn(1, 20, 16)
    whole = scope.keys(scope.token_states(hidden))
    monkeypatch.setattr("hf_mend.scope.network._QUERIES_AT_ONCE", 6)
    assert torch.allclose(scope.keys(scope.token_states(hidden)), whole, atol=1e-6)


def test_the_first_tokens_huge_values_do_not_count(scope):
    hidden = torch.randn(500, 16)
    calm, loud = ScopeNetwork(16), ScopeNetwork(16)
    calm.standardise(hidden)
    loud.standardise(torch.cat([hidden, torch.full((5, 16), 1e5)]))
    assert torch.allclose(calm.spread, loud.spread, rtol=0.1)


def test_scores_are_a_minimum_over_parts(scope):
    keys = scope.keys(scope.token_states(torch.randn(2, 5, 16)))[:, -1]
    assert torch.allclose(key_scores(keys, keys).diagonal(), torch.ones(2), atol=1e-5)
    first, second = keys[0].chunk(2)
    half = torch.cat([first, -second])[None]
    assert float(key_scores(half, keys[:1])) == pytest.approx(-1 + math.log(2) / 12, abs=0.01)
