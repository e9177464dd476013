"""How updates act: beside the layers, through one kind of forward hook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..bases.targets import Target
from .low_rank import Update, side_path


class Addend(Protocol):
    """What is added to a layer's output."""

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): The layer's input.
            device (`torch.device`): Where the layer runs.

        Returns:
            `torch.Tensor` of shape `(..., d_out)`, in the updates' dtype.
        """
        ...


@dataclass(eq=False)
class SidePath:
    """
    What an update adds, one for all rows or one for each run of them: see [`~hf_mend.edits.low_rank.side_path`].

    Args:
        update (`tuple[torch.Tensor, torch.Tensor]`): `(u, v)`.
    """

    update: Update

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        u, v = self.update
        if u.device != device:
            self.update = u.to(device), v.to(device)  # an offloaded layer runs elsewhere
        return side_path(x.to(device), self.update)


@dataclass(eq=False)
class AddsToOutput:
    """
    A forward hook that adds to a layer's output. No closure: a deep copy of the model takes an addend of its own
    along, and a pickle the one it was saved with.

    Args:
        addend ([`Addend`]): What to add: the [`~hf_mend.edits.layer_sum.LayerSum`] of the edits that the model
            carries, or the [`SidePath`] of an update that acts within a context.
        edit_ids (`Sequence[str]`): The edits in it.
    """

    addend: Addend
    edit_ids: Sequence[str] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + self.addend(args[0], output.device).to(output.dtype)


@contextmanager
def applied(targets: Sequence[Target], *updates: Mapping[str, Update]) -> Iterator[None]:
    """
    Within the context, the target layers' outputs carry the updates.

    Args:
        targets (`Sequence[Target]`): The layers.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): See [`~hf_mend.edits.low_rank.side_path`]; layers
            without one stay as they are. Of several mappings all count.
    """
    with ExitStack() as hooks:
        for target in targets:
            for one in updates:
                if target.name in one:
                    hook = AddsToOutput(SidePath(one[target.name]))
                    hooks.callback(target.module.register_forward_hook(hook).remove)
        yield
