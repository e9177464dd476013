"""The search for updates: what is proposed, when rows ask for more, and what is taken back."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, small_config
from support.training import perturbed

from hf_mend import EditorConfig, training_free_config
from hf_mend.data.encoding import Query
from hf_mend.editing.calibration_text import observe_calibration_text
from hf_mend.editing.proposals import SearchOptions, default_options
from hf_mend.editing.search import find_updates
from hf_mend.edits.low_rank import dense
from hf_mend.methods import new_method


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def test_an_edit_with_a_scope_may_take_further_steps_where_its_method_is_not_trained_or_goes_down_the_gradient():
    shapes = {"layer": (4, 6)}
    steps = {
        name: [default_options(new_method(EditorConfig(method=name), shapes), scoped).max_steps for scoped in (0, 1)]
        for name in ("mend", "gradient", "malmen", "rome")
    }
    assert steps == {"mend": [3, 15], "gradient": [6, 18], "malmen": [3, 3], "rome": [50, 50]}


def test_the_values_of_a_model_without_an_editor():
    without, scoped = training_free_config(), training_free_config(scope=True)
    assert (without.method, without.whiten_ridge, without.ridge, without.margin) == ("gradient", 1.0, 30.0, 2.0)
    assert (scoped.method, scoped.whiten_ridge, scoped.ridge, scoped.margin) == ("gradient", 30.0, 30.0, 3.0)
    assert scoped.scope and not without.scope


def test_steps_go_on_until_the_edit_takes_and_no_longer(llama, tokenizer):
    model = editable(llama, tokenizer)
    result = model.edit(PROMPT, TARGET, max_steps=40)
    assert result.success and 1 <= result.steps <= 40
    with model.disable_edits():
        pass
    fewer = editable(build_model("llama"), tokenizer).edit(PROMPT, TARGET, max_steps=result.steps - 1 or 1)
    assert fewer.success == (result.steps == 1)


def test_a_step_that_overshoots_is_made_smaller(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.editor.scale_steps(20.0)
    whole = model.edit(PROMPT, "rome paris lima", max_steps=1)
    norm = model.undo().norms()[model.targets[0].name]
    smaller = model.edit(PROMPT, "rome paris lima", max_steps=2)
    assert not whole.success
    assert smaller.probability_after > whole.probability_after
    first = model.edits[0].updates[model.targets[0].name]
    share = float(torch.linalg.matrix_norm(dense(tuple(side[: whole.rank] for side in first)))) / norm
    assert share == pytest.approx(round(share * 8) / 8, rel=1e-3) and share < 1


def test_steps_that_lead_away_from_the_target_are_not_taken(llama, tokenizer):
    model = editable(llama, tokenizer)
    before = all_logits(model, tokenizer)
    with torch.no_grad():
        model.editor.config.edit_lr = -0.3  # up the gradient
    result = model.edit(PROMPT, TARGET)
    assert result.success is False and result.id is None and result.steps == 0 and model.edits == []
    assert not result.already_known and "DID NOT TAKE" in str(result)
    assert result.probability_after == result.probability_before
    assert torch.equal(all_logits(model, tokenizer), before)


@pytest.mark.parametrize("edits_together", [None, 4])
def test_a_later_step_that_leads_the_edits_astray_is_taken_back(tokenizer, monkeypatch, edits_together):
    """Networks have learned the first step; on a model that several edits have bent, another may ruin all."""
    model = perturbed(tokenizer)
    rows = model.encoder([Query(r.prompt, r.target) for r in RECORDS])
    once = find_updates(model.context, [rows], SearchOptions(max_steps=1), edits_together)[0]
    assert not once.after.all_correct.all(), "nothing would be left for a second step"
    calls, forward = [], type(model.editor).forward

    def wild(self, factors):
        calls.append(1)
        wanted = forward(self, factors)
        if len(calls) == 1:
            return wanted
        return {name: (x, 300 * d.abs().mean() * torch.randn_like(d)) for name, (x, d) in wanted.items()}

    monkeypatch.setattr(type(model.editor), "forward", wild)
    found = find_updates(model.context, [rows], SearchOptions(max_steps=4), edits_together)[0]
    assert len(calls) > 1
    said, before = (sum(map(math.exp, answers.log_probability)) for answers in (found.after, once.after))
    assert said >= before * (1 - 1e-5)


def test_a_step_whose_slope_leads_up_is_not_proposed(llama, tokenizer, monkeypatch):
    """Polyak's step is the loss over the fall; up the gradient there is none, however long."""
    model = EditableModel(llama, small_config(method="gradient", whiten_ridge=1.0), tokenizer)
    observe_calibration_text(model.context, model.encoder)
    rows = model.encoder([Query(r.prompt, r.target) for r in RECORDS[:2]])
    forward = type(model.editor).forward

    def uphill(self, factors):  # the first row's alone
        sign = torch.tensor([-1.0, 1.0])[:, None, None]
        return {name: (x, d * sign) for name, (x, d) in forward(self, factors).items()}

    monkeypatch.setattr(type(model.editor), "forward", uphill)
    found = find_updates(model.context, [rows], SearchOptions(max_steps=1), group_size=1)[0]
    assert found.steps == [0, 1]
    assert not any(v[0].any() for _, v in found.updates.values())
    assert all(v[1].any() for _, v in found.updates.values())
    assert found.after.log_probability[0] == pytest.approx(found.before.log_probability[0], abs=1e-5)
    assert found.after.log_probability[1] > found.before.log_probability[1]


def test_rows_that_say_their_targets_take_no_step_unless_forced(llama, tokenizer):
    saying = editable(llama, tokenizer)
    assert saying.edit(PROMPT, TARGET, max_steps=40).success
    model = editable(saying.merge_and_unload(), tokenizer)
    rows = model.encoder([Query(PROMPT, TARGET), Query(RECORDS[1].prompt, RECORDS[1].target)])
    steps = {
        (force, check): find_updates(model.context, [rows], SearchOptions(3, force, check))[0].steps
        for force in (False, True)
        for check in (False, True)
    }
    assert [steps[False, check][0] for check in (False, True)] == [0, 0]
    assert [steps[True, check][0] for check in (False, True)] == [1, 1], "one whole step, and the target stays said"
    assert steps[False, False][1] == steps[True, False][1] == 1, "without a look there is one step"
    assert 1 <= steps[False, True][1] <= 3
