"""What may be asked of a model: lists, records, probes, and what is refused before anything is done."""

from __future__ import annotations

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend import EditRecord


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def test_records_bring_their_probes(llama, tokenizer):
    model = editable(llama, tokenizer)
    results = model.edit(RECORDS[:2])
    assert [p.prompt for p in results[0].paraphrases] == RECORDS[0].paraphrases
    assert [p.prompt for p in results[1].locality] == RECORDS[1].neighborhood
    single = model.edit(
        "the seat of egypt is", "oslo", paraphrases=["egypt has the capital"], locality=["the river of"]
    )
    assert len(single.paraphrases) == len(single.locality) == 1
    probe = single.locality[0]
    assert probe.ok == (probe.before == probe.after)
    # One string is one probe; those given with a record come after its own.
    more = model.edit(RECORDS[2], paraphrases="spain has", locality=["the river"])
    assert [p.prompt for p in more.paraphrases] == [*RECORDS[2].paraphrases, "spain has"]
    assert [p.prompt for p in more.locality] == [*RECORDS[2].neighborhood, "the river"]
    with pytest.raises(ValueError, match="probes go with one edit, got 2; put them into the EditRecords"):
        model.edit(RECORDS[3:5], locality=["the river"])
    with pytest.raises(TypeError, match="locality is a list of texts; it holds a int"):
        model.edit(RECORDS[3], locality=["the river", 3])


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        ("", "rome", r"empty prompt \(''\)"),
        ("a prompt", "  ", r"empty target \('  '\)"),
        (["a", "b"], ["c"], "2 prompts and 1 targets"),
        ([], [], "list is empty"),
        ("river " * 80, "rome", r"the model takes 64; shorten the prompt"),
        (["fine", ""], ["c", "d"], "request 1 has an empty prompt"),
        ([EditRecord("a", "b")], "c", "records hold their targets"),
    ],
)
def test_bad_requests_name_the_value_and_change_nothing(llama, tokenizer, prompt, target, message):
    model = editable(llama, tokenizer)
    before = all_logits(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        model.edit(prompt, target)
    assert model.edits == [] and torch.equal(all_logits(model, tokenizer), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paraphrases": ["fine", ""]}, r"the request has an empty paraphrases\[1\] \(''\), expected some text"),
        ({"locality": " "}, r"the request has an empty locality\[0\] \(' '\)"),
        (
            {"paraphrases": ["river " * 80]},
            r"has \d+ tokens with its target, the model takes 64; shorten the paraphrases",
        ),
        ({"locality": ["the " * 200]}, r"has \d+ tokens, the model takes 64; shorten the locality\[0\] 'the the"),
        ({"max_steps": 0}, "max_steps is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1, expected at least 1"),
    ],
)
def test_bad_probes_and_limits_name_the_value_and_change_nothing(tokenizer, options, message):
    model = editable(build_model("gpt2"), tokenizer)
    with pytest.raises(ValueError, match=message):
        model.edit(PROMPT, TARGET, **options)
    assert model.edits == []


def test_the_longest_probes_that_fit(tokenizer):
    model = editable(build_model("gpt2"), tokenizer)
    room = 64 - len(tokenizer(f" {TARGET}")["input_ids"])
    paraphrase, local = " the" * room, " the" * 64
    assert len(tokenizer(paraphrase)["input_ids"]) == room and len(tokenizer(local)["input_ids"]) == 64
    result = model.edit(PROMPT, TARGET, max_steps=1, paraphrases=paraphrase, locality=local)
    assert len(result.paraphrases) == len(result.locality) == 1


def test_chat_without_a_template(llama, tokenizer):
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        editable(llama, tokenizer).edit("a", "b", chat=True)


def test_wrong_types(llama, tokenizer):
    with pytest.raises(TypeError, match="got int"):
        editable(llama, tokenizer).edit(["a"], [3])


def test_two_targets_for_one_prompt_in_one_call(llama, tokenizer):
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match="requests 0 and 2 want two answers to one prompt.*tokyo town.*cairo town"):
        model.edit([RECORDS[3].prompt, PROMPT, RECORDS[3].prompt + " "], ["tokyo town", TARGET, "cairo town"])
    assert model.edits == []
