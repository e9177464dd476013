"""Placement of an editor and its base model: they move together, each in its own dtype and mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .split import SplitModel
from .targets import Target
from .weights import device_of, is_placed


if TYPE_CHECKING:
    from typing_extensions import Self


class PlacedWithBase(nn.Module):
    """The methods of [`EditableModel`] that move and cast it. The base model stays frozen, in eval mode."""

    base_model: Any
    editor: Any
    split: SplitModel
    targets: list[Target]

    def train(self, mode: bool = True) -> Self:
        """Set the editor's mode. The base model stays in eval mode: an edit's gradient must not see dropout."""
        super().train(mode)
        self.base_model.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.split.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """
        Move base model and editor, and cast the base model alone: an editor computes in float32. A base placed by a
        device map or offloading stays where it is, and the editor with it.
        """
        return self if is_placed(self.base_model) else super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move and cast, for `to`, `half`, `cuda` and their like."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            self.base_model._apply(fn)
            self.editor._apply(move)
        return self

    @property
    def edit_device(self) -> torch.device:
        """The device of the factors, where the first edited layer runs."""
        return device_of(self.targets[0].module)
