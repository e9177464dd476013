"""The factors that passes compute with."""

from __future__ import annotations

import torch

from hf_mend.edits import decoded as module
from hf_mend.edits.decoded import decoded


CPU = torch.device("cpu")


def some(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": (torch.randn(2, 8, generator=generator).bfloat16(), torch.randn(2, 4, generator=generator).bfloat16())
    }


def test_factors_are_those_of_the_edit_and_stay_at_hand():
    one, other = some(0), some(1)
    for updates in (one, other, one):
        for side, own in zip(decoded(updates, "a", CPU), updates["a"], strict=True):
            assert side.dtype == torch.float32 and torch.equal(side, own.float())
    assert decoded(one, "a", CPU)[0] is decoded(one, "a", CPU)[0]


def test_those_that_were_not_used_for_long_are_let_go(monkeypatch):
    monkeypatch.setattr(module, "_recent", module._Recent())
    monkeypatch.setattr(module, "_AT_HAND", 250)  # two of 96 bytes
    edits = [some(seed) for seed in range(3)]
    first = decoded(edits[0], "a", CPU)
    decoded(edits[1], "a", CPU)
    assert decoded(edits[0], "a", CPU) is first
    decoded(edits[2], "a", CPU)
    assert decoded(edits[0], "a", CPU) is first and module._recent.nbytes == 192
    again = decoded(edits[1], "a", CPU)
    assert torch.equal(again[0], edits[1]["a"][0].float()) and module._recent.nbytes == 192
