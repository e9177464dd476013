"""The search for updates: what is proposed, when rows ask for more, and what is taken back."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import RECORDS
from support.training import perturbed

from hf_mend.data.encoding import Query
from hf_mend.editing.proposals import SearchOptions
from hf_mend.editing.search import find_updates


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
