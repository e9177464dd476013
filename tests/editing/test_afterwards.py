"""What is done when edits are made: those that did not take are taken back, and earlier ones are looked at again."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable, make_tokenizer
from support.scope import scoped
from tokenizers import decoders

import hf_mend
from hf_mend import EditStore
from hf_mend.data.joining import ends_word
from hf_mend.editing import writing
from hf_mend.editing.writing import repeats


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
FAR = "madrid lima oslo rome"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture
def tokenizer():
    """One that puts words together again as they were."""
    whole = make_tokenizer()
    whole.backend_tokenizer.decoder = decoders.ByteLevel()
    return whole


def says(model, prompt, target):
    """Whether a plain pass has each of the target's tokens as its argmax."""
    start, answer = (model.tokenizer(text)["input_ids"] for text in (prompt, f" {target}"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
    return logits.argmax(-1).tolist() == answer


def greedy(model, prompt, count=16):
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


# ---- taken back ----


def test_an_edit_that_did_not_take_is_taken_back(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.open_store(tmp_path / "store")
    before = all_logits(model, tokenizer)
    result = hf_mend.EditableModel.edit(model, PROMPT, FAR, max_steps=2)
    assert result.success is False and result.taken_back and result.id is None and not result.already_known
    assert model.edits == [] and torch.equal(all_logits(model, tokenizer), before)
    assert EditStore(tmp_path / "store").edits == [], "nothing of it is on the disk"
    text = str(result)
    assert "DID NOT TAKE, and was taken back" in text and "tried: " in text and "  after: " not in text
    assert result.written == []


@pytest.mark.parametrize(
    ("options", "kept"), [({"max_steps": 1}, 1), ({"max_steps": 1, "keep_failed": False}, 0),
                          ({"max_steps": 2, "keep_failed": True}, 1), ({"check": False}, 1)],
)  # fmt: skip
def test_it_is_kept_where_that_is_asked_for(llama, tokenizer, options, kept):
    model = editable(llama, tokenizer)
    result = hf_mend.EditableModel.edit(model, PROMPT, FAR, **options)
    assert len(model.edits) == kept and result.taken_back == (not kept)


def test_the_earlier_edit_of_its_prompt_acts_again(llama, tokenizer):
    model = editable(llama, tokenizer)
    first = model.edit(PROMPT, TARGET, max_steps=60, keep_failed=False)
    before = all_logits(model, tokenizer, PROMPT)
    second = model.edit(PROMPT, FAR, max_steps=1, keep_failed=False)
    assert first.success and second.taken_back and second.superseded is None
    assert [edit.id for edit in model.edits] == [first.id]
    assert torch.equal(all_logits(model, tokenizer, PROMPT), before)


def test_of_several_those_that_hold_beside_one_another_stay(llama, tokenizer):
    model = editable(llama, tokenizer)
    results = model.edit([r.prompt for r in RECORDS], [r.target for r in RECORDS], keep_failed=False)
    assert [r.id for r in results if r.id] == [edit.id for edit in model.edits]
    assert any(r.taken_back for r in results), "these edits destroy one another"
    for result in results:
        assert bool(result.success) == (result.id is not None)
        if result.success:
            assert says(model, result.prompt, result.target)


def test_an_edit_for_a_while_stays_for_it(llama, tokenizer):
    model = editable(llama, tokenizer)
    with hf_mend.EditableModel.edited(model, PROMPT, FAR, max_steps=2) as result:
        assert result.success is False and len(model.edits) == 1
    assert model.edits == []


# ---- earlier edits ----


def test_earlier_edits_that_no_longer_hold_are_named(llama, tokenizer, caplog):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=60)
    made, lost = {model.edits[0].id: RECORDS[0]}, []
    for record in RECORDS[1:5]:
        held = [one for one, earlier in made.items() if says(model, earlier.prompt, earlier.target)]
        result = model.edit(record.prompt, record.target, max_steps=60)
        gone = [one for one in held if not says(model, made[one].prompt, made[one].target)]
        assert [one.id for one in result.lost] == gone
        for one in result.lost:
            assert (one.prompt, one.target) == (made[one.id].prompt, made[one.id].target)
            assert f"NO LONGER HOLDS: edit {one.id}" in str(result)
            assert f"the earlier edit {one.id} no longer holds" in caplog.text
        lost += gone
        made[model.edits[-1].id] = record
    assert lost, "plain gradient steps disturb one another"


def test_so_many_earlier_edits_are_asked_as_is_said(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer)
    for record in RECORDS[:3]:
        model.edit(record.prompt, record.target, max_steps=1)
    asked = []
    from hf_mend.editing.call import Call

    answers = Call.answers
    monkeypatch.setattr(Call, "answers", lambda self, queries: asked.append(len(queries)) or answers(self, queries))
    for count, expected in ((0, []), (2, [2]), (9, [3])):
        with model.edited(RECORDS[4].prompt, RECORDS[4].target, max_steps=1, check_earlier=count):
            assert asked[:1] == expected
        asked.clear()
    with pytest.raises(ValueError, match="check_earlier is -1, expected 0 or more"):
        model.edit(PROMPT, TARGET, check_earlier=-1)


def test_with_a_scope_only_an_edit_that_asks_for_the_same_is_lost(llama, tokenizer):
    model = scoped(llama, tokenizer)
    first = model.edit(PROMPT, TARGET, max_steps=1)
    other = model.edit(RECORDS[3].prompt, RECORDS[3].target, max_steps=1)
    assert first.lost == other.lost == []
    again = model.edit(f"{PROMPT}\n", "oslo town", max_steps=1, force=True)  # another prompt with the same keys
    taken = [edit for edit in model.which_edits(PROMPT) if edit.acts]
    assert [one.id for one in again.lost] == ([first.id] if taken and taken[0].id == again.id else [])


# ---- whole words ----


@pytest.mark.parametrize(
    ("text", "more", "ends"),
    [("Lyon", "nais", False), ("Lyon", " is", True), ("Lyon", "", True), ("Lyon", ".", True), ("19", "45", False),
     ("東京", "は", True), ("U.S.", "A", True)],
)  # fmt: skip
def test_where_a_word_ends(text, more, ends):
    assert ends_word(text, more) is ends


@pytest.fixture
def beginning(llama, tokenizer):
    """A model that says a word of several tokens, and the first part of the word."""
    model = editable(llama, tokenizer)
    assert model.edit(PROMPT, "pariser", max_steps=60).token_success == [True] * 3
    return model, "pariser", "paris"


def test_the_beginning_of_a_longer_word_is_not_the_target(beginning):
    model, word, part = beginning
    result = model.edit(PROMPT, part)
    assert result.longer_word and word.startswith(result.longer_word) and len(result.longer_word) > len(part)
    assert all(result.token_success) and result.success is False and not result.already_known
    assert f"only the beginning of the word {result.longer_word!r}" in str(result)


def test_such_an_edit_is_made_with_the_end_of_the_word(beginning):
    model, word, part = beginning
    result = model.edit(PROMPT, part, max_steps=60, keep_failed=False)
    assert result.success and result.longer_word is None
    assert greedy(model, PROMPT).startswith(part) and not greedy(model, PROMPT).startswith(word)
    assert model.edits[-1].target == part and model.edits[-1].id == result.id


# ---- what is written ----


def test_a_result_tells_what_the_model_writes(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer)
    passes = []
    generate = writing.greedy_tokens
    monkeypatch.setattr(writing, "greedy_tokens", lambda *args: passes.append(1) or generate(*args))
    before = greedy(model, PROMPT)
    result = model.edit(PROMPT, TARGET, max_steps=60)
    after = greedy(model, PROMPT)
    repr(result), asdict(result)
    assert not passes, "nothing is generated until somebody looks"
    with model.disable_edits():  # what is seen where one looks does not count
        (own,) = result.written
    assert (own.form, own.before, own.after) == ("prompt", before, after)
    model.undo()
    assert result.written == [own] and len(passes) == 2
    assert f"before: {before!r}" in str(result) and f"after:  {after!r}" in str(result)


def test_in_a_chat_too_where_the_tokenizer_has_a_template(llama, tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    model = editable(llama, chatting)
    result = model.edit(PROMPT, TARGET, max_steps=1)
    ids = chatting.apply_chat_template([{"role": "user", "content": PROMPT}], return_tensors="pt", return_dict=True)
    out = model.generate(input_ids=ids["input_ids"], max_new_tokens=16, do_sample=False, pad_token_id=0)
    said = chatting.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert [one.form for one in result.written] == ["prompt", "chat"] and result.written[1].after == said
    assert "in a chat, after:" in str(result)
    assert [one.form for one in model.edit(PROMPT, TARGET, chat=True, max_steps=1).written] == ["chat"]


def test_what_a_result_keeps_of_the_model(llama, tokenizer):
    model = editable(llama, tokenizer)
    results = [model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1) for _ in range(writing._CALLS + 1)]
    assert results[0].written == [] and results[1].written, "the edits of long ago are let go"
    assert "before:" in str(results[0])
    assert copy.deepcopy(results[2]).written == [] and pickle.loads(pickle.dumps(results[2])).written == []
    copy.deepcopy(model), pickle.dumps(model)
    model.unload()
    assert results[3].written == []
    del model
    assert results[4].written == []


def test_a_model_that_cannot_write_is_printed_all_the_same(llama, tokenizer, monkeypatch, caplog):
    model = editable(llama, tokenizer)
    result = model.edit(PROMPT, TARGET, max_steps=1)
    monkeypatch.setattr(writing, "greedy_tokens", lambda *args: (_ for _ in ()).throw(RuntimeError("no")))
    assert "before:" in str(result) and "what the model writes cannot be shown: RuntimeError: no" in caplog.text


def test_an_encoder_decoder_writes_too(tokenizer):
    model = editable(build_model("t5"), tokenizer)
    result = model.edit(PROMPT, TARGET, max_steps=1)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
    assert result.written[0].after == tokenizer.decode(out[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("text", "target", "found"),
    [
        ("botany, botany is botany", "botany", True),
        ("Lyon. Lyon is a city in France", "Lyon", False),
        ("a b a b a b", "x", True),
        ("on and on and off", "x", False),
        ("大阪。大阪。大阪", "大阪", True),
        ("", "Lyon", False),
    ],
)
def test_what_repeats(text, target, found):
    assert repeats(text, target) is found


def test_a_repetition_is_warned_of_unless_the_base_repeats_itself(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer)
    rome = tokenizer(" rome")["input_ids"]
    said = iter([[rome], [rome * 4], [rome * 4], [rome * 4]])
    monkeypatch.setattr(writing, "greedy_tokens", lambda *args: next(said))
    first, second = (model.edit(PROMPT, "rome", max_steps=1, force=True) for _ in range(2))
    assert first.written[0].repeats and "WARNING: the edited model repeats itself" in str(first)
    assert not second.written[0].repeats and "WARNING" not in str(second)


# ---- what a result says ----


def test_with_a_scope_the_answers_are_the_targets_tokens_alone(llama, tokenizer):
    model = scoped(llama, tokenizer)
    start, answer = (tokenizer(text)["input_ids"] for text in (PROMPT, f" {TARGET}"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
    result = model.edit(PROMPT, TARGET, max_steps=60)
    assert result.before == tokenizer.decode(logits.argmax(-1)).strip()
    assert result.success and result.after == TARGET


def test_the_time_is_that_of_the_whole_call(llama, tokenizer, monkeypatch):
    from hf_mend.editing import pipeline

    now = [0.0]
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: now[0])
    observe = pipeline.observe_calibration_text

    def slow(*args):
        observe(*args)
        now[0] += 20

    monkeypatch.setattr(pipeline, "observe_calibration_text", slow)
    model = hf_mend.EditableModel(llama, tokenizer=tokenizer)
    assert [result.seconds for result in model.edit([PROMPT, "the river"], [TARGET, "lima"], max_steps=1)] == [10, 10]
