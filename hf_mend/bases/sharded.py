"""A module's tensors where processes share them out (FSDP2, DeepSpeed ZeRO-3): whole to save, and loaded in shares."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict


# `Accelerator.get_state_dict` would gather the frozen base too, and with ZeRO-3 give 16-bit copies of what trains.
_WHOLE = StateDictOptions(full_state_dict=True)


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """
    A module's state dict with every tensor whole. Where processes share the module out, all of them have to call this.

    Args:
        module (`nn.Module`): The module.
    """
    with _gathered(module):
        state: dict[str, Any] = get_model_state_dict(module, options=_WHOLE)
        # What DeepSpeed gathers is gone after the context.
        return {name: value.detach().clone() for name, value in state.items()} if _is_partitioned(module) else state


def load_whole_state(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Load whole tensors into a module, into each process's share of it where it is shared out.

    Args:
        module (`nn.Module`): The module.
        tensors (`Mapping[str, torch.Tensor]`): Everything in its state dict, in any floating-point dtype.
    """
    with _gathered(module, write=True):
        set_model_state_dict(module, dict(tensors), options=_WHOLE)


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
