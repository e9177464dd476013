"""What an editor is given before its first training step, against statistics and steps found by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.models import RECORDS
from support.training import QUESTIONS, fresh

from hf_mend.bases.gradients import trace
from hf_mend.bases.weights import weight_matrix
from hf_mend.edits.low_rank import dense
from hf_mend.training import calibration
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditCollator, TrainingExamples


def test_the_first_step_is_half_of_the_power_of_two_that_does_best(tokenizer):
    """Over all powers from 2^-14 to 2^8, each edit's update added to the weights of a copy."""
    model = fresh(tokenizer)
    examples = TrainingExamples(RECORDS[:3], QUESTIONS)
    calibrate(model, examples, 3, 2)
    group = model.editor.groups[0]
    factor = float(group.log_step[0].exp().detach())
    assert all(torch.allclose(one.log_step, group.log_step[0]) for one in model.editor.groups)
    with torch.no_grad():
        for one in model.editor.groups:
            one.log_step.zero_()
    losses = dict.fromkeys((2.0**power for power in range(-14, 9)), 0.0)
    for i in range(3):
        rows = EditCollator(model.encoder)([examples[i]]).edit
        factors, _ = trace(model.split, model.targets, rows.inputs, rows.next_tokens)
        labels = rows.next_tokens[rows.positions]
        with torch.no_grad():
            updates = {name: dense((u[0], v[0])) for name, (u, v) in model.editor(factors).items()}
            for size in losses:
                changed = copy.deepcopy(model.base_model)
                for name, update in updates.items():
                    weight_matrix(changed.get_submodule(name)).add_(update * size)
                logits = changed(**rows.inputs).logits[rows.positions]
                losses[size] += float(torch.nn.functional.cross_entropy(logits, labels))
    assert factor == pytest.approx(min(losses, key=losses.get) / 2, rel=1e-5)


def test_statistics_are_of_examples_spread_over_all(tokenizer):
    """Three of eight facts: the first, the third and the sixth; each factor's mean and variance over its tokens."""
    model = fresh(tokenizer)
    examples = TrainingExamples(RECORDS, QUESTIONS)
    calibrate(model, examples, 3, 2)
    x: dict[str, list[torch.Tensor]] = {target.name: [] for target in model.targets}
    delta: dict[str, list[torch.Tensor]] = {target.name: [] for target in model.targets}
    for i in (0, 2, 5):
        rows = EditCollator(model.encoder)([examples[i]]).edit
        factors, _ = trace(model.split, model.targets, rows.inputs, rows.next_tokens)
        for name, pair in factors.items():
            present = pair[1].ne(0).any(-1)
            x[name].append(pair[0][present])
            delta[name].append(pair[1][present])
    for group in model.editor.groups:
        for name, x_stats, delta_stats in zip(group.names, group.x_stats, group.delta_stats, strict=True):
            for stats, values in ((x_stats, torch.cat(x[name])), (delta_stats, torch.cat(delta[name]))):
                torch.testing.assert_close(stats.mean, values.mean(0), rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(stats.variance, values.var(0, unbiased=False), rtol=1e-3, atol=1e-7)


def test_the_first_step_is_not_chosen_on_batches_of_very_many_tokens(tokenizer, monkeypatch):
    """A help desk's one answer of 700 tokens took two hours of a day's training."""
    model = fresh(tokenizer)
    tried = []
    monkeypatch.setattr(
        calibration, "_best_first_step", lambda model, edits: tried.append([len(e) for e in edits]) or 1.0
    )
    records = [replace(RECORDS[0], target=" ".join(["town"] * 40)), *RECORDS[1:4]]
    monkeypatch.setattr(calibration, "_TOKENS", 60)
    calibrate(model, TrainingExamples(records, QUESTIONS), 4, 2)
    monkeypatch.setattr(calibration, "_TOKENS", 1)
    calibrate(model, TrainingExamples(records, QUESTIONS), 4, 1)
    assert tried[0] == [2] and 0 < len(tried[1]) < 4  # without the first batch; where all are long, the shortest alone
