"""The one forward hook by which updates act beside the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..bases.targets import Target
from .low_rank import Update, side_path


# The term that is added to a layer's output, `(..., d_out)` in the updates' dtype, from the layer's input,
# `(..., d_in)`, and the device where the layer runs.
Addend = Callable[[torch.Tensor, torch.device], torch.Tensor]


@dataclass(eq=False)
class SidePath:
    """
    The output of an update, one for all rows or one for each run of them: see [`~hf_mend.edits.low_rank.side_path`].

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
    A forward hook that adds to a layer's output. It is no closure: a deep copy of the model has an addend of its own,
    and a pickle the one it was saved with.

    Args:
        addend ([`Addend`]): The term to add: the [`~hf_mend.edits.layer_sum.LayerSum`] of the edits that the model
            carries, or the [`SidePath`] of an update that acts within a context.
        edit_ids (`Sequence[str]`): Ids of the edits in it.
    """

    addend: Addend
    edit_ids: Sequence[str] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + self.addend(args[0], output.device).to(output.dtype)


@contextmanager
def applied(targets: Sequence[Target], *updates: Mapping[str, Update]) -> Iterator[None]:
    """
    Add the updates to the target layers' outputs within the context.

    Args:
        targets (`Sequence[Target]`): The layers.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)`, as
            [`~hf_mend.edits.low_rank.side_path`] takes them; other layers stay as they are. Several mappings add up.
    """
    with ExitStack() as hooks:
        for target in targets:
            for one in updates:
                if target.name in one:
                    hook = AddsToOutput(SidePath(one[target.name]))
                    hooks.callback(target.module.register_forward_hook(hook).remove)
        yield
