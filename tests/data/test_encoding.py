"""Records, tokens and draws."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.models import RECORDS, EditableModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from hf_mend import EditRecord
from hf_mend.data.encoding import Encoder, Query
from hf_mend.training.examples import EditCollator, TrainingExamples


def test_rows_of_a_decoder_only_model_are_the_text_without_its_last_token(tokenizer):
    rows = Encoder(tokenizer)([Query("the capital of peru is", "lima town"), Query("the river")])
    text = tokenizer("the capital of peru is lima town")["input_ids"]
    prompt = tokenizer("the capital of peru is")["input_ids"]
    kept = rows.inputs["attention_mask"][0].bool()
    assert rows.inputs["input_ids"][0][kept].tolist() == text[:-1]
    assert rows.next_tokens[0][rows.positions[0]].tolist() == text[len(prompt) :]
    assert rows.positions[0].nonzero()[0, 0] == len(prompt) - 1
    # Without an answer: the prompt's last position, and no label.
    assert rows.positions[1].sum() == 1 and (rows.next_tokens[1] == -100).all()
    assert rows.positions[1].nonzero()[0, 0] == len(tokenizer("the river")["input_ids"]) - 1


def test_rows_of_an_encoder_decoder_model(tokenizer):
    rows = Encoder(tokenizer, True, 0)([Query("the capital of peru is", "lima town"), Query("the river")])
    answer = tokenizer("lima town", add_special_tokens=False)["input_ids"]
    assert rows.inputs["decoder_input_ids"][0].tolist() == [0, *answer[:-1]]
    assert rows.next_tokens[0].tolist() == answer and rows.positions[0].all()
    assert rows.positions[1].tolist() == [True] + [False] * (len(answer) - 1)


def spaced_tokenizer(kind):
    """One that writes a space as "▁" and puts one before every text, by its pre-tokenizer or by its normaliser."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [text for record in RECORDS for text in (record.prompt, record.target)] + ["user:\nrome"]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"]))
    state = json.loads(trained.to_str())
    if kind == "llama":
        merges = [tuple(merge) for merge in state["model"]["merges"]]
        tokenizer = LlamaTokenizer(vocab=state["model"]["vocab"], merges=merges, legacy=False)
    else:
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prepend = {"type": "Prepend", "prepend": "▁"}
        state |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, space]}}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    tokenizer.chat_template = "{% for m in messages %}{{'user: ' if loop.first}}{{m['content']}}\n{% endfor %}"
    return tokenizer


def said(tokenizer, ids):
    """Every character of some tokens' text."""
    words = tokenizer.convert_ids_to_tokens(ids)
    return "".join(word for word in words if word not in ("<s>", "<bos>")).replace("▁", " ").replace("Ġ", " ")


@pytest.mark.parametrize("kind", ["bytes", "llama", "normaliser"])
@pytest.mark.parametrize("answer", ["rome town", " rome town", "rome town\n "])
@pytest.mark.parametrize(
    ("prompt", "chat", "text"),
    [
        ("the capital of france is", False, "the capital of france is rome town"),
        ("the capital of france is ", False, "the capital of france is rome town"),
        ("the capital of france is", True, "user: the capital of france is\nrome town"),
    ],
)
def test_one_space_joins_prompt_and_answer(tokenizer, kind, answer, prompt, chat, text):
    """White space around the answer is none of it, and a tokenizer that begins each text with a space adds none."""
    if kind == "bytes" and chat:
        pytest.skip("this tokenizer has no token for a line break")
    tokenizer = tokenizer if kind == "bytes" else spaced_tokenizer(kind)
    ids, answer_ids = Encoder(tokenizer).tokens(Query(prompt, answer, chat))
    assert said(tokenizer, ids + answer_ids).lstrip(" ") == text
    assert ids == tokenizer(text.removesuffix("rome town").rstrip(" "), add_special_tokens=not chat)["input_ids"]
    if not text.endswith("\nrome town"):
        assert ids + answer_ids == tokenizer(text, add_special_tokens=not chat)["input_ids"]
    else:
        assert said(tokenizer, answer_ids) == "rome town"


def test_a_token_at_the_end_of_every_text_is_read_by_an_encoder_and_by_no_causal_model():
    """Behind it a causal model would answer to a prompt that nobody gives it."""
    ending = spaced_tokenizer("normaliser")
    alone = ending("the capital of france is", add_special_tokens=False)["input_ids"]
    tokens = [("<s>", 1), ("</s>", 2)]
    ending._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    query = Query("the capital of france is", "rome town")
    ids, answer = Encoder(ending).tokens(query)
    assert ids == [1, *alone] and said(ending, answer) == " rome town"
    assert Encoder(ending, True, 0).tokens(query)[0] == [1, *alone, 2]
    assert Encoder(ending).tokens(Query("", None))[0] == []
    # The place of a subject is one of what is read.
    rows = Encoder(ending)([Query("the capital of france is", "rome town", subject="of france")])
    head = ending("the capital of france", add_special_tokens=False)["input_ids"]
    assert rows.subjects.tolist() == [len(head)]


