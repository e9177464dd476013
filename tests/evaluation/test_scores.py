"""Metrics against cases computed by hand and against the model's own loss."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import RECORDS, build_model, editable

from hf_mend import EditRecord
from hf_mend.data.encoding import Query
from hf_mend.evaluation.generation import answer
from hf_mend.evaluation.scores import (
    bootstrap_interval,
    counterfact_scores,
    drawdown,
    harmonic_score,
    in_the_wild,
    mean_log_probabilities,
    n_gram_entropy,
    normalized,
    perplexity,
    portability,
)


def test_plain_numbers_by_hand():
    # Bigrams ab, ba, ab: 2/3 and 1/3. Trigrams aba, bab: 1 bit.
    bigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert n_gram_entropy("a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1) / 2)
    assert n_gram_entropy("a a a a") == 0 and n_gram_entropy("") == 0
    assert normalized(" The U.S.,  an  Apple ") == "us apple"
    # An answer that is an article or a sign alone is not the answer of a model that says nothing.
    assert normalized("A.") == "a" and normalized(" + ") == "+" and normalized(" ") == ""
    assert harmonic_score(1, 0.5, 0.25) == pytest.approx(3 / 7) and harmonic_score(1, 0, 1) == 0


def test_the_bootstrap_interval():
    values = [0.0] * 50 + [1.0] * 50
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    # The mean's standard error is 0.05: 0.5 -+ 1.96 * 0.05.
    assert low == pytest.approx(0.402, abs=0.015) and high == pytest.approx(0.598, abs=0.015)
    with pytest.raises(ValueError, match="at least two values, there are 1"):
        bootstrap_interval([1.0])
    with pytest.raises(ValueError, match="level is 95, expected a share between 0 and 1"):
        bootstrap_interval(values, level=95)
    with pytest.raises(ValueError, match="draws is 0, expected at least 1"):
        bootstrap_interval(values, draws=0)


def test_likelihoods_are_the_model_s_own(llama, tokenizer):
    model = editable(llama, tokenizer)
    text = "the capital of peru is rome town"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    loss = float(model(input_ids=ids, labels=ids).loss)
    assert perplexity(model, [text]) == pytest.approx(math.exp(loss), rel=1e-4)
    prompt = tokenizer("the capital of peru is")["input_ids"]
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    own = -float(model(input_ids=ids, labels=labels).loss)
    asked = [Query("the river", "x"), Query("the capital of peru is", "rome town")]
    assert mean_log_probabilities(model, asked)[1] == pytest.approx(own, rel=1e-4)


def test_an_edit_moves_the_scores(llama, tokenizer):
    model = editable(llama, tokenizer)
    record = EditRecord(**{**RECORDS[0].__dict__, "ground_truth": "lima town"})
    before = counterfact_scores(model, record)
    new, true = mean_log_probabilities(model, [Query(record.prompt, t) for t in (record.target, "lima town")])
    assert before["efficacy_magnitude"] == pytest.approx(math.exp(new) - math.exp(true), rel=1e-5)
    with model.edited(record, force=True):
        after = counterfact_scores(model, record)
        assert after["efficacy_magnitude"] > before["efficacy_magnitude"]
        lost = drawdown(model, lambda: perplexity(model, ["the river of spain is"]), higher_is_better=False)
        edited = perplexity(model, ["the river of spain is"])
    assert lost == pytest.approx(edited - perplexity(model, ["the river of spain is"]), rel=1e-4)


def test_what_is_said_freely(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer)
    said = {"q": "The Rome.", "r": "rome town and on", "s": "roman"}
    monkeypatch.setattr("hf_mend.evaluation.scores.answer", lambda model, prompt, **options: said.get(prompt, "no"))
    assert in_the_wild(model, EditRecord("q", "rome")) == {"question": True, "instruction": False}
    assert in_the_wild(model, EditRecord("r", "rome town")) == {"question": False, "instruction": False}
    follows = [("q", "Rome"), ("r", "rome"), ("s", "rome"), ("t", "rome")]
    assert portability(model, EditRecord("p", "t", portability=follows)) == 0.5


@pytest.mark.parametrize("architecture", ["gpt2", "bart"])
def test_an_answer_ends_with_the_context(tokenizer, architecture):
    model = editable(build_model(architecture), tokenizer)
    said = []
    generate = model.generate
    model.generate = lambda **options: (
        said.append(generate(**options, min_new_tokens=options["max_new_tokens"])) or said[-1]
    )
    for length in (60, 64):
        answer(model, " the" * length, max_new_tokens=100)
    room = [said[0].shape[1] - 60, said[1].shape[1] - 64] if architecture == "gpt2" else [out.shape[1] for out in said]
    assert room == ([4, 1] if architecture == "gpt2" else [65, 65])
    with pytest.raises(ValueError, match="the prompt ' the the.* has 65 tokens, the model takes 64"):
        answer(model, " the" * 65)


def test_a_metric_without_its_fields(llama, tokenizer):
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match="need ground_truth, which record '0' lacks"):
        counterfact_scores(model, RECORDS[0])
    with pytest.raises(ValueError, match="portability needs questions, which record '0' lacks"):
        portability(model, RECORDS[0])
    with pytest.raises(ValueError, match="has 0 tokens; perplexity needs at least two"):
        perplexity(model, [""])
    with pytest.raises(
        ValueError, match=r"the text 'the the.* has 70 tokens, the model takes 64; .*held_out_passages"
    ):
        perplexity(model, ["the" + " the" * 69])
    with pytest.raises(ValueError, match="perplexity needs at least one text"):
        perplexity(model, [])
    assert torch.is_grad_enabled()
