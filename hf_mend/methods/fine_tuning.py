"""Fine-tuning on the edit's one example, plain, with a locality penalty, and with a bound on every weight's change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config import option
from ..data.encoding import EncodedBatch
from ..edits.low_rank import Update, as_pair
from .base import register_method
from .iterative import Factors, GradientSearch, IterativeConfig, Look, Parameters


@dataclass
class FineTuningConfig(IterativeConfig):
    """The configuration of [`FineTuning`], with the options of [`IterativeConfig`]."""


@register_method("ft", FineTuningConfig)
class FineTuning(GradientSearch):
    """
    Fine-tuning of the target layers' weights on the prompt and its target, with Adam, until the model says the target:
    the baseline of Mitchell et al. 2022 ("Fast Model Editing at Scale", section 4) and of all that followed.

    Adam's step changes every weight, so that the update has full rank: an edit is as large as the edited matrices.

    Args:
        config ([`FineTuningConfig`]): `edit_lr` is Adam's learning rate; `num_steps` and `stop_loss` end the search.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    def start(self, look: Look, factors: Factors) -> Parameters:
        return {
            name: [torch.zeros(len(x), *self.shapes[name], dtype=x.dtype, device=x.device)]
            for name, (x, _) in factors.items()
        }

    def gradients(self, parameters: Parameters, factors: Factors) -> Parameters:
        return {name: [delta.transpose(1, 2) @ x] for name, (x, delta) in factors.items()}

    def updates(self, parameters: Parameters) -> dict[str, Update]:
        return {name: as_pair(change) for name, (change,) in parameters.items()}


@dataclass
class FineTuningWithPenaltyConfig(FineTuningConfig):
    """
    The configuration of [`FineTuningWithPenalty`], with the options of [`IterativeConfig`]. Each field's help
    documents it.
    """

    kl_weight: float = option(10.0, "Weight of the KL divergence on calibration text.")
    kl_texts: int = option(1, "Lines of calibration text in the loss of a step.", least=1, most=1000)


@register_method("ft-kl", FineTuningWithPenaltyConfig)
class FineTuningWithPenalty(FineTuning):
    """
    `ft` with `kl_weight` times the KL divergence from the un-edited model on calibration text in its loss (the "FT+KL"
    of Mitchell et al. 2022, section 4; Zhu et al. 2020 and De Cao et al. 2021 weigh locality in the same way). The
    text is the packaged one; each step uses its next `kl_texts` lines.

    Args:
        config ([`FineTuningWithPenaltyConfig`]): As for `ft`, and `kl_weight`, `kl_texts`.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: FineTuningWithPenaltyConfig
    reads_calibration_text = True

    def __init__(self, config: FineTuningWithPenaltyConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self._texts: list[EncodedBatch] = []
        self._observed: list[EncodedBatch] = []

    def forget_observed(self) -> None:
        self._observed = []

    def observe_texts(self, texts: EncodedBatch) -> None:
        count = self.config.kl_texts
        self._observed += [texts[start : start + count] for start in range(0, len(texts), count)]

    def finish_observing(self) -> None:
        self._texts, self._observed = self._observed, []

    @property
    def is_calibrated(self) -> bool:
        return bool(self._texts)

    def more_factors(self, look: Look, updates: Mapping[str, Update], step: int) -> Factors:
        factors = look.drift(updates, self._texts[step % len(self._texts)])
        return {name: (x, self.config.kl_weight * delta) for name, (x, delta) in factors.items()}


@dataclass
class BoundedFineTuningConfig(FineTuningConfig):
    """
    The configuration of [`BoundedFineTuning`], with the options of [`IterativeConfig`]. Its field's help documents it.
    """

    norm_bound: float = option(2e-3, "The most that a weight changes by.")


@register_method("ft-l", BoundedFineTuningConfig)
class BoundedFineTuning(FineTuning):
    """
    `ft` whose change of a weight is at most `norm_bound` anywhere, brought back there after each step (Zhu et al.
    2020, "Modifying Memories in Transformer Models", section 4: the L-infinity constraint).

    Args:
        config ([`BoundedFineTuningConfig`]): As for `ft`, and `norm_bound`.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: BoundedFineTuningConfig

    def constrain(self, parameters: Parameters) -> None:
        for (change,) in parameters.values():
            change.clamp_(-self.config.norm_bound, self.config.norm_bound)
