"""
MALMEN: MEND's networks propose value residuals, changes of a layer's output, and one ridge regression gives all edits
theirs (Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from ..config import option
from ..edits.low_rank import Update
from .base import register_method
from .mend import Mend, MendConfig
from .ridge import ridge_keys


@dataclass
class MalmenConfig(MendConfig):
    """The configuration of [`Malmen`]: all options of [`MendConfig`], and the ridge. Its field's help documents it."""

    ridge: float = option(
        1.0, "Strength of the ridge with which edits made together are merged, from which each layer learns its own."
    )


@register_method("malmen", MalmenConfig)
class Malmen(Mend):
    """
    MALMEN for a set of layers. It can load the weights of a MEND editor of the same configuration.

    With `whiten`, the ridge weighs directions by the inputs' second moment on calibration text, so that the directions
    which an edit must not change count most; without it, the ridge is the paper's, which weighs all alike.

    Args:
        config ([`MalmenConfig`]): All of MEND's choices, and `ridge`, the initial value of each layer's learned ridge.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: MalmenConfig

    def __init__(self, config: MalmenConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.log_ridge = nn.Parameter(torch.full((len(self.shapes),), math.log(config.ridge)))

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        wanted = {}
        for name, (u, v) in super().forward(factors).items():
            x = factors[name][0].to(u.device)
            wanted[name] = (x, v * (u * x).sum(-1, keepdim=True))  # what the token's own update does at its input
        return wanted

    def join(
        self, updates: Mapping[str, Update], preserved_keys: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, Update]:
        moments = {name: group.second_moment(i) for group in self.groups for i, name in enumerate(group.names)}
        ridge = dict(zip(self.shapes, self.log_ridge.exp(), strict=True))
        return {
            name: (ridge_keys(x, ridge[name], moments[name], preserved_keys.get(name)), d)
            for name, (x, d) in updates.items()
        }
