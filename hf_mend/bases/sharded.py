"""
State dicts of modules that processes shard (FSDP2, DeepSpeed ZeRO-3): gathered to save, and loaded into the shards.
"""

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
    Return a module's state dict with every tensor whole. Where processes shard the module, all of them have to call
    this.

    Args:
        module (`nn.Module`): The module.
    """
    if not module.state_dict():  # torch would ask for a process group
        return {}
    with _gathered(module):
        state: dict[str, Any] = get_model_state_dict(module, options=_WHOLE)
        # DeepSpeed frees the gathered tensors after the context.
        return {name: value.detach().clone() for name, value in state.items()} if _is_partitioned(module) else state


def load_whole_state(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Load whole tensors into a module, into each process's shard of it where it is sharded.

    Args:
        module (`nn.Module`): The module.
        tensors (`Mapping[str, torch.Tensor]`): All tensors of its state dict, in any floating-point dtype.
    """
    if not module.state_dict():
        return
    with _gathered(module, write=True):
        set_model_state_dict(module, dict(tensors), options=_WHOLE)


def _is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed has partitioned the parameters; it leaves empty ones in their place."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _gathered(module: nn.Module, write: bool = False) -> AbstractContextManager[Any]:
    if not _is_partitioned(module):
        return nullcontext()
    import deepspeed

    # Every process writes the same values, and DeepSpeed broadcasts those of rank 0.
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        list(module.parameters()), modifier_rank=0 if write else None
    )
    return context
