"""Records, tokens and draws."""

from __future__ import annotations

import torch
from conftest import RECORDS

from hf_mend import EditRecord
from hf_mend.data import EditCollator, Encoder, Query, TrainingExamples


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
