"""The second moments of layers' inputs on ordinary text, for methods that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..config import EditorConfig
from ..edits.low_rank import Update
from .base import EditMethod
from .ridge import SecondMoment, leading_eigenvectors, ridge_keys


class ObservesInputs(EditMethod):
    """
    A method that has seen what enters its layers on ordinary text.

    Args:
        config ([`EditorConfig`]): `whiten_rank` and `whiten_ridge`.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    reads_ordinary_text = True
    takes_texts = True
    tokens: torch.Tensor

    def __init__(self, config: EditorConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        for i, (_, d_in) in enumerate(self.shapes.values()):
            rank = min(config.whiten_rank, d_in)
            self.register_buffer(f"basis_{i}", torch.zeros(d_in, rank))
            self.register_buffer(f"shrink_{i}", torch.zeros(rank))
            self.register_buffer(f"scale_{i}", torch.ones(()))
        self.register_buffer("tokens", torch.zeros(()))
        self._moments: dict[str, torch.Tensor] = {}  # of what is being observed
        self._count = 0

    def second_moment(self, index: int) -> SecondMoment:
        """Of a layer's inputs on ordinary text, with the ridge."""
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
        for i, kept in enumerate(found):
            for part in ("basis", "shrink", "scale"):
                getattr(self, f"{part}_{i}").copy_(getattr(kept, part))
        self.tokens.fill_(self._count)

    @property
    def is_calibrated(self) -> bool:
        return bool(self.tokens > 0)


class MergesByRidge(ObservesInputs):
    """A method that asks for value residuals, which one ridge regression gives: least change on ordinary text."""

    def join(
        self, updates: Mapping[str, Update], preserved_keys: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, Update]:
        moments = {name: self.second_moment(i) for i, name in enumerate(self.shapes)}
        return {
            name: (ridge_keys(x, self.config.ridge, moments[name], preserved_keys.get(name)), d)
            for name, (x, d) in updates.items()
        }
