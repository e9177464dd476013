"""Edits made by hand."""

from __future__ import annotations

import torch

from hf_mend import Edit


def random_edit(model, id="a", rank=3, seed=0, scale=0.05) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        t.name: (
            torch.randn(rank, t.d_in, generator=generator),
            scale * torch.randn(rank, t.d_out, generator=generator),
        )
        for t in model.targets
    }
    return Edit(id, f"the prompt {id}", "the target", updates)


def bits(edits) -> list:
    """All of some edits, in values that can be compared."""
    return [(e.describe(), {n: (u.tolist(), v.tolist()) for n, (u, v) in e.updates.items()}) for e in edits]
