"""ROME against its closed form in numpy and Adam on the value in a plain copy of the model."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.methods import inputs_of, nll, row, searching, second_moment
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend.data.encoding import Query
from hf_mend.edits.low_rank import dense
from hf_mend.evaluation.metrics import evaluate_records


RECORD = replace(RECORDS[0], subject="france")


def text_of(tokenizer, ids) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ")


@pytest.mark.parametrize(
    ("architecture", "subject"),
    [("llama", "france"), ("gpt2", "france"), ("t5", "france"), ("llama", None), ("gpt2", "nowhere in it")],
)
def test_rome_is_the_closed_form_and_adam_on_the_value(base, tokenizer, subject):
    copied = copy.deepcopy(base)
    options = {"layers_to_transform": [1], "num_steps": 5, "edit_lr": 0.2, "whiten_rank": 512, "whiten_ridge": 0.05}
    model = searching(base, tokenizer, "rome", **options)
    target = model.targets[0]
    before = all_logits(model, tokenizer)
    record = replace(RECORD, subject=subject)
    moment = second_moment(model, target, 0.05)
    rows = row(model, record)
    x = inputs_of(model, target, rows)[0]
    prompt = model.encoder.tokens(Query(record.prompt))[0]
    wanted = record.prompt[: record.prompt.index("france") + len("france")] if subject == "france" else record.prompt
    place = next(i for i in range(len(prompt)) if text_of(tokenizer, prompt[: i + 1]) == wanted)
    key = x[place].double().numpy()
    direction = np.linalg.solve(moment, key)
    direction /= key @ direction

    model.edit(record, force=True)
    (name,) = model.edits[0].updates
    assert name == target.name
    u, v = model.edits[0].updates[name]
    np.testing.assert_allclose(u[0].numpy(), direction, rtol=1e-2, atol=1e-3 * np.abs(direction).max())

    value = torch.zeros(target.d_out, requires_grad=True)
    module = dict(copied.named_modules())[name]
    along = torch.tensor(direction, dtype=torch.float32)
    module.register_forward_hook(lambda _, args, out: out + (args[0] @ along).unsqueeze(-1) * value)
    optimizer = torch.optim.Adam([value], 0.2)
    for _ in range(5):
        optimizer.zero_grad()
        nll(copied, rows).backward()
        optimizer.step()
    torch.testing.assert_close(v[0], value.detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dense((u, v)) @ x[place], v[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(all_logits(model, tokenizer), all_logits(copied, tokenizer), rtol=1e-2, atol=1e-2)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before)


def test_a_subject_that_does_not_reach_the_answer_is_named(llama, tokenizer):
    model = searching(llama, tokenizer, "rome", layers_to_transform=[3])
    with pytest.raises(ValueError, match="no influence on the answer through the layer .* name a lower block"):
        model.edit(RECORD)
    assert not model.edits


def test_the_subject_is_found_in_a_chat_turn_too(tokenizer):
    from hf_mend.data.encoding import Encoder

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}the river {{ m.content }} of it{% endfor %}"
    rows = Encoder(chatting)([Query("of france is green", "now", chat=True, subject="france"), Query("france", "is")])
    ids = rows.inputs["input_ids"][0]
    assert text_of(chatting, ids[: rows.subjects[0] + 1].tolist()) == "the river of france"
    assert rows.subjects[1] == -1
    assert rows[1:].subjects.tolist() == [-1]


def test_a_subject_that_the_prompt_does_not_have_is_named(llama, tokenizer, caplog):
    """The edit would silently be one at the prompt's last token."""
    model = searching(llama, tokenizer, "rome")
    records = [replace(RECORD, subject=subject) for subject in ("france", None)]
    model.edit(records[0], check=False)
    model.edit(records[1], check=False)
    assert "subject" not in caplog.text
    wrong = [replace(RECORDS[0], subject="France"), replace(RECORDS[1], subject="itly")]
    model.edit(wrong, check=False)
    assert (
        "the subject 'France' does not stand in its prompt 'the capital of france is' (and those of 1" in caplog.text
    )
    caplog.clear()
    context = model.context
    evaluate_records(context.split, context.targets, context.method, model.encoder, wrong[:1], progress=False)
    assert "the subject 'France' does not stand in its prompt 'the capital of france is', so" in caplog.text
    caplog.clear()
    editable(build_model("llama"), tokenizer).edit(wrong, max_steps=1)
    assert "subject" not in caplog.text, "the method looks at no subject"
