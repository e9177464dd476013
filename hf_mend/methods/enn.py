"""Editable Neural Networks: the base itself is trained so that a few gradient steps edit it (Sinitsin et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..edits.low_rank import Update, as_pair
from .base import register_method
from .steps import LearnedSteps, LearnedStepsConfig


@dataclass
class EditableNetworkConfig(LearnedStepsConfig):
    """The configuration of [`EditableNetwork`], with the options of [`LearnedStepsConfig`]; it takes no scope."""

    takes_scope: ClassVar[bool] = False


@register_method("enn", EditableNetworkConfig)
class EditableNetwork(LearnedSteps):
    """
    Editable Neural Networks (Sinitsin et al. 2020, "Editable Neural Networks"; as a baseline, Mitchell et al. 2022,
    "Fast Model Editing at Scale"): an edit is a plain gradient step with a learned size a layer, and what is trained
    is the base, the edited layers' weights, so that such a step edits it.

    The base's own weights are never written to: each layer has a change of its weight, zero at first. It acts while
    the model carries an edit, once however many there are, and without one the model is the base to the bit. Gradients
    are taken under it, and locality is measured against the untouched base.

    Differences from the paper: the gradient of the outer loss does not flow back through the inner gradient (the
    first-order approximation of Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks"): the change learns from acting beside the step. Training takes one step an edit, and factors are divided
    by their root mean square.

    Args:
        config ([`EditableNetworkConfig`]): `normalize` and `edit_lr`, the initial value of the learned steps. The
            changes are weights of the base: they learn with a far smaller learning rate than an editor network.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: EditableNetworkConfig
    changes: Any

    def __init__(self, config: EditableNetworkConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.changes = nn.ParameterList(torch.zeros(shape) for shape in self.shapes.values())

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        steps = dict(zip(self.shapes, self.steps, strict=True))
        return {name: (x, -steps[name] * delta) for name, (x, delta) in self.unit_factors(factors).items()}

    def base_delta(self) -> dict[str, Update]:
        return {name: as_pair(change) for name, change in zip(self.shapes, self.changes, strict=True)}
