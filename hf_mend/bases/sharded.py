"""A module's tensors where processes share them out (FSDP2, DeepSpeed ZeRO-3): whole to save, and loaded in shares."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """
    A module's state dict with every tensor whole. Where processes share the module out, all of them have to call this.

    Args:
        module (`nn.Module`): The module.
    """
    with _gathered(module):
        state: dict[str, torch.Tensor] = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in module.state_dict().items()
        }
        # What DeepSpeed gathers is gone after the context.
        return {name: value.detach().clone() for name, value in state.items()} if _is_partitioned(module) else state


@torch.no_grad()
def load_whole_state(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Loads whole tensors into a module, into each process's share of it where it is shared out.

    Args:
        module (`nn.Module`): The module.
        tensors (`Mapping[str, torch.Tensor]`): Everything in its state dict, in any floating-point dtype.
    """
    shares: dict[str, torch.Tensor] = {}
    for name, value in module.state_dict().items():
        new = tensors[name].to(value.device, value.dtype)
        shares[name] = (
            distribute_tensor(new, value.device_mesh, value.placements) if isinstance(value, DTensor) else new
        )
    with _gathered(module, write=True):
        module.load_state_dict(shares)


def _is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed has shared out the parameters; it leaves empty ones in their place."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _gathered(module: nn.Module, write: bool = False) -> AbstractContextManager[Any]:
    if not _is_partitioned(module):
        return nullcontext()
    from deepspeed.zero import GatheredParameters

    # Every process writes the same values; rank 0's count.
    context: AbstractContextManager[Any] = GatheredParameters(
        list(module.parameters()), modifier_rank=0 if write else None
    )
    return context
