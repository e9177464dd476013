"""How long something takes is said once, when its first items show that it is more than a minute."""

from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState

from hf_mend.data.estimate import Estimate, duration
from hf_mend.training import estimate as training_estimate


def estimate(total, *steps):
    """What is said, of so many items, each step a number of items and its seconds."""
    now, said = [0.0], []
    one = Estimate("Editing", total, "edits", said.append, lambda: now[0])
    for count, seconds in steps:
        now[0] += seconds
        one.done(count)
    return said


@pytest.mark.parametrize(
    ("total", "steps", "said"),
    [
        (100, [(1, 1), (1, 1)], "Editing: 100 edits will take about 2 minutes (the first 2 took 2 s)"),
        (100, [(1, 40)], "Editing: 100 edits will take about 67 minutes (the first 1 took 40 s)"),
        (16, [(8, 32)], "Editing: 16 edits will take about 64 s (the first 8 took 32 s)"),
        (1000, [(0, 20), (2, 20)], "Editing: 1000 edits will take about 5.6 hours (the first 2 took 40 s)"),
    ],
)
def test_what_takes_long_is_said_once(total, steps, said):
    assert estimate(total, *steps, (1, 50), (1, 50)) == [said]


@pytest.mark.parametrize(
    ("total", "steps"), [(50, [(1, 1), (1, 1)]), (100, [(1, 5)]), (2, [(2, 300)]), (5, [(0, 90)])]
)
def test_of_what_is_short_or_done_nothing_is_said(total, steps):
    assert estimate(total, *steps) == []


def test_items_that_take_longer_count_for_more():
    now, said = [0.0], []
    one = Estimate("Editing", 10, "edits", said.append, lambda: now[0], work=1000)
    now[0] += 20
    one.done(9, work=100)
    assert said == ["Editing: 10 edits will take about 3 minutes (the first 9 took 20 s)"]


def test_a_duration_is_in_the_unit_that_suits_it():
    assert [duration(s) for s in (59.6, 100, 5999, 6000)] == ["60 s", "2 minutes", "100 minutes", "1.7 hours"]


def test_a_training_counts_the_steps_that_are_left(monkeypatch):
    made = []
    monkeypatch.setattr(training_estimate, "Estimate", lambda *args: made.append(args) or Estimate(*args))
    callback, state = training_estimate.EstimatesTime(), TrainerState(max_steps=30, global_step=10)
    callback.on_train_begin(None, state, TrainerControl())
    callback.on_step_end(None, state, TrainerControl())
    assert made == [("Training", 20, "steps")] and callback._estimate.count == 1
