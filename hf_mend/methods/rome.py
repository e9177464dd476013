"""ROME: one MLP matrix as a memory, in which one key gets a new value (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..edits.low_rank import Update
from .base import register_method
from .iterative import Factors, GradientSearch, IterativeConfig, Look, Parameters
from .moments import ObservesInputs, SecondMomentConfig


@dataclass
class RomeConfig(SecondMomentConfig, IterativeConfig):
    """
    The configuration of [`Rome`], with the options of [`IterativeConfig`], whose `edit_lr` (0.1) is that of the search
    for the value, and of [`SecondMomentConfig`] (0.01 and 512). Of several target layers the first is edited.
    """

    edit_lr: float = 0.1
    whiten_ridge: float = 0.01
    whiten_rank: int = 512

    # A block whose output holds the subject's attributes, which blocks above read.
    default_span: ClassVar[tuple[float, float]] = (0.333, 0.367)


@register_method("rome", RomeConfig)
class Rome(ObservesInputs, GradientSearch):
    """
    Rank-one model editing (Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3): the key
    is the layer's input at the subject's last token, the new value is found by gradient steps on the target's loss,
    and the update is the one that gives it there and changes the layer's outputs on calibration text least,
    `dW = d (C^-1 k)^T / (k^T C^-1 k)`, with `C` the second moment of the layer's inputs.

    Where a request names no subject, or one that its prompt does not contain, which a warning says, the key is the
    input at the prompt's last token; in the decoder of an encoder-decoder model, at its first position.

    Differences from the paper: the search for the value uses the prompt alone, under the rank-one update itself,
    without sampled prefixes and without the penalty on the subject's essence; `C` comes from the packaged page of
    calibration text, not from a hundred thousand articles, and is stored as its leading eigenvectors.

    Args:
        config ([`RomeConfig`]): `edit_lr` is Adam's learning rate on the value; `num_steps` and `stop_loss` end the
            search; `whiten_rank` and `whiten_ridge` are those of `C`. Of several target layers the first is edited:
            name another with `layers_to_transform`.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: RomeConfig

    edits_at_subject = True

    def __init__(self, config: RomeConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.layer = next(iter(self.shapes))
        self._keys: torch.Tensor | None = None

    def start(self, look: Look, factors: Factors) -> Parameters:
        x, delta = factors[self.layer]  # (requests, seq, d_in), (requests, seq, d_out)
        place = look.places(self.layer).to(x.device)
        key = x[torch.arange(len(x), device=x.device), place]  # (requests, d_in)
        if not key.any(-1).all():
            raise ValueError(
                f"the subject's last token has no influence on the answer through the layer {self.layer!r}, so 'rome' "
                "cannot edit there; name a lower block with EditorConfig.layers_to_transform"
            )
        keys = self.second_moment(0).direction(key)
        return {self.layer: [keys.unsqueeze(1), torch.zeros_like(delta[:, :1])]}

    def gradients(self, parameters: Parameters, factors: Factors) -> Parameters:
        x, delta = factors[self.layer]
        keys, _ = parameters[self.layer]  # (requests, 1, d_in)
        weights = x @ keys.transpose(1, 2)  # (requests, seq, 1): what each token gets of the residual
        return {self.layer: [torch.zeros_like(keys), weights.transpose(1, 2) @ delta]}

    def updates(self, parameters: Parameters) -> dict[str, Update]:
        keys, residual = parameters[self.layer]
        return {self.layer: (keys, residual)}
