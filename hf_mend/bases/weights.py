"""Linear layers and their weights: widths, devices, and writing an update into a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import experts_widths, is_experts


# Their kernels read the weight of these layers without running them, so PEFT refuses adapters of them.
_MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_MAMBA_NAMES = frozenset({"conv1d", "out_proj"})
_WIDTHS = (("in_features", "out_features"), ("infeatures", "outfeatures"))
_EXPERT_NAMES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def is_editable(module: nn.Module) -> bool:
    """Whether `module` can carry an edit beside it: it computes `y = W x (+ b)`, or it is a block's experts."""
    return layer_widths(module) is not None


def layer_widths(module: nn.Module) -> tuple[int, int] | None:
    """
    Return `(d_in, d_out)` of a linear layer or of a block's experts, `None` for anything else.

    A quantiser's layer counts, whether it is an `nn.Linear` (bitsandbytes, torchao) or a module of its own that states
    its widths (GPTQ, AWQ, HQQ): an edit needs its input and the gradient of its output alone.
    """
    module = inner_layer(module)
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_experts(module):
        return experts_widths(module)
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        return None  # a layer of another kind that computes with a plain weight
    for first, second in _WIDTHS:
        d_in, d_out = getattr(module, first, None), getattr(module, second, None)
        if isinstance(d_in, int) and isinstance(d_out, int) and not [*module.children()]:
            return d_in, d_out
    return None


def inner_layer(module: Any) -> Any:
    """Return the layer inside PEFT's, or the layer itself where there is no adapter."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def writable_weight(module: Any) -> torch.Tensor:
    """
    Return a layer's weight as `(d_out, d_in)`, a view of the stored one that may be written to.

    Raises:
        TypeError: The weight is offloaded, quantised or sharded, or the module is a block's experts.
    """
    kind = type(module).__name__
    if is_experts(inner_layer(module)):
        raise TypeError(
            f"edits beside a block's experts (a {kind}) are no change of any weight, so they cannot be merged; keep "
            "them with save_edits, or make edits that can be merged with target_modules=['o_proj'], attention's "
            "output projection"
        )
    weight: Any = getattr(inner_layer(module), "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(
            f"a {kind} has no plain weight, so an edit cannot be merged into it; keep the edits beside the weight, "
            "write them with save_lora, or load the base model unquantised and load_edits there"
        )
    if weight.is_meta:
        raise TypeError(
            f"the weight of a {kind} is offloaded, so an edit cannot be merged into it; keep the edits beside the "
            "weight, or load the base model in memory first"
        )
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and weight.dim() == 2
    if not plain:
        raise TypeError(
            f"the weight of a {kind} is a {type(weight).__name__} of {weight.dtype}, not a plain matrix, so an edit "
            "cannot be merged into it; keep the edits beside the weight, write them with save_lora, or load the base "
            "model unquantised and load_edits there"
        )
    return weight_matrix(module)


def identifying_weight(module: Any) -> torch.Tensor:
    """
    Return the weight by which a layer is told from another: its own as [`writable_weight`] returns it, or of a block's
    experts the one that is nearest to their output.

    Raises:
        TypeError: The weight is offloaded, quantised or sharded.
    """
    inner = inner_layer(module)
    if not is_experts(inner):
        return writable_weight(module)
    weight: torch.Tensor = inner.down_proj
    if weight.is_meta or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        raise TypeError(
            f"the experts' weight is a {type(weight).__name__} of {weight.dtype}, not a plain one in memory"
        )
    return weight


def plain_parameter(model: nn.Module, layer: str, kind: str) -> torch.Tensor | None:
    """
    Return a layer's parameter, or `None` where the model has no such layer or the parameter is no plain tensor in
    memory.

    Args:
        model (`nn.Module`): The base model.
        layer (`str`): The layer's name.
        kind (`str`): `"weight"` or `"bias"`.
    """
    module = dict(model.named_modules()).get(layer)
    found = None if module is None else inner_layer(module)._parameters.get(kind)
    plain = found is not None and type(found) in (torch.Tensor, nn.Parameter) and not found.is_meta
    return found if plain else None


def equal_in_dtype(saved: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a saved tensor is a weight, in the weight's dtype."""
    return saved.shape == weight.shape and torch.equal(saved.to(weight.dtype), weight.detach().cpu())


