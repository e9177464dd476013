"""The words of a text, which tell subjects apart where the hidden states are near to one another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.models import EditableModel
from support.scope import scoped

from hf_mend.scope.network import ANY_WORD, MEANING_WIDTH, WORDS, ScopeNetwork
from hf_mend.scope.words import word_numbers, words_of


PROMPT = "The capital of France is"


class _Tokens:
    """A tokenizer of whole words."""

    texts = ("\u0120Paris", "Paris", "\u2581paris", "London", None, "")

    def __len__(self) -> int:
        return len(self.texts)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.texts[i] for i in ids]


def test_a_word_has_one_number_in_whatever_case_and_place():
    numbers = word_numbers(_Tokens())
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3] and numbers[4] == numbers[5]
    assert int(numbers[0]) == 0x2CCBE2 and int(numbers.max()) < 1 << 24  # the same in every process; exact as floats
    found = words_of(numbers, torch.tensor([[1, 3], [6, -1]]))
    assert found.tolist() == [[int(numbers[1]), int(numbers[3])], [ANY_WORD, ANY_WORD]]


@pytest.fixture
def model(llama, tokenizer) -> EditableModel:
    model = scoped(llama, tokenizer, method="ft", num_steps=2)
    with torch.no_grad():
        model.scope.word.bias.fill_(1.0)  # all words matter alike
    model.edit(PROMPT, "Lyon", check=False)
    return model


def said(model: EditableModel, **inputs: torch.Tensor) -> torch.Tensor:
    with model.watching() as watch, torch.no_grad():
        model.base_model(**inputs)
    return watch.keys[0][:, MEANING_WIDTH:] > 0


def test_a_pass_knows_the_words_of_its_tokens(model, tokenizer):
    ids = tokenizer([PROMPT], return_tensors="pt").input_ids
    expected = torch.zeros(WORDS, dtype=torch.bool)
    expected[words_of(word_numbers(tokenizer), ids[0]) % WORDS] = True
    assert torch.equal(said(model, input_ids=ids)[0], expected)
    padded = torch.cat([torch.full((1, 3), tokenizer.pad_token_id), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    assert torch.equal(said(model, input_ids=padded, attention_mask=mask)[0], expected)
    keys = model.edits[0].scope.keys
    assert keys.dtype == torch.float16  # half the room, and no score that differs by a thousandth
    assert torch.equal(keys[0, MEANING_WIDTH:] > 0, expected) and keys[0, MEANING_WIDTH:].max() < 0.5


def test_any_word_may_be_said_where_a_pass_gets_embeddings(model, tokenizer):
    ids = tokenizer([PROMPT], return_tensors="pt").input_ids
    embeddings = model.base_model.get_input_embeddings()(ids)
    assert said(model, inputs_embeds=embeddings).all()
    found, expected = (
        model.base_model(**given).logits for given in ({"inputs_embeds": embeddings}, {"input_ids": ids})
    )
    assert torch.allclose(found, expected, atol=1e-5)
    with model.disable_edits():
        assert not torch.allclose(model.base_model(input_ids=ids).logits, expected, atol=1e-5)


def test_an_edit_is_missed_by_a_text_without_its_words(model):
    (edit,) = model.edits
    scope = replace(edit.scope, thresholds=torch.full_like(edit.scope.thresholds, 0.9))
    query = edit.scope.keys[:1].float()
    other = int((query[0, MEANING_WIDTH:] == 0).nonzero()[0])
    strange = torch.cat([query[:, :MEANING_WIDTH], torch.eye(WORDS)[other : other + 1]], 1)
    bank = model._gate.bank([replace(edit, scope=scope)])
    assert bank.choose(torch.cat([query, strange])).tolist() == [0, -1]
    score, least = (values.tolist() for values in bank.scores(strange[0]))
    assert score[0] == pytest.approx(0.85, abs=0.01) and least[0] == pytest.approx(0.9, abs=0.01)


def test_another_tokenizer_gives_other_numbers(model, tokenizer):
    ids = torch.tensor([[5, 6]])
    before = model.numbers_of_words(ids)
    model.tokenizer = None
    assert model.numbers_of_words(ids) is None
    model.tokenizer = tokenizer
    assert torch.equal(model.numbers_of_words(ids), before)


@pytest.mark.parametrize(("odds", "share"), [(0.5, 0.0), (0.54, 0.0), (0.56, 1.0), (0.9, 1.0)])
def test_a_word_matters_from_somewhat_more_than_even_odds_on(odds, share):
    scope = ScopeNetwork(8)
    with torch.no_grad():
        scope.word.bias.fill_(math.log(odds / (1 - odds)))
    states = scope.token_states(torch.randn(1, 3, 8), words=torch.tensor([[5, 5, 5]]))
    assert float(scope.keys(states)[0, -1, MEANING_WIDTH + 5]) == pytest.approx(share + 0.001, abs=1e-4)
