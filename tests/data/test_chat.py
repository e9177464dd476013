"""Chat templates as models have them: what is read, where the answer begins, and what is refused."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_mend.data.chat import render_chat
from hf_mend.data.encoding import Encoder, Query


PROMPT = ("user", "the capital of peru is")
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chatting():
    """A tokenizer with a token for every byte, to which a test gives its template."""
    bytes_of_all = Tokenizer(models.BPE())
    bytes_of_all.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of_all.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bytes_of_all.train_from_iterator(["the capital of peru is lima", "lima lima"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_of_all, eos_token="<eos>", pad_token="<eos>")


def by_template(tokenizer, turns, answer):
    """What the template itself makes of the prompt and, behind that, of the answer."""
    messages = [{"role": role, "content": said} for role, said in turns]
    begun = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}])["input_ids"]
    assert whole[: len(begun)] == begun
    return begun, whole[len(begun) :]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        # The answer follows a marker at once, behind a space, behind a line break.
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + GENERATION, ""),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}" + GENERATION, "<eos>"),
        ("{% for m in messages %}<|{{ m.role }}|> {{ m.content }}{% endfor %}" + GENERATION, ""),
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}" + GENERATION, ""),
        (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
            "{% endif %}{% endfor %}",
            "",
        ),
    ],
)
@pytest.mark.parametrize("answer", ["lima", "a"])
def test_an_answer_is_what_the_template_writes_behind_the_prompt(chatting, template, end, answer):
    chatting.chat_template = template
    prompt, said = by_template(chatting, [PROMPT], answer)
    closing = chatting(end, add_special_tokens=False)["input_ids"]
    found = Encoder(chatting).tokens(Query(PROMPT[1], answer, chat=True))
    assert found == (prompt, said[: len(said) - len(closing)])
    assert Encoder(chatting).tokens(Query(PROMPT[1], None, chat=True))[0] == prompt


def test_a_marker_that_only_answers_have_is_read_and_not_said(chatting):
    chatting.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    text, separator = render_chat(chatting, [PROMPT])
    assert (text, separator) == ("<|user|>\nthe capital of peru is\n<|assistant|>\n", "")
    chatting.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert render_chat(chatting, [PROMPT]) == ("user: the capital of peru is\nassistant:", " ")
    ids, answer = Encoder(chatting).tokens(Query(PROMPT[1], "lima", chat=True))
    assert chatting.decode(ids + answer) == "user: the capital of peru is\nassistant: lima"


def test_an_empty_thought_before_the_answer_is_read_too(chatting):
    chatting.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '<think></think>\n\n' if m.role == 'assistant' }}{{ m.content }}"
        "{% endfor %}" + GENERATION
    )
    text = "<|user|>the capital of peru is<|assistant|><think></think>\n\n"
    assert render_chat(chatting, [PROMPT]) == (text, "")


def test_a_template_that_writes_no_answers_tells_nothing(chatting):
    """A reasoning model's prompt begins a thought that its finished answers do not have."""
    chatting.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    assert render_chat(chatting, [PROMPT]) == ("<|user|>the capital of peru is<|assistant|><think>\n", None)
    ids, answer = Encoder(chatting).tokens(Query(PROMPT[1], "lima", chat=True))
    assert chatting.decode(ids + answer).endswith("<think>\nlima")


def test_a_template_that_reads_parts_gets_parts(chatting):
    chatting.chat_template = PARTS
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "ho"), PROMPT]
    text, separator = render_chat(chatting, turns)
    assert text == "system: be brief\nuser: hi\nassistant: ho\nuser: the capital of peru is\nassistant: "
    assert separator == ""
    # One that fails on text, and one that asks what it has.
    chatting.chat_template = (
        "{% for m in messages %}{{ m.content[0]['text'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    assert render_chat(chatting, [PROMPT])[0] == "the capital of peru is\nA:"
    chatting.chat_template = (
        "{% for m in messages %}{% if m.content is string %}S {{ m.content }}{% endif %}{% endfor %}"
    )
    assert render_chat(chatting, [PROMPT])[0].startswith("S the capital of peru is")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.text }}\n{% endfor %}", "leaves the prompt out: 'the capital of"),
        ("{{ messages[0]['content'] }}", "leaves the prompt out"),
        (
            "{% for m in messages %}{{ raise_exception('No system role') }}{% endfor %}",
            r"refuses this chat \(No system",
        ),
        (None, "needs a tokenizer with a chat template"),
    ],
)
def test_a_chat_that_the_template_does_not_write_is_refused(chatting, template, message):
    chatting.chat_template = template
    with pytest.raises(ValueError, match=message):
        render_chat(chatting, [("system", "be brief"), PROMPT])


def test_white_space_that_a_template_trims_is_not_missed(chatting):
    chatting.chat_template = "{% for m in messages %}{{ m.content | trim }}|{% endfor %}"
    assert render_chat(chatting, [("user", " the\n capital ")])[0].startswith("the\n capital|")
