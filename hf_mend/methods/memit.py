"""MEMIT: MLP matrices of some blocks as one memory, in which many keys get new values at once (Meng et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..edits.low_rank import Update
from .base import register_method
from .iterative import Factors, GradientSearch, IterativeConfig, Look, Parameters
from .moments import MergesByRidge, MergesByRidgeConfig


@dataclass
class MemitConfig(MergesByRidgeConfig, IterativeConfig):
    """
    The configuration of [`Memit`], with the options of [`IterativeConfig`], whose `edit_lr` (0.05) is that of the
    search for the value residuals, and of [`MergesByRidgeConfig`]: `whiten_ridge` (0.01), `whiten_rank` (512), `ridge`
    (30) and `margin` (1.25).
    """

    edit_lr: float = 0.05
    whiten_ridge: float = 0.01
    whiten_rank: int = 512
    ridge: float = 30.0
    margin: float = 1.25

    # Blocks whose outputs hold the subject's attributes, which blocks above read.
    default_span: ClassVar[tuple[float, float]] = (0.267, 0.467)


@register_method("memit", MemitConfig)
class Memit(MergesByRidge, GradientSearch):
    """
    Mass-editing memory (Meng et al. 2023, "Mass-Editing Memory in a Transformer", section 4): at the subject's last
    token, each target layer gets a value residual, a change of its output, found by gradient steps on the target's
    loss; one ridge regression a layer then gives all edits of a call their residuals and changes the layer's outputs
    on calibration text least.

    Where a request names no subject, or one that its prompt does not contain, which a warning says, the residual is
    wanted at the prompt's last token; in the decoder of an encoder-decoder model, at its first position.

    Differences from the paper: the search finds the residuals of all layers side by side, each under the rank-one
    update that gives it, where the paper finds one at the top and spreads it evenly; it has no sampled prefixes and no
    penalty on the subject's essence; the second moment comes from the packaged page of calibration text. Edits of a
    call that do not succeed beside the others get further steps.

    Args:
        config ([`MemitConfig`]): `edit_lr` is Adam's learning rate on the residuals; `num_steps` and `stop_loss` end
            the search; the residuals found are multiplied by `margin`; `ridge`, `whiten_rank` and `whiten_ridge` are
            those of the regression.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: MemitConfig

    edits_at_subject = True

    def start(self, look: Look, factors: Factors) -> Parameters:
        parameters = {}
        for name, (x, delta) in factors.items():
            place = look.places(name).to(x.device)
            chosen = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)  # (requests, seq)
            chosen[torch.arange(len(x), device=x.device), place] = 1
            parameters[name] = [_at(chosen, x), torch.zeros_like(delta[:, 0]), chosen]
        keys = torch.stack([values[0].any(-1).cpu() for values in parameters.values()])  # (layers, requests)
        if not keys.any(0).all():
            raise ValueError(
                "the subject's last token has no influence on the answer through any of the layers "
                f"{list(parameters)}, so 'memit' cannot edit there; name lower blocks with "
                "EditorConfig.layers_to_transform"
            )
        return parameters

    def gradients(self, parameters: Parameters, factors: Factors) -> Parameters:
        found = {}
        for name, (x, delta) in factors.items():
            key, _, chosen = parameters[name]
            weights = x @ self._direction(name, key).unsqueeze(-1)  # (requests, seq, 1): what each token gets
            of_residual = (weights.transpose(1, 2) @ delta)[:, 0]  # (requests, d_out)
            found[name] = [torch.zeros_like(key), of_residual, torch.zeros_like(chosen)]
        return found

    def follow(self, parameters: Parameters, factors: Factors) -> None:
        for name, (x, _) in factors.items():
            key, _, chosen = parameters[name]
            key.copy_(_at(chosen, x))

    def updates(self, parameters: Parameters) -> dict[str, Update]:
        return {
            name: (self._direction(name, key).unsqueeze(1), residual.unsqueeze(1))
            for name, (key, residual, _) in parameters.items()
        }

    def found(self, parameters: Parameters) -> dict[str, Update]:
        margin = self.config.margin
        return {
            name: (key.unsqueeze(1), margin * residual.unsqueeze(1)) for name, (key, residual, _) in parameters.items()
        }

    def key_inputs(
        self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], places: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {
            name: x[torch.arange(len(x), device=x.device), places(name).to(x.device)].unsqueeze(1)
            for name, (x, _) in factors.items()
        }

    def _direction(self, name: str, key: torch.Tensor) -> torch.Tensor:
        return self.second_moment(list(self.shapes).index(name)).direction(key)


def _at(chosen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """
    Return each request's input at its place: `(requests, seq)` and `(requests, seq, d_in)` -> `(requests, d_in)`.
    """
    return (chosen.unsqueeze(1) @ x)[:, 0]
