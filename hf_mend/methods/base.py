"""What every method offers, and the register of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..config import EditorConfig
from ..edits import Update


class EditMethod(nn.Module):
    """
    Maps the factors of a gradient to an update. Parameters and buffers are what `editor.safetensors` holds.

    Args:
        config ([`EditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    def __init__(self, config: EditorConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.config = config
        self.shapes = dict(shapes)

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        """
        The updates of a batch of edits.

        Args:
            factors (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(x, delta)` of shapes
                `(edits, seq, d_in)` and `(edits, seq, d_out)`; a position without a gradient is zero in both.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: Layer name -> `(u, v)` of the same shapes; the weight
            changes by `sum_t v_t u_t^T`.
        """
        raise NotImplementedError

    def observe_factors(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Takes the factors of some edits into the method's statistics, before training starts."""

    def observe_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Takes the target layers' inputs on ordinary text, name -> `(tokens, d_in)`, into the statistics."""

    def finish_observing(self) -> None:
        """Ends the statistics."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the statistics are set (or the method has none)."""
        return True

    def scale_steps(self, factor: float) -> None:
        """Makes every edit `factor` times as strong, from now on."""


_METHODS: dict[str, type[EditMethod]] = {}
_Method = TypeVar("_Method", bound=type[EditMethod])


def register_method(name: str) -> Callable[[_Method], _Method]:
    """Registers a method under the name that `EditorConfig.method` gives."""

    def register(cls: _Method) -> _Method:
        _METHODS[name] = cls
        return cls

    return register


def get_method(name: str) -> type[EditMethod]:
    """
    The method of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in _METHODS:
        raise ValueError(f"EditorConfig.method is {name!r}; the methods are {registered_methods()}")
    return _METHODS[name]


def registered_methods() -> Sequence[str]:
    """Names of all methods."""
    return sorted(_METHODS)
