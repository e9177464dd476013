"""Edits with a scope go on down the gradient itself where their editor's step leads no nearer to a target."""

from __future__ import annotations

import pytest
import torch
from support.gradients import autograd_gradients
from support.models import RECORDS, all_logits, editable
from support.scope import scoped

from hf_mend.data.encoding import Query
from hf_mend.edits.low_rank import dense
from hf_mend.editing import acceptance
from hf_mend.editing.proposals import SearchOptions
from hf_mend.editing.search import find_updates


PROMPT, LONG = RECORDS[0].prompt, "lima oslo nairobi"


@pytest.fixture
def astray(monkeypatch):
    """Make a model's editor lead away from every target."""

    def turn(model):
        forward = type(model.editor).forward
        monkeypatch.setattr(
            type(model.editor),
            "forward",
            lambda self, factors: {name: (u, -v) for name, (u, v) in forward(self, factors).items()},
        )
        return model

    return turn


def test_a_target_that_the_editor_cannot_reach_takes_and_an_undo_is_exact(llama, tokenizer, astray):
    model = astray(scoped(llama, tokenizer))
    plain = all_logits(model, tokenizer)
    result = model.edit(PROMPT, LONG)
    assert result.success and 3 < result.steps <= 15 and result.scope is not None
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)


def test_a_step_is_the_gradient_of_each_weight_in_the_rows_that_want_it(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer)
    rows = model.encoder([Query(r.prompt, r.target) for r in RECORDS[:2]])
    forward, first = type(model.editor).forward, torch.tensor([-1.0, 1.0])[:, None, None]
    monkeypatch.setattr(
        type(model.editor),
        "forward",
        lambda self, factors: {name: (u, v * first) for name, (u, v) in forward(self, factors).items()},
    )
    found = find_updates(model.context, [rows], SearchOptions(2, gradient=True))[0]
    assert found.steps[0] == 1 and found.after.log_probability[0] > found.before.log_probability[0]
    gradients = autograd_gradients(llama, model.targets, rows[:1])
    ratios = []
    for name, (u, v) in found.updates.items():
        update, gradient = dense((u[0], v[0])).flatten(), gradients[name].flatten()
        assert torch.cosine_similarity(update, gradient, dim=0) == pytest.approx(-1, abs=1e-4)
        ratios.append(float(update.norm() / gradient.norm()))
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)
    own = find_updates(model.context, [rows], SearchOptions(2))[0]
    assert own.steps == [0, found.steps[1]]
    assert own.after.log_probability[1] == pytest.approx(found.after.log_probability[1], abs=1e-4)


def test_without_a_scope_and_for_very_long_targets_it_is_the_editor_alone(llama, tokenizer, astray, monkeypatch):
    result = astray(editable(llama, tokenizer)).edit(PROMPT, LONG)
    assert not result.success and result.steps == 0
    model = scoped(llama, tokenizer)
    monkeypatch.setattr(acceptance, "_LONGEST", 4)
    assert not model.edit(PROMPT, LONG).success
    monkeypatch.setattr(acceptance, "_LONGEST", 256)
    assert model.edit(PROMPT, LONG).success


def test_a_given_number_of_steps_is_kept_to(llama, tokenizer, astray):
    assert astray(scoped(llama, tokenizer)).edit(PROMPT, LONG, max_steps=2).steps <= 2
