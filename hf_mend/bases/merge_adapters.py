"""Merging of a user's adapters around the base model's layers through PEFT, so that the plain model remains."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from .weights import check_own_weight, weight_matrix, writable_weight


_REMEDY = (
    "save_edits, merge the adapter with PEFT before the model is wrapped, and load_edits there, or keep adapter and "
    "edits beside the weights"
)


def weight_with_adapters(layer: Any) -> torch.Tensor:
    """
    Return a layer's weight as `(d_out, d_in)` with the active adapters merged into it. It is a copy if there are some.

    Args:
        layer (`nn.Module`): A linear layer, or PEFT's around one.

    Raises:
        ValueError: An adapter holds NaN or infinity.
    """
    if isinstance(layer, BaseTunerLayer):
        layer = copy.deepcopy(layer)
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters:
            layer.merge(safe_merge=True)
    return weight_matrix(layer)


@torch.no_grad()
def merge_adapters_(model: Any, undo: ExitStack | None = None) -> None:
    """
    Replace PEFT's layers by their base layers, in place, with the active adapters merged into them.

    Args:
        model (`PreTrainedModel`): A model with or without adapters, from `PeftModel` or `add_adapter`.
        undo (`ExitStack`, *optional*): Gets what restores the model bit for bit when it is closed.

    Raises:
        TypeError: An adapter cannot be merged: it brings whole modules, its layer's weight cannot be written to or
            is another layer's too, or PEFT cannot. Nothing has changed then.
    """
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise TypeError(f"the adapter brings more than updates of layers, {name!r}; {_REMEDY}")
    for name, layer in layers:
        try:
            if not layer.disable_adapters:
                writable_weight(layer)
                check_own_weight(model, layer)
                copy.deepcopy(layer).merge(safe_merge=True)  # PEFT raises for what it cannot merge only here
        except Exception as error:
            raise TypeError(f"the adapter of {name!r} cannot be merged ({error}); {_REMEDY}") from error
    undo = ExitStack() if undo is None else undo
    undo.callback(_restore_attributes, model, {name: model.__dict__.get(name, _MISSING) for name in _MARKS})
    for name, layer in reversed(layers):  # an adapter inside another first
        undo.callback(_restore_layer, model, name, layer, _content(layer))
        if not layer.disable_adapters:
            layer.merge()
        elif layer.merged:
            layer.unmerge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    if layers and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False  # else save_pretrained would write the adapter alone


# What says of a model that it has adapters.
_MARKS = ("peft_config", "_hf_peft_config_loaded")
_MISSING = object()


def _content(layer: Any) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return what a merge changes of a layer: which adapters are in its weight, and that weight."""
    base = layer.get_base_layer()
    values = {name: value.detach().clone() for name, value in base.named_parameters()} if layer.active_adapters else {}
    return list(layer.merged_adapters), values


def _restore_layer(model: Any, name: str, layer: Any, content: tuple[list[str], dict[str, torch.Tensor]]) -> None:
    merged, values = content
    for key, value in layer.get_base_layer().named_parameters():
        if key in values:
            value.data.copy_(values[key])
    layer.merged_adapters[:] = merged
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def _restore_attributes(model: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not _MISSING:
            setattr(model, name, value)
