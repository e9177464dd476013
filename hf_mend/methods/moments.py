"""Statistics of calibration text: the second moments of layers' inputs, for methods that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..config import EditorConfig, option
from ..edits.low_rank import Update
from .base import EditMethod
from .ridge import SecondMoment, leading_eigenvectors, ridge_keys


@dataclass
class SecondMomentConfig(EditorConfig):
    """The options of methods that use the second moment of their layers' inputs. Each field's help documents it."""

    whiten_ridge: float = option(
        0.1, "Ridge of the inverse second moment of a layer's inputs, as a share of the mean variance of an input."
    )
    whiten_rank: int = option(
        128, "Eigenvectors of the second moment that are kept; the others count as equal.", least=1, most=65536
    )


@dataclass
class MergesByRidgeConfig(SecondMomentConfig):
    """
    The options of methods that merge edits made together by one ridge regression a layer. Each field's help documents
    it.
    """

    ridge: float = option(1.0, "Strength of the ridge with which edits made together are merged.")
    margin: float = option(
        2.0,
        "How far an edit goes past the step that suffices for its own prompt, so that other words lead to the target "
        "too: 1 stops there.",
    )


class ObservesInputs(EditMethod):
    """
    A method that gathers the second moments of its layers' inputs on calibration text.

    Args:
        config ([`SecondMomentConfig`]): `whiten_rank` and `whiten_ridge`.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    reads_calibration_text = True
    takes_texts = True
    config_class: type[EditorConfig] = SecondMomentConfig
    config: SecondMomentConfig
    tokens: torch.Tensor

    def __init__(self, config: SecondMomentConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        for i, (_, d_in) in enumerate(self.shapes.values()):
            rank = min(config.whiten_rank, d_in)
            self.register_buffer(f"basis_{i}", torch.zeros(d_in, rank))
            self.register_buffer(f"shrink_{i}", torch.zeros(rank))
            self.register_buffer(f"scale_{i}", torch.ones(()))
        self.register_buffer("tokens", torch.zeros(()))
        self._moments: dict[str, torch.Tensor] = {}  # unfinished sums of x x^T, by layer
        self._count = 0

    def second_moment(self, index: int) -> SecondMoment:
        """Return the second moment of a layer's inputs on calibration text, with the ridge."""
        return SecondMoment(*(getattr(self, f"{part}_{index}") for part in ("basis", "shrink", "scale")))

    def forget_observed(self) -> None:
        self._moments.clear()
        self._count = 0

    def observe_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        for name, x in inputs.items():
            self._moments[name] = self._moments.get(name, 0) + (x.T @ x).double().cpu()
        self._count += len(next(iter(inputs.values())))

    @torch.no_grad()
    def finish_observing(self) -> None:
        found = []
        for i, name in enumerate(self.shapes):
            moment = self._moments.pop(name) / self._count
            found.append(leading_eigenvectors(moment, getattr(self, f"shrink_{i}").shape[0], self.config.whiten_ridge))
        for i, second_moment in enumerate(found):
            for part in ("basis", "shrink", "scale"):
                getattr(self, f"{part}_{i}").copy_(getattr(second_moment, part))
        self.tokens.fill_(self._count)

    @property
    def is_calibrated(self) -> bool:
        return bool(self.tokens > 0)


class MergesByRidge(ObservesInputs):
    """
    A method whose value residuals become updates by one ridge regression a layer: least change on calibration text.
    """

    config_class: type[EditorConfig] = MergesByRidgeConfig
    config: MergesByRidgeConfig

    def join(
        self, updates: Mapping[str, Update], preserved_keys: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, Update]:
        moments = {name: self.second_moment(i) for i, name in enumerate(self.shapes)}
        return {
            name: (ridge_keys(x, self.config.ridge, moments[name], preserved_keys.get(name)), d)
            for name, (x, d) in updates.items()
        }
