"""The scope's network, against a plain softmax over the text and itself in other pieces."""

from __future__ import annotations

import math

import pytest
import torch

from hf_mend.scope.network import (
    ANY_WORD,
    HEADS,
    KEY_PARTS,
    MEANING_WIDTH,
    NO_WORD,
    WORD_WINDOW,
    WORDS,
    ScopeNetwork,
    TokenStates,
    key_parts,
    key_scores,
    key_words,
    missing_words,
    other_words,
    said_words,
)


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
    expected = scope.meaning(torch.cat(heads))
    assert torch.allclose(key[:MEANING_WIDTH], expected, atol=1e-5)
    assert torch.allclose(expected.reshape(KEY_PARTS, -1).norm(dim=-1), torch.ones(KEY_PARTS))


@pytest.mark.parametrize("pieces", [(5, 4), (8, 1), (1,) * 9])
def test_a_text_in_pieces_has_the_keys_of_the_whole(scope, pieces):
    hidden, words = torch.randn(2, 9, 16), torch.randint(1000, (2, 9))
    mask = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]])
    whole = scope.keys(scope.token_states(hidden, mask, words=words))
    past, found, start = None, [], 0
    for size in pieces:
        own = slice(start, start + size)
        new = scope.token_states(hidden[:, own], mask[:, own], past, words[:, own])
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
    hidden, words = torch.randn(1, 90, 16), 2 * torch.arange(90)[None]
    whole = scope.keys(scope.token_states(hidden, words=words))
    monkeypatch.setattr("hf_mend.scope.network._QUERIES_AT_ONCE", 6)
    assert torch.allclose(scope.keys(scope.token_states(hidden, words=words)), whole, atol=1e-6)
    # At each token the words of the last ones are said.
    for token in (0, 40, 89):
        said = (whole[0, token, MEANING_WIDTH:] > 0).nonzero()[:, 0].tolist()
        assert said == [*range(max(0, token - WORD_WINDOW + 1), token + 1)]


def test_words_that_matter_have_their_share_and_the_others_are_said_all_the_same():
    number = torch.tensor([[6, 15, 6 + 2 * WORDS, 18, NO_WORD], [6, 8, ANY_WORD, NO_WORD, NO_WORD]])
    said = said_words(number, torch.tensor([[0.1, 0.0, 0.3, 0.1, 0.9], [0.2, 0.0, 0.9, 0.9, 0.9]]))
    first = {word: round(float(share), 3) for word, share in enumerate(said[0]) if share}
    assert first == {3: 0.751, 7: 0.001, 9: 0.251}
    assert (said[1] > 0).all() and float(said[1, 3]) == pytest.approx(1.001) and said[1, 4] == said[1, 100]


def test_words_are_missing_by_their_share_in_what_matters():
    def key(*numbers: int, matters: tuple[float, ...] = (0.1, 0.3, 0.0)) -> torch.Tensor:
        said = said_words(
            torch.tensor([[max(2 * one, one) for one in numbers]]), torch.tensor([matters[: len(numbers)]])
        )
        return torch.cat([torch.ones(1, MEANING_WIDTH), said], 1)

    own = key_words(key(1, 2, 3))
    # What the text has and the key does not counts three tenths.
    for text, missing in (
        (key(3, 2, 1), 0.0),
        (key(2, 5, 6), 0.25 + 0.3 * 0.75),
        (key(1, 9, 3), 0.75 + 0.3 * 0.75),
        (key(7, 8, 9), 1.0),
    ):
        assert float(missing_words(text, own)) == pytest.approx(missing, abs=1e-3)
        assert torch.equal(key_scores(text, key(1, 2, 3)), key_scores(key(1, 2, 3), key(1, 2, 3)))
    # In the place of what the key names: what is missing, where as much stands there that the key does not have.
    for text, other in ((key(3, 2, 1), 0.0), (key(2, 5, 6), 0.25), (key(1, 9, 3), 0.75), (key(7, 8, 9), 1.0)):
        assert float(other_words(text, own)) == pytest.approx(other, abs=1e-3)
    assert float(other_words(key(2, 1), own)) == float(other_words(key(1, 2, 9), own)) == pytest.approx(0.0, abs=1e-3)
    # Where no word matters, or any may be said, it is not known.
    none = key_words(key(1, matters=(0.0,)))
    assert float(missing_words(key(7, 8, 9), none)) == pytest.approx(0.3 + 0.3 * 1.0, abs=1e-3)
    assert float(missing_words(key(ANY_WORD), own)) == pytest.approx(0.3 + 0.3 * 0.3)
    assert float(other_words(key(7, 8, 9), none)) == float(other_words(key(ANY_WORD), own)) == pytest.approx(0.3)


def test_the_first_tokens_huge_values_do_not_count(scope):
    hidden = torch.randn(500, 16)
    calm, loud = ScopeNetwork(16), ScopeNetwork(16)
    calm.standardise(hidden)
    loud.standardise(torch.cat([hidden, torch.full((5, 16), 1e5)]))
    assert torch.allclose(calm.spread, loud.spread, rtol=0.1)


def test_scores_are_a_minimum_over_parts(scope):
    keys = scope.keys(scope.token_states(torch.randn(2, 5, 16)))[:, -1]
    assert torch.allclose(key_scores(keys, keys).diagonal(), torch.ones(2), atol=1e-5)
    first, second = key_parts(keys[0])
    half = torch.cat([first, -second, keys[0, MEANING_WIDTH:]])[None]
    assert float(key_scores(half, keys[:1])) == pytest.approx(-1 + math.log(2) / 12, abs=0.01)
