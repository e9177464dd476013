"""Draws of what a training step sees, in every form of asking."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.models import RECORDS
from support.slow import slow_but
from support.training import QUESTIONS, arguments, fresh, losses

from hf_mend import EditorTrainer
from hf_mend.bases.by_length import by_length
from hf_mend.bases.limits import longest_input
from hf_mend.data.encoding import Query
from hf_mend.data.forms import CHAT_FORMS, DEFAULT_FORMS
from hf_mend.training.continuations import with_continuations
from hf_mend.training.examples import LOCAL_KINDS, Asking, EditCollator, TrainingExamples
from hf_mend.training.losses import editing_loss


FACTS = [
    replace(
        record, questions=[f"where? {record.prompt}"], same_subject=[f"the age of {record.prompt}"], subject=str(i)
    )
    for i, record in enumerate(RECORDS)
]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def earlier_draw(records, questions, index, epoch, general, neighbours, unrelated, seed):
    """The draw of the version before there were forms, for records that have paraphrases and enough neighbours."""
    record, draw = records[index], random.Random(f"{seed}/{epoch}/{index}")
    texts = draw.sample(record.paraphrases, general)
    near = draw.sample(record.neighborhood, neighbours)
    return texts, near, draw.sample(questions, unrelated)


def test_paraphrases_alone_are_drawn_as_they_always_were():
    for asking in (None, Asking({"paraphrase": 1}, 0.0)):
        examples = TrainingExamples(FACTS, QUESTIONS, 2, 2, 1, seed=5, asking=asking)
        for epoch in range(3):
            for index, record in enumerate(FACTS):
                texts, near, asked = earlier_draw(FACTS, QUESTIONS, index, epoch, 2, 2, 1, 5)
                example = examples.draw(index, epoch)
                assert example.edit == Query(record.prompt, record.target)
                assert example.general == [Query(text, record.target) for text in texts]
                assert example.neighborhood == [Query(text) for text in near]
                assert example.unrelated == [Query(*pair) for pair in asked]
                assert example.same_subject == example.continuation == []


def test_every_form_is_drawn_about_as_often_as_its_weight():
    forms = {"prompt": 1, "question": 3, "chat": 2, "later_turn": 1, "system": 1}
    examples = TrainingExamples(FACTS, QUESTIONS, 2, 1, 1, asking=Asking(forms, 0.5), same_subject_rows=1)
    drawn = [examples.draw(index, epoch) for epoch in range(120) for index in range(len(FACTS))]
    for kind in ("general", "neighborhood", "unrelated", "same_subject"):
        queries = [query for example in drawn for query in getattr(example, kind)]
        counts = Counter(_form(query) for query in queries)
        for form in ("chat", "later_turn", "system"):
            assert counts[form] / len(queries) == pytest.approx(forms[form] / 8, abs=0.03), kind
        assert sum(bool(query.context) for query in queries) / len(queries) == pytest.approx(0.5, abs=0.04), kind
    plain = [query.prompt for example in drawn for query in example.general if not query.chat]
    assert sum(text.startswith("where?") for text in plain) / len(plain) == pytest.approx(3 / 4, abs=0.05)
    assert all(
        query.prompt == FACTS[i % len(FACTS)].prompt for i, example in enumerate(drawn) for query in [example.edit]
    )


def _form(query: Query) -> str:
    if not query.chat:
        return "plain"
    return "later_turn" if query.turns else "system" if query.system is not None else "chat"


def test_what_must_be_said_and_what_must_stay_are_never_mixed_up():
    examples = TrainingExamples(FACTS, QUESTIONS, 3, 2, 1, asking=Asking(DEFAULT_FORMS, 0.5), same_subject_rows=2)
    for epoch in range(20):
        for index, record in enumerate(FACTS):
            own = {record.prompt, *record.paraphrases, *record.questions}
            example = examples.draw(index, epoch)
            assert all(query.prompt in own and query.answer == record.target for query in example.general)
            for kind in ("neighborhood", "unrelated", "same_subject"):
                assert all(query.prompt not in own for query in getattr(example, kind)), kind
            assert all(query.prompt in record.same_subject for query in example.same_subject)
            stated = [query.context for query in example.general]
            assert not any(record.prompt in context for context in stated)
            # Neighbours, too, are asked as questions: other records'.
    asked = [q.prompt for e in range(20) for i in range(len(FACTS)) for q in examples.draw(i, e).neighborhood]
    assert any(text.startswith("where?") for text in asked)


def test_a_draw_depends_on_seed_epoch_and_record_alone():
    def made(seed):
        return TrainingExamples(FACTS, QUESTIONS, 2, 2, 1, seed, Asking(DEFAULT_FORMS, 0.5), 1, 1)

    one, other = made(1), made(1)
    backwards = {i: other.draw(i, 3) for i in reversed(range(len(FACTS)))}
    assert [one.draw(i, 3) for i in range(len(FACTS))] == [backwards[i] for i in range(len(FACTS))]
    assert [one.draw(i, 3) for i in range(len(FACTS))] != [one.draw(i, 4) for i in range(len(FACTS))]
    assert [made(2).draw(i, 3) for i in range(len(FACTS))] != [one.draw(i, 3) for i in range(len(FACTS))]


def test_plain_facts_get_chats_contexts_and_continuations_all_the_same():
    plain = [replace(record, paraphrases=[], neighborhood=[], unrelated=[]) for record in RECORDS]
    examples = TrainingExamples(plain, (), 1, 1, 1, 0, Asking(DEFAULT_FORMS, 0.5), 1, 1)
    drawn = [examples.draw(i, epoch) for epoch in range(30) for i in range(len(plain))]
    assert all(len(e.general) == len(e.neighborhood) == len(e.continuation) == 1 for e in drawn)
    assert all(e.unrelated == e.same_subject == [] for e in drawn)
    assert {_form(e.general[0]) for e in drawn} == {"plain", *CHAT_FORMS}
    assert any(e.general[0].context for e in drawn)


def test_continuations_stand_behind_the_texts_in_which_the_target_is_said():
    examples = TrainingExamples(FACTS, QUESTIONS, 3, 1, 1, 0, Asking(DEFAULT_FORMS, 0.5), 0, 2)
    for index in range(len(FACTS)):
        example = examples.draw(index, 0)
        assert [replace(query, after=None) for query in example.continuation] == example.general[:2]
        assert all(isinstance(query.after, str) and query.after for query in example.continuation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": {"qa": 1}}, "forms has 'qa'"),
        ({"edit_forms": {"qa": 1}}, "edit_forms has 'qa'"),
        ({"context_rate": 1.5}, "context_rate is 1.5, expected a number from 0 to 1"),
    ],
)
def test_how_to_ask_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Asking(**options)


def test_the_collator_keeps_each_edits_rows_together_in_every_kind(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    examples = TrainingExamples(FACTS, QUESTIONS, 2, 1, 1, 0, Asking(DEFAULT_FORMS, 0.5), 2, 1)
    model = fresh(chatting)
    drawn = [examples[i] for i in range(4)]
    batch = EditCollator(model.encoder)(drawn)
    assert {kind: len(rows) for kind, rows in batch.local.items()} == {
        "neighborhood": 4, "unrelated": 4, "same_subject": 8, "continuation": 4
    }  # fmt: skip
    part = batch.edits(1, 2)
    for kind in LOCAL_KINDS:
        for row, query in enumerate(drawn[1].local[kind]):
            mask = part.local[kind].inputs["attention_mask"][row].bool()
            prompt, answer = model.encoder.tokens(query)
            assert part.local[kind].inputs["input_ids"][row][mask].tolist() == prompt + answer[:-1]


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_rows_of_like_length_together_give_the_loss_and_gradient_of_all_at_once(
    tokenizer, architecture, group_size, monkeypatch
):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    examples = TrainingExamples(FACTS, QUESTIONS, 3, 1, 1, 0, Asking(DEFAULT_FORMS, 0.5), 1, 1)
    model = fresh(chatting, architecture)
    batch = EditCollator(model.encoder, longest_input(model.config))([examples[i] for i in range(4)])
    found = []
    for few in (10**9, 8):
        monkeypatch.setattr("hf_mend.bases.by_length._FEW_TOKENS", few)
        parts = list(by_length(batch.general))
        assert (len(parts) > 1) == (few == 8)
        assert sum(len(rows) for _, rows in parts) == len(batch.general)
        model.editor.zero_grad()
        loss = editing_loss(model.context, batch, {"continuation": 2.0}, group_size=group_size)
        loss.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.editor.parameters() if p.grad is not None])
        found.append((loss.loss.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_continuations_are_what_the_unedited_model_says(tokenizer, tmp_path, architecture):
    model = fresh(tokenizer, architecture).eval()
    model.base_model.config.max_position_embeddings = 512  # room behind every text; its positions are rotary
    asking = Asking({"prompt": 1, "paraphrase": 1}, 0.3)
    examples = TrainingExamples(FACTS, QUESTIONS, 2, 1, 1, 0, asking, 0, 2)
    file = tmp_path / "kept" / "continuations.jsonl"
    with_continuations(examples, model, epochs=2, tokens=4, file=file, progress=False)
    ends = model.base_model.generation_config.eos_token_id
    for epoch in range(2):
        for index in range(len(FACTS)):
            raw, drawn = examples.texts(index, epoch), examples.draw(index, epoch)
            assert drawn.general == raw.general
            for query, asked in zip(drawn.continuation, raw.continuation, strict=True):
                assert replace(query, after=asked.after) == asked and isinstance(query.after, tuple)
                assert 1 <= len(query.after) <= 4
                said: list[int] = []
                while len(said) < len(query.after):  # one token after the other, without a cache or padding
                    rows = model.encoder([replace(asked, after=tuple(said) + (5,))])
                    with torch.no_grad():
                        logits = model.base_model(**rows.inputs, use_cache=False).logits[0][rows.positions[0]]
                    said.append(int(logits[-1].argmax()))
                assert tuple(said) == query.after
                assert ends not in said[:-1]
    # A second run reads them; one that was interrupted goes on.
    text = file.read_text(encoding="utf-8")
    again = TrainingExamples(FACTS, QUESTIONS, 2, 1, 1, 0, asking, 0, 2)
    with_continuations(again, model, epochs=2, tokens=4, file=file, progress=False)
    assert again.continuations == examples.continuations and file.read_text(encoding="utf-8") == text
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    half = TrainingExamples(FACTS, QUESTIONS, 2, 1, 1, 0, asking, 0, 2)
    with_continuations(half, model, epochs=2, tokens=4, file=file, progress=False)
    assert half.continuations == examples.continuations


@pytest.mark.parametrize("architecture", slow_but(["llama"], ["llama", "t5"]))
def test_a_training_asks_in_all_forms_and_resumes_exactly(tokenizer, tmp_path, architecture):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    options = {
        "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "context_rate": 0.5, "general_rows": 2,
        "continuation_tokens": 3,
    }  # fmt: skip
    whole = EditorTrainer(
        fresh(chatting, architecture), arguments(tmp_path, **options), FACTS, FACTS[:2], questions=QUESTIONS
    )
    whole.train()
    assert set(whole.examples.asking.forms) == set(DEFAULT_FORMS) and whole.examples.continuations
    logged = next(entry for entry in whole.state.log_history if "loss_continuation" in entry)
    assert {f"loss_{kind}" for kind in LOCAL_KINDS} <= set(logged)
    again = EditorTrainer(fresh(chatting, architecture), arguments(tmp_path, **options), FACTS, questions=QUESTIONS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]


def test_a_tokenizer_without_a_chat_template_and_draws_made_before_are_taken(tokenizer, tmp_path):
    trainer = EditorTrainer(fresh(tokenizer), arguments(tmp_path), FACTS, questions=QUESTIONS)
    assert not set(CHAT_FORMS) & set(trainer.examples.asking.forms)
    examples = TrainingExamples(FACTS, QUESTIONS, asking=Asking({"prompt": 1}))
    assert EditorTrainer(fresh(tokenizer), arguments(tmp_path), examples).examples is examples
