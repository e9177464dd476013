"""Training a scope of an encoder-decoder model: its examples, and what it decides afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import RECORDS
from support.scope import scoped

from hf_mend import EditorTrainer, EditorTrainingArguments
from hf_mend.scope.network import key_scores
from hf_mend.training.examples import Asking, TrainingExamples
from hf_mend.training.scope_examples import NONE, Mark, MarkedText, marked_texts, scope_examples, set_others
from hf_mend.training.scope_training import ScopeTrainingArguments, scope_texts, train_scope


@pytest.fixture(scope="module")
def examples():
    return TrainingExamples(RECORDS, [("what is the colour of grass?", "green")], asking=Asking(texts=["the sea is"]))


@pytest.fixture(params=["t5", "bart"])
def model(request, _built_models, tokenizer):
    return scoped(copy.deepcopy(_built_models[request.param]), tokenizer)


def test_a_text_has_one_mark_at_its_end(model, tokenizer, examples):
    for number, texts in enumerate(marked_texts(scope_examples(examples), model.encoder)):
        record = RECORDS[number]
        assert texts[0].tokens == tokenizer(record.prompt)["input_ids"]
        assert all(len(text.marks) == 1 and text.marks[0].position == len(text.tokens) - 1 for text in texts)
        marks = [text.marks[0] for text in texts]
        assert [mark.kind for mark in marks][:2] == ["prompt", "said"]
        assert {mark.kind for mark in marks} == {"prompt", "said", "neighborhood", "unrelated"}
        assert all(mark.fact == (number if mark.kind in ("prompt", "said") else NONE) for mark in marks)
        assert all((mark.near == number) == (mark.kind == "neighborhood") for mark in marks)


def test_its_keys_are_those_that_edits_have(model, examples):
    data = scope_texts(model, examples, ScopeTrainingArguments())
    bank = data.bank(model.scope, range(len(RECORDS)))
    prompts, targets = [record.prompt for record in RECORDS], [record.target for record in RECORDS]
    model.edit(prompts, targets, max_steps=1, check=False, force=True)
    keys = torch.cat([edit.scope.keys for edit in model.edits]).float()
    assert torch.allclose(bank, keys, atol=2e-2)  # the texts' hidden states are kept in bfloat16


def test_a_trained_scope_finds_facts_in_other_words(model, examples):
    result = train_scope(model, examples, ScopeTrainingArguments(steps=120, facts_per_step=8, further_facts=0))
    assert result["loss"] < 0.5 and model.scope.width == 32
    model.edit(RECORDS, max_steps=1, check=False, force=True)
    right = [
        next((one.prompt for one in model.which_edits(text) if one.acts), None) == record.prompt
        for record in RECORDS
        for text in record.paraphrases
    ]
    assert sum(right) / len(right) > 0.8
    data = scope_texts(model, examples, ScopeTrainingArguments())
    stays = [text for one in data.texts for text in one if text.marks[0].kind == "unrelated"]
    scores = key_scores(data.keys(model.scope, stays), data.bank(model.scope, range(len(data)))).max(-1).values
    assert (scores <= model.scope.threshold + 1e-3).float().mean() > 0.8  # one of a few may pass


def test_an_editor_is_trained_to_say_the_target_and_end(model, examples, tmp_path):
    arguments = EditorTrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        scope_steps=2, scope_further_facts=0,
    )  # fmt: skip
    trainer = EditorTrainer(model, arguments, RECORDS, eval_dataset=RECORDS[:4])
    batch = trainer.data_collator([trainer.examples[0]])
    assert not batch.local  # what must stay is the scope's affair
    assert batch.edit.next_tokens[0, -1] == model.tokenizer.eos_token_id
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_edit_success"] <= 1


def test_an_unrelated_question_about_another_record_is_no_counterexample_of_it():
    texts = [
        [MarkedText([1], [Mark(0, NONE, "unrelated")], prompt=RECORDS[1].prompt)],
        [MarkedText([1], [Mark(0, NONE, "unrelated")], prompt="what is the colour of grass?")],
    ]
    set_others(RECORDS[:2], texts)
    assert [[list(text.others) for text in own] for own in texts] == [[[1]], [[]]]
