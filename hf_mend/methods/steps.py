"""Statistics of the factors, and a learned step a layer, for methods that keep the gradient's own direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import EditorConfig, option
from .base import EditMethod
from .mend import FactorStatistics


class ObservesFactors(EditMethod):
    """
    A method that gathers mean and variance of the factors of the edits it has seen, a layer at a time.

    Args:
        config ([`EditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    # torch's type of a module's attribute is "tensor or module".
    x_stats: Any
    delta_stats: Any

    def __init__(self, config: EditorConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.x_stats = nn.ModuleList(FactorStatistics(d_in) for _, d_in in self.shapes.values())
        self.delta_stats = nn.ModuleList(FactorStatistics(d_out) for d_out, _ in self.shapes.values())

    def take_in(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add edits' factors, at the positions that have a gradient, to the statistics."""
        for i, name in enumerate(self.shapes):
            x, delta = factors[name]
            present = (delta != 0).any(-1)
            self.x_stats[i].observe(x[present].to(self.x_stats[i].mean.device))
            self.delta_stats[i].observe(delta[present].to(self.delta_stats[i].mean.device))


@dataclass
class LearnedStepsConfig(EditorConfig):
    """The options of methods whose layers each learn a step. Each field's help documents it."""

    normalize: bool = option(True, "Divide factors by their root mean square over some edits.")
    edit_lr: float = option(1e-3, "Initial step of an edit, of which each layer learns its own.")


class LearnedSteps(ObservesFactors):
    """
    A method that divides factors by their root mean square over some edits, one number a side and layer, so that
    layers start alike, and whose layers each learn a step.

    Args:
        config ([`LearnedStepsConfig`]): `normalize` and `edit_lr`, the initial value of the learned steps.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config_class = LearnedStepsConfig
    config: LearnedStepsConfig

    def __init__(self, config: LearnedStepsConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.log_step = nn.Parameter(torch.zeros(len(self.shapes)))

    @property
    def steps(self) -> torch.Tensor:
        """Each layer's step, `(layers,)`."""
        return self.config.edit_lr * self.log_step.exp()

    def unit_factors(
        self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the factors on the editor's device, with `normalize` each divided by its root mean square."""
        device = self.log_step.device  # the layers may be on several
        found = {}
        for i, name in enumerate(self.shapes):
            x, delta = (side.to(device) for side in factors[name])
            if self.config.normalize:
                x, delta = x / self.x_stats[i].size, delta / self.delta_stats[i].size
            found[name] = (x, delta)
        return found

    def observe_factors(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.take_in(factors)

    @property
    def is_calibrated(self) -> bool:
        return all(bool(stats.count > 0) for stats in self.x_stats)

    @torch.no_grad()
    def scale_steps(self, factor: float) -> None:
        self.log_step.add_(math.log(factor))
