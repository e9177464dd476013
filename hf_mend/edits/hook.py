"""How updates act: beside the layers, through forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..bases.targets import Target
from .layer_sum import LayerSum
from .low_rank import Update, side_path


@contextmanager
def applied(targets: Sequence[Target], *updates: Mapping[str, Update]) -> Iterator[None]:
    """
    Within the context, the target layers' outputs carry the updates.

    Args:
        targets (`Sequence[Target]`): The layers.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): See [`side_path`]; layers without one stay as they
            are. Of several mappings all count.
    """
    with ExitStack() as hooks:
        for target in targets:
            for one in updates:
                if target.name in one:
                    hooks.callback(_attach(target.module, one[target.name]).remove)
        yield


def _attach(module: nn.Module, update: Update) -> Any:
    u, v = update

    def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        nonlocal u, v
        if u.device != output.device:
            u, v = u.to(output.device), v.to(output.device)  # an offloaded layer runs elsewhere
        return output + side_path(args[0].to(output.device), (u, v)).to(output.dtype)

    return module.register_forward_hook(add)


@dataclass(eq=False)
class AddsToOutput:
    """
    A forward hook that adds a layer's sum to its output. No closure: a deep copy of the model takes a sum of its own
    along, and a pickle the one it was saved with.

    Args:
        layer_sum ([`LayerSum`]): What to add.
        edit_ids (`Sequence[str]`): The edits in it.
    """

    layer_sum: LayerSum
    edit_ids: Sequence[str]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + self.layer_sum(args[0], output.device).to(output.dtype)
