"""Templates by relation, the forms of asking, and what stands before a prompt."""

from __future__ import annotations

import copy
import json
import random

import pytest
from support.models import RECORDS

from hf_mend import EditRecord, read_edits
from hf_mend.data.encoding import Encoder, Query
from hf_mend.data.forms import (
    CHAT_FORMS,
    DEFAULT_FORMS,
    FORMS,
    FormTemplates,
    Surroundings,
    available_forms,
    check_forms,
    in_form,
    packaged_texts,
    with_forms,
)
from hf_mend.data.readers import write_edits


TEMPLATES = {
    "P1": {
        "questions": ["Who runs {}?", "{}: who runs it?"],
        "same_subject": ["{} lies in", "{} is old"],
        "unlike": ["P2"],
    },
    "P2": {"questions": ["Where is {}?"]},
    "*": {"same_subject": ["I know {} and"]},
}
QUESTIONS = [("who wrote it?", "the scribe"), ("what is blue?", "the sky")]


def templates(tmp_path, content=TEMPLATES):
    path = tmp_path / "forms.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return FormTemplates.load(path)


def test_templates_fill_what_a_record_lacks(tmp_path):
    records = [
        EditRecord("Lima is run by", "Bo", relation="P1", subject="Lima"),
        EditRecord("Lima is in", "Chile", relation="P9", subject="Lima"),
        EditRecord("Oslo is run by", "Cy", relation="P1", subject="Oslo", questions=["Who?"], same_subject=["Oslo"]),
        EditRecord("Rome is run by", "Di", relation="P1"),
    ]
    before = copy.deepcopy(records)
    known, unknown, own, without = with_forms(iter(records), templates(tmp_path))
    assert records == before
    assert known.questions == ["Who runs Lima?", "Lima: who runs it?"]
    # The questions of a relation that has nothing to do with this one ask the same subject for something else.
    assert known.same_subject == ["Lima lies in", "Lima is old", "Where is Lima?"]
    assert unknown.questions == [] and unknown.same_subject == ["I know Lima and"]
    assert own == records[2] and without == records[3]


def test_a_held_out_template_is_in_the_second_part_alone(tmp_path):
    seen, unseen = templates(tmp_path).split()
    assert seen.of("P1").questions == ("Who runs {}?",) and unseen.of("P1").questions == ("{}: who runs it?",)
    assert seen.of("P1").same_subject == ("{} lies in", "Where is {}?") and unseen.of("P1").same_subject == (
        "{} is old",
    )
    assert seen.of("P2").questions == ("Where is {}?",) and unseen.of("P2").questions == ()
    assert templates(tmp_path).split(0)[1].of("P1").questions == ("Who runs {}?",)


def test_the_packaged_templates_are_whole():
    packaged = FormTemplates.load()
    assert packaged.of("P27").questions and packaged.of("city_country").questions and packaged.of(None).same_subject
    for name, forms in packaged.relations.items():
        assert len(set(forms.questions)) == len(forms.questions) and set(forms.unlike) <= set(packaged.relations), name
        # An edit must not change what asks for the same thing.
        assert not set(packaged.of(name).same_subject) & set(forms.questions), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "holds a list, expected an object"),
        ({"P1": []}, "'P1' is \\[\\], expected an object with 'questions'"),
        ({"P1": {"question": []}}, "expected an object with 'questions'"),
        ({"P1": {"questions": "Who?"}}, "'questions' is 'Who\\?', expected a list of texts"),
        ({"P1": {"questions": [" "]}}, "expected a list of texts"),
        ({"P1": {"same_subject": ["He is"]}}, "'He is' has no single '{}'"),
    ],
)
def test_templates_that_cannot_be_read_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        templates(tmp_path, content)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"questoin": 1}, "forms has 'questoin', expected some of"),
        ({"chat": -1}, r"forms\['chat'\] is -1, expected a weight of at least 0"),
        ({"chat": "1"}, r"forms\['chat'\] is '1'"),
        ({"chat": float("nan")}, r"forms\['chat'\] is nan"),
        ({"chat": 0}, "expected at least one form with a weight above 0"),
        ({}, "expected at least one form"),
    ],
)
def test_weights_that_say_nothing_are_refused(forms, message):
    with pytest.raises(ValueError, match=message):
        check_forms(forms)


