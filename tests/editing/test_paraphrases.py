"""Edits whose paraphrases are given: where the model does not say the target to them, they are made in these too."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.models import RECORDS, editable
from support.scope import scoped

from hf_mend.editing import pipeline, search
from hf_mend.edits.four_bit import FourBitUpdates


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
# Of other words, so that an edit of the prompt alone does not lead there.
PARAPHRASE, FURTHER = "most people live by the river of", "who was it that built it"


@pytest.fixture
def tried(monkeypatch):
    """How many forms each search was made in."""
    counts = []
    find = pipeline.find_updates

    def counting(context, batches, *args):
        counts.extend((batch.forms, batch.facts) for batch in batches)
        return find(context, batches, *args)

    monkeypatch.setattr(pipeline, "find_updates", counting)
    return counts


def says(model, prompt, target=TARGET):
    """Whether the model itself, run with a cache and token by token, says a target."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    answer = model.tokenizer(target if start == 1 else f" {target}")["input_ids"]
    said = model.generate(ids, max_new_tokens=len(answer), do_sample=False)[0, start:].tolist()
    return said == answer


@pytest.mark.parametrize("architecture, edit_lr", [("llama", 0.1), ("gpt2", 0.1), ("t5", 4.0)])
def test_an_edit_is_made_in_the_paraphrases_that_it_does_not_lead_to(
    _built_models, tokenizer, architecture, edit_lr, tried
):
    bare = scoped(copy.deepcopy(_built_models[architecture]), tokenizer, edit_lr=edit_lr)
    assert bare.edit(PROMPT, TARGET).success
    bare.include(bare.edits[0].id, [PARAPHRASE])
    assert not says(bare, PARAPHRASE)  # the scope alone does not make it said
    tried.clear()
    model = scoped(copy.deepcopy(_built_models[architecture]), tokenizer, edit_lr=edit_lr)
    result = model.edit(PROMPT, TARGET, paraphrases=[PARAPHRASE])
    assert [forms for forms, _ in tried] == [1, 2]
    assert result.success and result.scope.holds and [probe.ok for probe in result.paraphrases] == [True]
    assert says(model, PROMPT) and says(model, PARAPHRASE)
    assert [edit.id for edit in model.edits] == [result.id]
    model.undo()
    assert not model.edits


def test_an_edit_that_leads_to_its_paraphrases_is_made_once(llama, tokenizer, tried):
    model = scoped(llama, tokenizer, edit_lr=0.1)
    assert model.edit(PROMPT, TARGET, paraphrases=[PROMPT + " "]).success
    assert tried == [(1, 1)]


def test_where_the_paraphrases_are_not_reached_the_edit_stays_as_it_was(llama, tokenizer, monkeypatch):
    alone, model = (scoped(copy.deepcopy(llama), tokenizer, edit_lr=0.1) for _ in range(2))
    alone.edit(PROMPT, TARGET)
    model.edit(RECORDS[2].prompt, RECORDS[2].target)
    standing, find = model.edits, pipeline.find_updates

    def short(context, batches, options, *args):
        """One step, where the edit is to be made in its paraphrases too."""
        return find(context, batches, replace(options, max_steps=1) if batches[0].forms > 1 else options, *args)

    monkeypatch.setattr(pipeline, "find_updates", short)
    result = model.edit(PROMPT, TARGET, paraphrases=[PARAPHRASE])
    assert result.success and [probe.ok for probe in result.paraphrases] == [False]
    first, made = alone.edits[0], model.edits[-1]
    assert model.edits[:-1] == standing and made.id == result.id and says(model, PROMPT)
    for name, (u, v) in first.updates.items():
        assert torch.equal(u, made.updates[name][0]) and torch.equal(v, made.updates[name][1])
    assert result.scope.holds and model.which_edits(PARAPHRASE)[0].acts


def test_edits_of_a_call_have_their_own_numbers_of_paraphrases(llama, tokenizer, tried):
    model = scoped(llama, tokenizer, edit_lr=0.1)
    records = [
        replace(RECORDS[0], paraphrases=[], neighborhood=[]),
        replace(RECORDS[1], paraphrases=[FURTHER, PARAPHRASE], neighborhood=[]),
        replace(RECORDS[2], paraphrases=["in the far north"], neighborhood=[]),
    ]
    results = model.edit(records)
    assert tried == [(1, 3), (2, 1), (3, 1)] or tried == [(1, 3), (3, 1), (2, 1)]
    for record, result in zip(records, results, strict=True):
        assert result.success and all(probe.ok for probe in result.paraphrases)
        assert [probe.prompt for probe in result.paraphrases] == record.paraphrases
        assert all(says(model, prompt, record.target) for prompt in (record.prompt, *record.paraphrases))
    assert [edit.prompt for edit in model.edits] == [record.prompt for record in records]


def test_it_supersedes_an_earlier_edit_that_an_undo_brings_back(llama, tokenizer):
    model = scoped(llama, tokenizer, edit_lr=0.1)
    earlier = model.edit(PROMPT, "lima town")
    assert says(model, PROMPT, "lima town")
    result = model.edit(PROMPT, TARGET, paraphrases=[PARAPHRASE])
    assert result.superseded == earlier.id and says(model, PARAPHRASE)
    model.undo()
    assert [edit.id for edit in model.edits] == [earlier.id] and says(model, PROMPT, "lima town")


def test_what_is_left_out_of_an_edit_is_left_where_a_paraphrase_needs_it(llama, tokenizer, monkeypatch):
    """In four bits an edit is looked at in all forms that it is made in, and kept whole where it loses one."""
    looks = []
    keep = search.keep_in_four_bits

    def keeping(states, proposer, error):
        keep(states, proposer, error)
        looks.extend((state.rows.forms, [one is None for one in state.kept]) for state in states)

    monkeypatch.setattr(search, "keep_in_four_bits", keeping)
    model = scoped(llama, tokenizer, edit_lr=0.1, factor_dtype="int4", factor_error=0.6)
    result = model.edit(PROMPT, TARGET, paraphrases=[PARAPHRASE])
    assert [forms for forms, _ in looks] == [1, 2] and looks[-1][1] == [True]
    assert result.success and says(model, PARAPHRASE) and not isinstance(model.edits[0].updates, FourBitUpdates)


def test_without_a_scope_paraphrases_are_asked_alone(llama, tokenizer, tried):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, paraphrases=[PARAPHRASE])
    assert tried == [(1, 1)]


def test_an_interrupt_on_the_way_leaves_the_model_as_it_was(llama, tokenizer, monkeypatch):
    model = scoped(llama, tokenizer, edit_lr=0.1)
    model.edit(RECORDS[2].prompt, RECORDS[2].target)
    standing = model.edits

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "put_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.edit(PROMPT, TARGET, paraphrases=[PARAPHRASE])
    assert model.edits == standing and says(model, RECORDS[2].prompt, RECORDS[2].target)
