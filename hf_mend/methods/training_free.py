"""Methods that need no training: they use statistics of calibration text, or of the edits themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..config import EditorConfig, option
from ..edits.low_rank import Update
from .base import register_method
from .moments import MergesByRidge, MergesByRidgeConfig
from .ridge import ridge_keys
from .steps import ObservesFactors


def training_free_config(scope: bool = False) -> EditorConfig:
    """
    Return the configuration that edits best a model without a trained editor; benchmarks/results/settings.md has the
    figures.

    Args:
        scope (`bool`, defaults to `False`): For edits with a scope, which
            [`~hf_mend.training.scope_training.train_scope`] trains: nothing else is in their way, and they go further.
    """
    return EditorConfig(
        method="gradient", whiten_ridge=30.0 if scope else 1.0, ridge=30.0, margin=3.0 if scope else 2.0, scope=scope
    )


@dataclass
class UltraEditConfig(EditorConfig):
    """The configuration of [`UltraEdit`]. Each field's help documents it."""

    edit_lr: float = option(1e-4, "Step of an edit, the paper's eta.")
    ridge: float = option(1.0, "Strength of the ridge with which edits made together are merged (paper: 1).")


@register_method("ultraedit", UltraEditConfig)
class UltraEdit(ObservesFactors):
    """
    UltraEdit as published (Gu et al. 2025, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing"):
    factors are normalised by statistics over all edits so far, and each token wants the value residual `-eta *
    |x_hat|^2 * delta_hat`.

    Args:
        config ([`UltraEditConfig`]): `edit_lr` is eta, `ridge` the ridge's strength (the paper's is 1).
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: UltraEditConfig
    trains = False

    def __init__(self, config: UltraEditConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.factor = 1.0

    def observe_edits(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.take_in(factors)

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        wanted = {}
        for i, name in enumerate(self.shapes):
            x, delta = (side.to(self.x_stats[i].mean.device) for side in factors[name])
            present = (delta != 0).any(-1, keepdim=True)
            size = self.x_stats[i](x).square().sum(-1, keepdim=True)
            step = self.config.edit_lr * self.factor
            wanted[name] = (x, -step * size * self.delta_stats[i](delta) * present)
        return wanted

    def join(
        self, updates: Mapping[str, Update], preserved_keys: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, Update]:
        return {name: (ridge_keys(x, self.config.ridge), d) for name, (x, d) in updates.items()}

    def scale_steps(self, factor: float) -> None:
        self.factor *= factor


@dataclass
class WhitenedGradientConfig(MergesByRidgeConfig):
    """
    The configuration of [`WhitenedGradient`], with the options of [`MergesByRidgeConfig`]. `whiten_ridge` is best near
    1 here; [`training_free_config`] has the values of a model without an editor.
    """


@register_method("gradient", WhitenedGradientConfig)
class WhitenedGradient(MergesByRidge):
    """
    A few steps down the gradient of the target's loss, in the metric of the layer's inputs on calibration text, so
    that an edit acts on what sets its input apart: `dW = -step * sum_t delta_t (M^-1 x_t)^T`. The default of a model
    that has no trained editor.

    `forward` returns value residuals at the edit's own inputs, `d = -(X M^-1 X^T) delta`, which `join` gives exactly
    where the ridge is small, and best for all edits together where there are several. The loss sets the size of a
    step.

    Args:
        config ([`WhitenedGradientConfig`]): `whiten_rank`, `whiten_ridge` (here best near 1) and `ridge`.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: WhitenedGradientConfig
    max_steps = 6
    trains = False
    sizes_steps = True
    in_further_forms = True

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        wanted = {}
        for i, name in enumerate(self.shapes):
            moment = self.second_moment(i)
            x, delta = (side.to(moment.scale.device) for side in factors[name])
            wanted[name] = (x, -(moment.solve(x) @ x.transpose(-1, -2)) @ delta)
        return wanted