def check_own_weight(model: nn.Module, layer: nn.Module) -> None:
    """
    Raises:
        TypeError: The layer's weight is another module's too, as where embedding and output layer are tied.
    """
    layer = inner_layer(layer)
    for name, module in model.named_modules():
        if module is not layer and any(parameter is layer.weight for parameter in module._parameters.values()):
            raise TypeError(
                f"the weight of a {type(layer).__name__} is that of {name!r} too (they are tied), so an edit merged "
                "into the one would change the other; keep the edits beside the weight, with save_edits or save_lora"
            )


@torch.no_grad()
def add_to_weight_(module: nn.Module, update: torch.Tensor) -> None:
    """
    Add an update of shape `(d_out, d_in)` to a layer's weight in place, in the weight's own layout.

    Args:
        module (`nn.Module`): The layer.
        update (`torch.Tensor` of shape `(d_out, d_in)`): The update.

    Raises:
        TypeError: The weight cannot be written to.
    """
    weight = writable_weight(module)
    weight.copy_(with_update(weight, update))


def with_update(weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """
    Return the sum of a weight and an update, computed in float32 at least, in the weight's dtype and on its device.

    Args:
        weight (`torch.Tensor` of shape `(d_out, d_in)`): The weight.
        update (`torch.Tensor` of shape `(d_out, d_in)`): The update.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, update.dtype), torch.float32)
    return (weight.detach().to(dtype) + update.to(weight.device, dtype)).to(weight.dtype)


def check_finite_weight(name: str, weight: torch.Tensor) -> None:
    """
    Raises:
        ValueError: A weight that is to be written holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"the weight of {name!r} with its edits holds NaN or infinity in {weight.dtype}, so nothing was merged; "
            "undo the edits that are too large, or load the base model in a wider dtype"
        )


def device_of(module: Any) -> torch.device:
    """
    Return the device on which a layer runs: that of its weight, or, offloaded, the one to which Accelerate brings it.
    """
    module = inner_layer(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):  # a quantiser's layer, with tensors under other names
        weight = next(itertools.chain(module.parameters(), module.buffers()))
    if weight.is_meta:
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return weight.device


def is_placed(model: nn.Module) -> bool:
    """Whether a device map or offloading decides where the model's weights are."""
    return bool(getattr(model, "hf_device_map", None)) or any(p.is_meta for p in model.parameters())


def weight_matrix(module: Any) -> torch.Tensor:
    """Return a layer's weight as `(d_out, d_in)`, a view of the stored one."""
    module = inner_layer(module)
    weight: torch.Tensor = module.weight
    return weight.T if stores_transposed(module) else weight


def stores_transposed(module: Any) -> bool:
    """Whether a layer stores its weight as `(d_in, d_out)`, as GPT-2's do; PEFT calls it `fan_in_fan_out`."""
    return isinstance(inner_layer(module), Conv1D)


def refused_by_peft(model: Any, names: Iterable[str]) -> list[str]:
    """
    Return those of some layers for which PEFT refuses an adapter, in a model of Mamba's kind.

    Args:
        model (`nn.Module`): The base model.
        names (`Iterable[str]`): The layers' names.
    """
    of_mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES
    return [name for name in names if of_mamba and name.split(".")[-1] in _MAMBA_NAMES]


def named_like_fused_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """
    Return those of some layers whose names are an expert's, in a model that fuses its experts' weights into 3-D
    parameters: PEFT maps an adapter of such a layer, a shared expert's say, onto the fused parameter.

    Args:
        model (`nn.Module`): The base model.
        names (`Iterable[str]`): The layers' names.
    """
    alike = [name for name in names if name.split(".")[-1] in _EXPERT_NAMES]
    return alike if alike and any(parameter.dim() == 3 for parameter in model.parameters()) else []
