"""The loss of edits that act at their answers alone, against layers changed by hand at these tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import RECORDS
from support.training import QUESTIONS, arguments, fresh
from torch import nn

from hf_mend import EditorTrainer
from hf_mend.bases.limits import longest_input
from hf_mend.data.encoding import Query
from hf_mend.data.forms import DEFAULT_FORMS
from hf_mend.training.calibration import calibrate
from hf_mend.training.continuations import with_continuations
from hf_mend.training.examples import Asking, EditCollator, TrainingExamples
from hf_mend.training.losses import editing_loss


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def a_model(tokenizer, architecture: str, **options):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    model = fresh(chatting, architecture, scope=True, **options)
    examples = TrainingExamples(RECORDS, QUESTIONS, 2, 0, 0, 0, Asking(DEFAULT_FORMS, 0.3), 0, 1)
    examples.for_a_scope()
    calibrate(model, examples, 8, 4)
    with torch.no_grad():
        for parameter in model.editor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, examples


def changed(model, updates, text: list[int], acting: range) -> torch.Tensor:
    """The logits of one text, its layers' outputs changed at some tokens by hand."""
    handles = []
    for target in model.targets:
        u, v = updates[target.name]

        def add(module, args, output, u=u, v=v):
            output = output.clone()
            output[0, acting.start : acting.stop] += args[0][0, acting.start : acting.stop] @ u[0].T @ v[0]
            return output

        handles.append(target.module.register_forward_hook(add))
    logits = model.base_model(torch.tensor([text]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def said_and_stays(model, updates, query: Query) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Negative log-likelihood of a query's answer; or, where something follows, how far that is from the base's."""
    prompt, answer = model.encoder.tokens(Query(**{**query.__dict__, "after": None, "ends": True}))
    acting = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    if query.after is None:
        logits = changed(model, updates, prompt + answer[:-1], acting)
        return nn.functional.cross_entropy(logits[acting.start : acting.stop], torch.tensor(answer)), None
    after = query.after and model.encoder.tokenizer(query.after, add_special_tokens=False)["input_ids"] or []
    text = prompt + answer + after[:-1]
    new = changed(model, updates, text, acting).log_softmax(-1)
    old = model.base_model(torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)
    behind = slice(acting.stop, acting.stop + max(1, len(after)))
    return torch.zeros(()), (old.exp() * (old - new)).sum(-1)[behind].mean()


# Two layers of the third block and above, and the last MLP, which runs at the answers alone where whole texts run.
@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("layers", [[1, 2], [2, 3]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_loss_is_that_of_layers_changed_at_the_answers(tokenizer, architecture, layers, goes_on):
    model, examples = a_model(tokenizer, architecture, layers_to_transform=layers)
    draws = [examples[i] for i in range(4)]
    assert all(draw.continuation and not draw.neighborhood and not draw.unrelated for draw in draws)
    longest = longest_input(model.config)
    collate = EditCollator(model.encoder, longest, scoped=True)
    model.split.goes_on = goes_on or False
    loss = editing_loss(model.context, collate(draws), {"continuation": 2.0})
    model.split.goes_on = False
    expected = torch.zeros(())
    for draw in draws:
        factors, _ = model.context.trace(collate([draw]).edit)
        updates = model.editor(factors)
        general, following = (
            [model.encoder.shortened(query, longest) for query in queries]
            for queries in (draw.general, draw.continuation)
        )
        said = [said_and_stays(model, updates, query)[0] for query in general]
        (stays,) = (said_and_stays(model, updates, query)[1] for query in following)
        expected = expected + (torch.stack(said).mean() + 2.0 * stays) / len(draws)
    assert float(loss.locality["continuation"].detach()) > 1e-4, "what follows is another thing under an edit"
    torch.testing.assert_close(loss.loss, expected, rtol=1e-3, atol=1e-5)
    parameters = [p for p in model.editor.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss.loss, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize(("architecture", "tokens"), [("llama", None), ("llama", 3), ("t5", None)])
def test_a_training_with_a_scope_keeps_what_follows_a_target_in_plain_text(tokenizer, tmp_path, architecture, tokens):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHAT
    model = fresh(chatting, architecture, scope=True)
    trainer = EditorTrainer(
        model,
        arguments(tmp_path, max_steps=2, scope_steps=0, continuation_tokens=tokens),
        RECORDS,
        questions=QUESTIONS,
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss_edit" in entry)
    assert ("loss_continuation" in logged) == (architecture == "llama")
    assert not {"loss_neighborhood", "loss_unrelated", "loss_same_subject"} & set(logged)
    assert bool(trainer.examples.continuations) == (tokens == 3)
    draws = [trainer.examples[i] for i in range(len(RECORDS))]
    assert any(query.chat for draw in draws for query in draw.general)
    for draw in draws:
        assert len(draw.continuation) == (architecture == "llama")
        for query in draw.continuation:
            assert query.ends and not query.chat and not query.turns and query.after is not None


def test_a_kept_continuation_is_that_of_its_own_text(tokenizer, tmp_path):
    """Behind a target, and behind the token that ends it: a file that has the first is not read for the second."""
    model, _ = a_model(tokenizer, "llama")
    kept = tmp_path / "continuations.jsonl"
    lines = []
    for scoped in (False, True):
        examples = TrainingExamples(RECORDS, QUESTIONS, 1, 0, 0, 0, Asking({"prompt": 1.0}), 0, 1)
        if scoped:
            examples.for_a_scope()
        with_continuations(examples, model, tokens=2, file=kept, progress=False)
        assert {query.ends for query in examples.continuations} == {scoped}
        lines.append(len(kept.read_text().splitlines()))
    assert lines[1] == 2 * lines[0] > 0
