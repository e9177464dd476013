"""The words of a text, which tell subjects apart where the hidden states are near to one another."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import EditableModel
from support.scope import scoped
from transformers import DynamicCache

from hf_mend.scope.network import ANY_WORD, MEANING_WIDTH, WORDS, ScopeNetwork
from hf_mend.scope.words import place_within, word_numbers, word_table, words_in


PROMPT = "The capital of France is"


class _Tokens:
    """A tokenizer of pieces."""

    texts = ("\u0120Paris", "Par", "is", "\u2581paris", "\u0120", "London", "-", "\u010a", None, "")

    def __len__(self) -> int:
        return len(self.texts)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.texts[i] for i in ids]


def numbers_of(*ids: int, mask: list[int] | None = None) -> list[int]:
    given = None if mask is None else torch.tensor([mask])
    return word_numbers(word_table(_Tokens()), torch.tensor([ids]), given)[0].tolist()


def by_hand(word: str) -> int:
    found = 0
    for letter in word:
        found = (found * 1_000_003 + ord(letter)) % (1 << 23)
    return 2 * found + 1


def test_a_word_has_one_number_in_whatever_case_and_place_and_however_it_falls_into_tokens():
    paris, london = by_hand("paris"), by_hand("london")
    assert numbers_of(0) == numbers_of(3) == [paris] and numbers_of(5) == [london]
    assert numbers_of(1, 2) == [by_hand("par"), paris]  # as far as each token
    assert numbers_of(0, 0, 5) == [paris, paris, by_hand("parislondon")]  # what follows without a space goes on
    assert numbers_of(5, 6, 1, 2)[2:] == [by_hand("par"), paris]  # behind what is no letter a word begins
    assert numbers_of(5, 7, 1, 2)[2:] == numbers_of(5, 4, 1, 2)[2:] == numbers_of(8, 9, 1, 2)[2:] == numbers_of(1, 2)
    assert numbers_of(1, 2, mask=[0, 1])[1] == by_hand("is")
    assert max(numbers_of(*range(10))) < 1 << 24  # exact as floats
    assert numbers_of(0, 10, -1, 2) == [paris, ANY_WORD, ANY_WORD, by_hand("is")]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_words_in_pieces_are_those_of_the_whole_text(size):
    torch.manual_seed(0)
    table, tokens = word_table(_Tokens()), torch.randint(10, (6, 40))
    whole, before, found = word_numbers(table, tokens), None, []
    for part in tokens.split(size, 1):
        found.append(word_numbers(table, part, before=before))
        before = found[-1][:, -1]
    assert torch.equal(torch.cat(found, 1), whole)
    words = ["".join((_Tokens.texts[i] or " ").replace("\u0120", " ") for i in row) for row in tokens[:, :1].tolist()]
    assert [number % 2 == 1 for number in whole[:, 0].tolist()] == [
        word[-1].isalnum() and word[-1] != "\u010a" for word in words
    ]


def test_words_are_told_with_their_tokens_and_found_within_others():
    table = word_table(_Tokens())
    tokens = [1, 2, 6, 4, 5, 3, 0, 8]  # Paris - London paris Paris
    words = words_in(table, tokens)
    assert [(word.first, word.last) for word in words] == [(0, 1), (2, 2), (4, 4), (5, 5), (6, 6)]
    assert words[0].hash == words[3].hash == words[4].hash == by_hand("paris") // 2
    assert words[2].hash == by_hand("london") // 2
    assert place_within(words[2:4], words) == 2 and place_within(words[:1], words) == 4, "the last place"
    assert place_within(words, words[1:]) is None and place_within([], words) is None


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
    expected[word_numbers(word_table(tokenizer), ids)[0] // 2 % WORDS] = True
    assert torch.equal(said(model, input_ids=ids)[0], expected)
    padded = torch.cat([torch.full((1, 3), tokenizer.pad_token_id), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    assert torch.equal(said(model, input_ids=padded, attention_mask=mask)[0], expected)
    keys = model.edits[0].scope.keys
    assert keys.dtype == torch.float16  # half the room, and no score that differs by a thousandth
    assert torch.equal(keys[0, MEANING_WIDTH:] > 0, expected) and keys[0, MEANING_WIDTH:].max() < 0.5


def test_a_word_goes_on_from_a_kept_cache(model, tokenizer):
    ids = tokenizer(["the capital of spainland is"], return_tensors="pt").input_ids
    numbers = model.numbers_of_words(ids)[0].tolist()
    alone = [int(model.numbers_of_words(ids[:, i : i + 1])) for i in range(ids.shape[1])]
    assert numbers != alone  # a word falls into several tokens
    whole = said(model, input_ids=ids)
    cache = DynamicCache(config=model.config)
    with model.watching() as watch, torch.no_grad():
        for i in range(ids.shape[1]):
            model.base_model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    assert torch.equal(watch.keys[-1][:, MEANING_WIDTH:] > 0, whole)


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
    states = scope.token_states(torch.randn(1, 3, 8), words=torch.tensor([[11, 11, 11]]))
    assert float(scope.keys(states)[0, -1, MEANING_WIDTH + 5]) == pytest.approx(share + 0.001, abs=1e-4)