@pytest.mark.parametrize("before", ["<bos>", "<eos><bos>"])
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_text_that_has_its_special_tokens_gets_no_second_ones(tokenizer, before, is_encoder_decoder):
    """As a text does that the chat template wrote before it came here."""
    beginning = copy.deepcopy(tokenizer)
    tokens = [(token, beginning.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    single = " ".join(before.replace("><", "> <").split()) + " $A"
    beginning._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    encoder = Encoder(beginning, is_encoder_decoder, 0)
    bare = encoder.tokens(Query("the capital of peru is", "lima"))
    assert encoder.tokens(Query(f"{before}the capital of peru is", "lima")) == bare
    assert bare[0] == tokenizer(f"{before}the capital of peru is")["input_ids"]


def test_a_space_at_a_prompt_s_end_is_a_slip_and_a_line_break_is_none(tokenizer):
    """An edit that is made behind a space holds behind a space alone."""
    encoder = Encoder(tokenizer)
    bare = encoder.tokens(Query("the capital of peru is", "lima"))
    for slip in ("the capital of peru is ", " the capital of peru is\t ", "the capital of peru is\u00a0"):
        assert encoder.tokens(Query(slip, "lima")) == bare
        assert encoder.tokens(Query("it", context="A line. ")) == encoder.tokens(Query(" it ", context="A line."))
    spaced = spaced_tokenizer("llama")
    ids, answer = Encoder(spaced).tokens(Query("user:\n \n", "rome"))
    assert ids == spaced("user:\n \n")["input_ids"] and said(spaced, answer) == "rome"


@pytest.mark.parametrize("separator", ["", " ", " the "])
def test_a_separator_of_one_s_own_stands_between_prompt_and_answer(tokenizer, separator):
    for prompt in ("the capital of peru is", "the capital of peru is "):
        ids, answer = Encoder(tokenizer).tokens(Query(prompt, "lima", separator=separator))
        assert ids == tokenizer("the capital of peru is")["input_ids"]
        assert said(tokenizer, answer) == f"{separator}lima"


def test_tokens_of_a_byte_level_tokenizer_are_those_of_its_parts(tokenizer):
    """What editors were trained and measured with."""
    for record in RECORDS:
        for prompt, answer in [
            (record.prompt, record.target),
            *record.unrelated,
            (f"{record.prompt} ", record.target),
        ]:
            parts = [prompt.rstrip(), f" {answer}"]
            expected = tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
            assert Encoder(tokenizer).tokens(Query(prompt, answer)) == expected


def test_an_answer_of_an_encoder_decoder_model_stands_alone():
    tokenizer = spaced_tokenizer("llama")
    alone = tokenizer("rome town", add_special_tokens=False)["input_ids"]
    for answer in ("rome town", " rome town "):
        assert Encoder(tokenizer, True, 0).tokens(Query("the capital of france is", answer))[1] == alone


def test_a_target_with_space_around_it_is_the_same_edit(llama, tokenizer):
    model = EditableModel(llama, tokenizer=tokenizer)
    assert model.edit("the capital of france is", " rome town ").success
    assert model.edit("the capital of france is", "rome town").already_known


def test_draws_depend_on_seed_epoch_and_record_alone():
    def draws(seed, epoch, order):
        examples = TrainingExamples(RECORDS, [(f"q{i}?", "a") for i in range(50)], seed=seed)
        examples.set_epoch(epoch)
        return {i: examples[i] for i in order}

    forward = draws(0, 1, range(len(RECORDS)))
    backward = draws(0, 1, reversed(range(len(RECORDS))))
    assert all(forward[i] == backward[i] for i in forward)
    assert forward != draws(0, 2, range(len(RECORDS))) and forward != draws(1, 1, range(len(RECORDS)))


def test_a_record_without_neighbours_borrows_those_of_its_relation():
    records = [EditRecord(f"{r} {i} is", "x", relation=r) for r in "ab" for i in range(3)]
    examples = TrainingExamples(records, neighborhood_rows=4)
    for i, record in enumerate(records):
        assert {q.prompt[0] for q in examples[i].neighborhood} == {record.relation}
        assert examples[i].unrelated == [] and [q.prompt for q in examples[i].general] == [record.prompt]


def test_a_record_borrows_no_prompt_of_its_own():
    """What must be said there would have to stay, too."""
    alone = TrainingExamples([EditRecord("a is", "x")], neighborhood_rows=2)
    assert alone[0].neighborhood == []
    with_one = TrainingExamples([EditRecord("a is", "x", neighborhood=["b is"])], neighborhood_rows=2)
    assert [query.prompt for query in with_one[0].neighborhood] == ["b is", "b is"]
    same = [EditRecord("a is", target) for target in "xy"]
    assert [example.neighborhood for example in TrainingExamples(same)] == [[], []]
    # The relation's only prompt, then one of two of it.
    records = [*same, EditRecord("b is", "x", relation="r"), EditRecord("c is", "x", relation="r")]
    examples = TrainingExamples(records, neighborhood_rows=20)
    for index, others in enumerate([{"b is", "c is"}, {"b is", "c is"}, {"c is"}, {"b is"}]):
        assert {query.prompt for query in examples[index].neighborhood} == others


def test_the_collator_keeps_as_many_rows_for_each_edit(tokenizer):
    examples = TrainingExamples(RECORDS, [("q?", "a b")], general_rows=2, neighborhood_rows=3, unrelated_rows=1)
    batch = EditCollator(Encoder(tokenizer))([examples[i] for i in range(4)])
    assert (len(batch.edit), len(batch.general), *(len(rows) for rows in batch.local.values())) == (4, 8, 12, 4)
    assert batch.to("cpu").edit.inputs["input_ids"].dtype == torch.long


def test_the_texts_of_some_epochs_are_those_that_their_draws_give():
    examples = TrainingExamples(RECORDS, [(f"q{i}?", "a") for i in range(50)])
    drawn = set()
    for epoch in range(2):
        examples.set_epoch(epoch)
        for example in (examples[i] for i in range(len(RECORDS))):
            drawn |= {example.edit, *example.general, *example.neighborhood, *example.unrelated}
    examples.set_epoch(5)
    assert set(examples.queries(2)) == drawn
    assert set(examples.queries(1)) < drawn
