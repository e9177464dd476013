"""Layers that quantisers put in place of a model's own: their order, and the gradient that comes through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import is_experts
from .threads import hooked
from .weights import inner_layer, layer_widths


def keep_gradients(model: nn.Module) -> None:
    """
    Keep quantised layers in a form that passes a gradient on to their inputs, for as long as none has run without.

    At its first pass without a gradient, bitsandbytes packs 4-bit weights anew on some CPUs for a kernel that has no
    backward pass, and so do the layers by which GPT-QModel runs GPTQ and AWQ models.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what an earlier pass has packed
        if getattr(module, "linear_mode", ...) is None:  # not decided yet
            module.linear_mode = "train"


def restore_order(model: Any) -> None:
    """
    Put layers that a quantiser has placed into a model by the alphabet, as GPTQ's does, into the order in which the
    model's class defines them: which layer an edit changes, and which of an editor's parameters are its own, goes by
    the order of definition.

    Args:
        model (`PreTrainedModel`): The model; nothing but the order of its modules changes.
    """
    placed: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        children = [own for own, child in module.named_children() if _is_placed(child)]
        if len(children) > 1:
            placed[name] = children
    if not placed or any(children != sorted(children) for children in placed.values()):
        return
    try:
        with torch.device("meta"):
            defined = type(model)(deepcopy(model.config))
        orders = {name: [own for own, _ in defined.get_submodule(name).named_children()] for name in placed}
    except Exception:  # foreign code that is not built from its configuration alone
        return
    for name, order in orders.items():
        own = model.get_submodule(name)._modules
        for child in [*(one for one in order if one in own), *(one for one in own if one not in order)]:
            own[child] = own.pop(child)


def _is_placed(module: Any) -> bool:
    """Whether a layer is a quantiser's own, no `nn.Linear`."""
    inner = inner_layer(module)
    return layer_widths(inner) is not None and not isinstance(inner, (nn.Linear, Conv1D)) and not is_experts(inner)


def unusual_layers(model: nn.Module) -> dict[str, nn.Module]:
    """
    Return the layers, by name, of which only a pass tells whether a gradient comes through: linear layers that are no
    plain ones, and experts with kernels of their own.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        linear = layer_widths(module) is not None and type(inner_layer(module)) not in (nn.Linear, Conv1D)
        if (linear or type(module).__name__.endswith("Experts")) and not is_experts(inner_layer(module)):
            found[name] = module
    return found


@contextmanager
def gradients_pass(layers: dict[str, nn.Module]) -> Iterator[None]:
    """
    See in the passes within the context that each layer passes a gradient on. One that drops it would go unseen: past
    it, through the residual stream, others come through, and the gradients below are wrong.

    A layer that computes in inference mode unless it is in training mode, as AWQ's, is put into that mode, which
    changes nothing else in it.

    Args:
        layers (`dict[str, nn.Module]`): The layers, by name.

    Raises:
        ValueError: A layer passes no gradient on.
    """

    def make(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            y = _tensor_of(output)
            if y is not None and y.is_inference() and not torch.is_inference_mode_enabled():
                module.training = True
                output = module.forward(*args)
                y = _tensor_of(output)
            if y is None or y.requires_grad or not any(_requires_grad(one) for one in args):
                return output
            raise ValueError(
                f"no gradient comes through the layer {name!r}, a {type(module).__name__}, so nothing below it can be "
                "edited: its kernel has no backward pass. Some layers take such a kernel at their first pass: load "
                "the base model anew and make it editable before it runs. Or load it with another kernel "
                "(GPTQConfig(bits=4, backend='auto_trainable'), AwqConfig(backend='auto_trainable')), in another "
                "quantisation, or in bfloat16"
            )

        return see

    with ExitStack() as hooks:  # before other hooks, whose addends have a gradient of their own
        for name, module in layers.items():
            hooks.enter_context(hooked(module.register_forward_hook, make(name), prepend=True))
        yield


def _tensor_of(output: Any) -> torch.Tensor | None:
    """Return what a layer computes, where it is a tensor of floats or stands first among others."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
