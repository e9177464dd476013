"""Edits in a chat, behind a system prompt and earlier turns, and edits with a separator of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend.data.encoding import Query
from hf_mend.editing.requests import EditRequest, as_requests


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
CHAT = (
    "{% for m in messages %}{{ {'system': '<unk>', 'user': '<bos>', 'assistant': '<eos>'}[m.role] }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<eos>{% endif %}"
)
SYSTEM = {"role": "system", "content": "the river of"}
EARLIER = [SYSTEM, {"role": "user", "content": "the seat of peru is"}, {"role": "assistant", "content": "lima"}]


@pytest.fixture
def chatting(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    return chatting


def says(model, tokenizer, messages, prompt):
    """What the model goes on with, as anybody asks it who has the template alone."""
    messages = [*messages, {"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_an_edit_holds_behind_the_messages_that_it_was_made_with(llama, chatting):
    model = editable(llama, chatting)
    result = model.edit(PROMPT, TARGET, messages=EARLIER, max_steps=60)
    ids = chatting(TARGET, add_special_tokens=False)["input_ids"]
    assert result.success and says(model, chatting, EARLIER, PROMPT)[: len(ids)] == ids
    with model.disable_edits():
        assert says(model, chatting, EARLIER, PROMPT)[: len(ids)] != ids
    # Probes are turns of the same chat.
    probed = model.edit(PROMPT, TARGET, messages=EARLIER, paraphrases=[PROMPT], locality=[PROMPT])
    assert probed.already_known and probed.paraphrases[0].ok


def test_behind_another_system_prompt_it_is_another_prompt(llama, chatting, tmp_path):
    model = editable(llama, chatting)
    other = [{"role": "system", "content": "the seat of"}]
    first = model.edit(PROMPT, TARGET, messages=[SYSTEM], max_steps=1)
    second = model.edit(PROMPT, "lima town", messages=other, max_steps=1, force=True)
    assert second.superseded is None and len(model.edits) == 2
    third = model.edit(
        PROMPT, "oslo town", messages=[{**SYSTEM, "content": " the river  of"}], max_steps=1, force=True
    )
    assert third.superseded == first.id
    model.save_edits(tmp_path / "edits")
    again = editable(build_model("llama"), chatting)
    again.load_edits(tmp_path / "edits")
    keys = [edit.prompt_key for edit in again.edits]
    assert keys == [edit.prompt_key for edit in model.edits] and keys[0] == keys[2] != keys[1]


def test_an_edit_notes_the_request_that_it_was_made_for(llama, chatting):
    model = editable(llama, chatting)
    model.edit(PROMPT, TARGET, messages=EARLIER, max_steps=1)
    model.edit(PROMPT, TARGET, separator="", max_steps=1, force=True)
    turns = tuple((message["role"], message["content"]) for message in EARLIER)
    made = [EditRequest.of_edit(edit) for edit in model.edits]
    assert made == [EditRequest(PROMPT, TARGET, True, messages=turns), EditRequest(PROMPT, TARGET, separator="")]
    assert made[0].query == Query(PROMPT, TARGET, True, turns=turns)
    edit = model.edits[0]
    for wrong in ("{", "3", '["x"]'):
        edit.metadata["messages"] = wrong
        with pytest.raises(ValueError, match=f"the edit '{edit.id}' notes the messages"):
            EditRequest.of_edit(edit)


def test_a_separator_is_what_stands_before_the_target(llama, tokenizer):
    model = editable(llama, tokenizer)
    result = model.edit(PROMPT, TARGET, separator="", max_steps=60)
    ids, target = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, TARGET))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
    assert result.success and logits.argmax(-1).tolist() == target


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"messages": [SYSTEM, {"role": "user", "content": PROMPT}]},
            ValueError,
            "the messages end with a user's turn",
        ),
        ({"messages": ["be brief"]}, TypeError, r"messages\[0\] is 'be brief', expected an object whose 'role' and"),
        ({"messages": [SYSTEM, {"role": "assistant"}]}, TypeError, r"messages\[1\] is .*expected an object"),
        ({"messages": [{"role": "system", "content": ["x"]}]}, TypeError, r"messages\[0\] is"),
        ({"separator": 3}, TypeError, "separator is 3, expected a text"),
    ],
)
def test_messages_that_are_none_are_named_and_nothing_changes(llama, chatting, options, error, message):
    model = editable(llama, chatting)
    before = all_logits(model, chatting)
    with pytest.raises(error, match=message):
        model.edit(PROMPT, TARGET, **options)
    assert model.edits == [] and torch.equal(all_logits(model, chatting), before)


def test_a_message_that_the_template_leaves_out_is_named(llama, chatting):
    chatting.chat_template = CHAT.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(ValueError, match="template leaves out the system message 'the river of'"):
        editable(llama, chatting).edit(PROMPT, TARGET, messages=[SYSTEM])


def test_all_prompts_of_a_call_stand_behind_its_messages():
    turns = (("system", "the river of"),)
    assert as_requests(["p", "q"], ["t", "u"], False, [], [], [SYSTEM], "\n") == [
        EditRequest("p", "t", True, messages=turns, separator="\n"),
        EditRequest("q", "u", True, messages=turns, separator="\n"),
    ]