def test_a_tokenizer_without_a_chat_template_gets_no_chats(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert available_forms(DEFAULT_FORMS, chatting) == DEFAULT_FORMS
    assert set(available_forms(DEFAULT_FORMS, tokenizer)) == {"prompt", "paraphrase", "question"}
    assert available_forms({"chat": 1, "prompt": 0}, tokenizer) == {"paraphrase": 1}


@pytest.mark.parametrize(
    ("template", "left"),
    [
        ("{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}{{ m.content }}{% endfor %}",
         {"chat", "later_turn"}),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", {"chat", "later_turn"}),
        ("{{ messages[-1].content }}", {"chat"}),
        ("{{ raise_exception('no') }}", set()),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_is_not_drawn(tokenizer, template, left):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = template
    assert set(available_forms(DEFAULT_FORMS, chatting)) == {"prompt", "paraphrase", "question", *left}


def test_a_query_in_each_form():
    around = Surroundings(RECORDS, QUESTIONS)
    draw = random.Random(0)
    query = Query("the seat is", "rome")
    asked = {form: in_form(query, form, draw, around) for form in FORMS}
    assert all(asked[form].chat == (form in CHAT_FORMS) for form in FORMS)
    assert all((one.prompt, one.answer) == ("the seat is", "rome") for one in asked.values())
    roles = [role for role, _ in asked["later_turn"].turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    assert asked["system"].system and not asked["chat"].turns and asked["chat"].system is None


def test_contexts_are_one_to_three_sentences_and_never_the_record_itself():
    record = RECORDS[0]
    around = Surroundings([record], [], texts=["One line.", "Another line."])
    contexts = {around.context(random.Random(seed), record.prompt) for seed in range(60)}
    assert {text.strip() for text in contexts} <= {
        " ".join(lines) for n in (1, 2, 3) for lines in _sequences(["One line.", "Another line."], n)
    }
    assert {len(text.split(".")) - 1 for text in contexts} == {1, 2, 3}
    assert all(text[-1].isspace() for text in contexts)
    stated = {around.context(random.Random(seed), "another prompt") for seed in range(60)}
    assert any(f"{record.prompt} {record.target}." in text for text in stated)
    for seed in range(60):
        assert all(record.prompt not in said for _, said in around.turns(random.Random(seed), record.prompt))


def _sequences(items, count):
    return [[]] if not count else [[item, *rest] for item in items for rest in _sequences(items, count - 1)]


def test_without_any_text_of_the_user_there_are_the_packaged_ones():
    around = Surroundings([], [])
    assert around.context(random.Random(0)).strip()
    assert around.context(random.Random(0)).split(". ")[0].rstrip(".\n ") in " ".join(packaged_texts())
    assert [role for role, _ in around.turns(random.Random(0))][:2] == ["user", "assistant"]


def test_a_query_with_turns_system_and_context_is_what_the_template_writes(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>\n"
        "{% endif %}"
    )
    encoder = Encoder(chatting)
    query = Query(
        "the seat is", "rome", True, context="A line.", turns=(("user", "hi"), ("assistant", "ho")), system="Be brief."
    )
    text = "<system>Be brief.<user>hi<assistant>ho<user>A line. the seat is<assistant>\n"
    prompt, answer = encoder.tokens(query)
    assert prompt == chatting(text, add_special_tokens=False)["input_ids"]
    assert prompt + answer == chatting(text + "rome", add_special_tokens=False)["input_ids"]
    plain = Query("the seat is", "rome", context="A line.\n")
    assert encoder.tokens(plain)[0] == chatting("A line.\nthe seat is")["input_ids"]
    # Bare, the query is what it always was.
    assert (
        encoder.tokens(Query("the seat is", "rome", True))[0]
        == chatting("<user>the seat is<assistant>\n")["input_ids"]
    )


@pytest.mark.parametrize("after", [(5, 6), "of spain", ()])
def test_behind_an_answer_the_positions_are_those_that_predict_what_follows(tokenizer, after):
    ids = list(after) if isinstance(after, tuple) else tokenizer(after, add_special_tokens=False)["input_ids"]
    prompt, answer = Encoder(tokenizer).tokens(Query("the seat of", "peru is lima"))
    rows = Encoder(tokenizer)([Query("the seat of", "peru is lima", after=after), Query("the river")])
    kept = rows.inputs["attention_mask"][0].bool()
    assert rows.inputs["input_ids"][0][kept].tolist() == prompt + answer + ids[:-1]
    assert rows.positions[0].nonzero()[:, 0].tolist() == list(
        range(len(prompt + answer) - 1, len(prompt + answer + ids[:-1]))
    )
    assert rows.next_tokens[0][rows.positions[0]].tolist() == (ids or [-100])
    # In an encoder-decoder the answer is the decoder's, and its end follows where nothing else is given.
    rows = Encoder(tokenizer, True, 0)([Query("the seat of", "peru is lima", after=after), Query("the river", "rome")])
    answer = tokenizer("peru is lima", add_special_tokens=False)["input_ids"]
    ids = ids or [tokenizer.eos_token_id]
    kept = rows.inputs["decoder_input_ids"][0][: len(answer + ids)].tolist()
    assert kept == [0, *answer, *ids][: len(answer + ids)]
    chosen = rows.positions[0].nonzero()[:, 0].tolist()
    assert chosen == list(range(len(answer), len(answer + ids)))
    assert rows.next_tokens[0][rows.positions[0]].tolist() == ids
    assert (rows.next_tokens[0][: len(answer)] == -100).all()
    assert rows.positions[1].sum() == len(tokenizer("rome", add_special_tokens=False)["input_ids"])


def test_a_text_that_is_too_long_loses_what_stands_before_it(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    encoder = Encoder(chatting)
    bare = Query("the seat is", "rome", True)
    full = Query(
        "the seat is", "rome", True, context="the river of it.", turns=(("user", "the capital"),), system="be"
    )
    lengths = [sum(map(len, encoder.tokens(query))) for query in (bare, full)]
    assert encoder.shortened(full, None) == encoder.shortened(full, lengths[1]) == full
    assert encoder.shortened(full, lengths[1] - 1) == Query("the seat is", "rome", True, turns=full.turns, system="be")
    assert encoder.shortened(full, lengths[0]) == bare


def test_the_new_fields_are_written_and_read(tmp_path):
    record = EditRecord("Say", "yes", questions=["What to say?"], same_subject=["Who says"], id="3")
    write_edits(tmp_path / "set.jsonl", [record])
    assert list(read_edits(tmp_path / "set.jsonl")) == [record]
