"""What may be asked of a model: lists, records, probes, and what is refused before anything is done."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend import EditRecord, read_edits
from hf_mend.data.encoding import Query
from hf_mend.editing.edit_result import EditResult
from hf_mend.editing.requests import EditRequest, as_requests, check_requests
from hf_mend.editing.scoring import Answers


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


RECORD = EditRecord("a b", "c", ["b a"], ["a d"], subject="b")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("p", "t", False, "q", ["r", "s"]), [EditRequest("p", "t", False, ["q"], ["r", "s"])]),
        ((("p", "q"), ["t", "u"], True, [], []), [EditRequest("p", "t", True), EditRequest("q", "u", True)]),
        ((RECORD, None, True, "z", []), [EditRequest("a b", "c", True, ["b a", "z"], ["a d"], "b")]),
        (([RECORD, EditRecord("x", "y")], None, False, [], []),
         [EditRequest("a b", "c", False, ["b a"], ["a d"], "b"), EditRequest("x", "y")]),
    ],
)  # fmt: skip
def test_requests_are_what_a_person_would_write_down(asked, expected):
    assert as_requests(*asked) == expected


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ((["p", "q"], ["t", "u"], False, "z", []), ValueError, "probes go with one edit, got 2; pass EditRecords"),
        (("p", None, False, [], []), ValueError, "1 prompts and 0 targets"),
        (([RECORD, "p"], ["t", "u"], False, [], []), TypeError, "or prompts are EditRecords; got EditRecord"),
        (("p", 42, False, [], []), TypeError, "target is 42, a int; expected a text or list of texts"),
        ((42, "t", False, [], []), TypeError, "prompt is 42, a int; expected a text, EditRecord or list of either"),
        ((b"p", "t", False, [], []), TypeError, "prompt is b'p', a bytes"),
        (({"prompt": "p"}, "t", False, [], []), TypeError, "prompt is {'prompt': 'p'}, a dict"),
        (("p", "t", False, 3, []), TypeError, "paraphrases is 3, a int; expected a text or list of texts"),
        (("p", "t", False, [None], []), TypeError, "paraphrases is a list of texts; it holds a NoneType"),
    ],
)
def test_what_is_no_request(asked, error, message):
    with pytest.raises(error, match=message):
        as_requests(*asked)


def test_probes_come_in_order_with_the_target_where_it_is_to_be_said():
    request = EditRequest("p", "t", True, ["q", "r"], ["s"], "p")
    assert request.query == Query("p", "t", True, "p")
    assert request.probes == [Query("q", "t", True), Query("r", "t", True), Query("s", None, True)]


def test_one_prompt_is_one_whatever_its_white_space_but_not_in_a_chat():
    request = EditRequest("the capital of peru is", "tokyo town")
    assert request.is_same(EditRequest(" the  capital of peru is ", "tokyo  town ", subject="peru"))
    assert request.prompt_key != EditRequest("the capital of peru is", "tokyo town", chat=True).prompt_key
    assert not request.is_same(EditRequest("the capital of peru is", "tokyo"))


def test_the_same_request_twice_is_fine_and_two_answers_in_and_out_of_a_chat_too(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}", raising=False)
    encoder = editable(llama, tokenizer).encoder
    requests = [EditRequest(PROMPT, TARGET), EditRequest(PROMPT, "lima", chat=True), EditRequest(f"{PROMPT} ", TARGET)]
    check_requests(requests, encoder, llama.config)
    with pytest.raises(ValueError, match="requests 1 and 3 want two answers"):
        check_requests([*requests, EditRequest(PROMPT, "oslo", chat=True)], encoder, llama.config)


def test_a_probe_is_ok_where_the_target_is_said_or_the_answer_stayed(tokenizer):
    request = EditRequest("p", "t", paraphrases=["q", "r"], locality=["s", "u"])
    four = [0.0] * 4
    before = Answers(four, [[5], [6], [7], [8]], [[False], [True], [True], [True]], four)
    after = Answers(four, [[5], [9], [7], [9]], [[True], [False], [False], [True]], four)
    result = EditResult("id", "p", "t", "", "", 0.1, 0.2, [True, False], 1, 0.5)

    class Decodes:
        def decode(self, tokens):
            return str(tokens)

    result.set_probes(request, before, after, Decodes())
    assert [(p.prompt, p.before, p.after, p.ok) for p in result.paraphrases] == [
        ("q", "[5]", "[5]", True), ("r", "[6]", "[9]", False),
    ]  # fmt: skip
    assert [(p.prompt, p.ok) for p in result.locality] == [("s", True), ("u", False)]
    assert result.success is False and not result.already_known
    shown = str(result)
    assert "Edit id: DID NOT TAKE" in shown and "tokens that are now the argmax: 1 of 2" in shown
    assert "paraphrase BAD 'r': '[6]' -> '[9]'" in shown and "locality ok  's'" in shown


def test_records_of_a_file_are_named_by_their_lines(llama, tokenizer, tmp_path):
    rows = [(PROMPT, "lima"), (RECORDS[1].prompt, "oslo"), (PROMPT, "rome")]
    path = tmp_path / "log.jsonl"
    path.write_text("\n\n".join(json.dumps({"prompt": p, "target": t}) for p, t in rows))
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match="line 1 and line 5 want two answers to one prompt.*on_conflict='last'"):
        model.edit(list(read_edits(path)))
    with pytest.raises(ValueError, match=r"line 3 has \d+ tokens with its target, the model takes 64"):
        check_requests([EditRequest("river " * 80, "rome", where="line 3")], model.encoder, llama.config)
    assert model.edits == []
    results = model.edit(list(read_edits(path, on_conflict="last")), max_steps=1)
    assert [result.target for result in results] == ["oslo", "rome"]
