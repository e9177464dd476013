"""Edits whose other forms are longer than the model takes."""

from __future__ import annotations

import copy

import pytest
from support.models import build_model
from support.scope import scoped

from hf_mend import EditableModel, training_free_config


CHAT = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def with_chat(tokenizer):
    with_chat = copy.deepcopy(tokenizer)
    with_chat.chat_template = CHAT
    return with_chat


@pytest.mark.parametrize("words", [46, 54, 59, 61, 62])
def test_a_form_that_is_longer_than_the_model_takes_is_left_out(with_chat, words):
    """GPT-2's positions end at 64: a text that is longer is an error there, and nothing is beyond it."""
    model = scoped(build_model("gpt2"), with_chat)
    prompt = " ".join(["the"] * words)
    result = model.edit(prompt, "rome", max_steps=1)
    forms = {*model.edits[0].scope.texts}
    assert "prompt" in forms and result.scope is not None
    assert ("chat" in forms) == (words < 50)


def test_an_edit_without_an_editor_leaves_its_long_forms_out(with_chat):
    model = EditableModel(build_model("gpt2"), training_free_config(scope=True), with_chat)
    model.edit(" ".join(["the"] * 60), "rome", max_steps=1)
    assert {*model.edits[0].scope.texts} <= {"prompt", "as a question", "behind text"}
    assert not {"chat"} & {*model.edits[0].scope.texts}


def test_what_is_too_long_itself_is_refused(with_chat):
    model = scoped(build_model("gpt2"), with_chat)
    with pytest.raises(ValueError, match="the model takes 64; shorten the prompt"):
        model.edit(" ".join(["the"] * 64), "rome")
    assert not model.edits
