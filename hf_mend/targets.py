"""Which layers an editor changes. The only file that knows architectures and weight layouts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import regex
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .config import EditorConfig
from .files import shortened


logger = logging.get_logger(__name__)

# Inside a block, every linear layer that is neither attention nor routing belongs to the MLP. That rule covers the
# architectures we know of; names here are components of a module's name relative to its block.
_ATTENTION_NAME = re.compile(r"attn|attention|EncDecAttention|SelfAttention", re.IGNORECASE)
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})

_MATCHING_SECONDS = 2.0

# Blocks of the `"default"` choice, as fractions of the stack's depth, and which MLP weights of them: see
# benchmarks/results/ for the measurements behind both.
_DEFAULT_SPAN = (0.567, 0.767)
# Methods that write at the subject want the blocks from which what is known of it is read further up.
_DEFAULT_SPANS = {"memit": (0.267, 0.467), "rome": (0.333, 0.367)}
_PAPER_BLOCKS = {"decoder_only": 3, "encoder_decoder": 2}


@dataclass(frozen=True)
class Target:
    """
    One linear layer that an editor may change.

    Args:
        name (`str`): Qualified name of the layer in the base model.
        module (`nn.Module`): The layer, an `nn.Linear` or GPT-2's `Conv1D`.
        d_in (`int`): Width of the layer's input.
        d_out (`int`): Width of the layer's output.
        stack (`str`): `"encoder"` or `"decoder"`.
        block (`int`): Index of the block in its stack.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    stack: str
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape as the library counts it, `(d_out, d_in)`, whatever the layer's own layout."""
        return self.d_out, self.d_in


@dataclass(frozen=True)
class Stack:
    """A run of transformer blocks: `kind` is `"encoder"` or `"decoder"`, `name` the `nn.ModuleList`'s name."""

    kind: str
    name: str
    blocks: nn.ModuleList


def plain_base(model: Any) -> Any:
    """
    The transformers model inside what a user may have wrapped it in. Adapters of a `PeftModel` stay active.

    Args:
        model (`nn.Module`): A transformers model, `torch.compile`'s wrapper of one, or a `PeftModel`.

    Raises:
        ValueError: The model was compiled in place, or has a learned prompt instead of layers; it cannot carry edits.
    """
    if hasattr(model, "_orig_mod"):
        logger.warning(
            "edits run in the model that was compiled, not in its compiled form, which would not see them; to have "
            "both, compile what merge_and_unload() returns"
        )
        model = model._orig_mod
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"the base is a PeftModel with {model.active_peft_config.peft_type.value}, a learned prompt, which is "
                "not part of the layers; edit the model without it"
            )
        model = model.get_base_model()
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name or type(module).__name__!r} was compiled in place and would not see the edits; load the base "
                "model without compile(), and compile what merge_and_unload() returns"
            )
    return model


def keep_gradients(model: nn.Module) -> None:
    """
    Keeps quantised layers in a form that passes a gradient on to their inputs.

    bitsandbytes packs 4-bit weights anew on some CPUs, at the first pass in eval mode, for a kernel that has no
    gradient.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what an earlier pass has packed


def is_editable(module: nn.Module) -> bool:
    """Whether `module` computes `y = W x (+ b)` and so can carry an edit beside its weight."""
    return layer_widths(module) is not None


def layer_widths(module: nn.Module) -> tuple[int, int] | None:
    """`(d_in, d_out)` of a linear layer, `None` for anything else. Quantised linears subclass `nn.Linear`."""
    module = _inner(module)
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Name within the block -> linear layer. One with an adapter around it counts once, adapter included."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if is_editable(module) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def named_layers(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """Those linear layers of a model that have one of these names, in a block or not, whatever an editor edits."""
    wanted = set(names)
    found = []
    for name, module in linear_layers(model).items() if wanted else ():
        widths = layer_widths(module)
        if name in wanted and widths is not None:
            found.append(Target(name, module, *widths, stack="", block=-1))
    return found


def _inner(module: Any) -> Any:
    """The layer inside PEFT's, which is the layer itself where there is no adapter."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def writable_weight(module: Any) -> torch.Tensor:
    """
    A layer's weight as `(d_out, d_in)`, a view of the stored one that may be written to.

    Raises:
        TypeError: The weight is offloaded, quantised or sharded.
    """
    kind = type(module).__name__
    weight: Any = _inner(module).weight
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


def check_own_weight(model: nn.Module, layer: nn.Module) -> None:
    """
    Raises:
        TypeError: The layer's weight is another module's too, as where embedding and output layer are tied.
    """
    layer = _inner(layer)
    for name, module in model.named_modules():
        if module is not layer and any(parameter is layer.weight for parameter in module._parameters.values()):
            raise TypeError(
                f"the weight of a {type(layer).__name__} is that of {name!r} too (they are tied), so an edit merged "
                "into the one would change the other; keep the edits beside the weight, with save_edits or save_lora"
            )


@torch.no_grad()
def add_to_weight_(module: nn.Module, update: torch.Tensor) -> None:
    """
    Adds an update of shape `(d_out, d_in)` to a layer's weight in place, in the weight's own layout.

    Args:
        module (`nn.Module`): The layer.
        update (`torch.Tensor` of shape `(d_out, d_in)`): What to add.

    Raises:
        TypeError: The weight cannot be written to.
    """
    weight = writable_weight(module)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, update.dtype), torch.float32)
    weight.copy_(weight.to(dtype) + update.to(weight.device, dtype))


def device_of(module: Any) -> torch.device:
    """Where a layer runs: where its weight is, or, offloaded, where Accelerate brings it."""
    module = _inner(module)
    weight: torch.Tensor = module.weight
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
    """A layer's weight as `(d_out, d_in)`, a view of the stored one."""
    module = _inner(module)
    weight: torch.Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def block_stacks(model: nn.Module) -> list[Stack]:
    """
    The model's stacks of transformer blocks, in the order in which a forward pass runs them.

    A stack is the outermost `nn.ModuleList` whose every element holds a linear layer; in an encoder-decoder model the
    name tells the two stacks apart.

    Args:
        model (`nn.Module`): A causal or seq2seq transformers model.

    Raises:
        ValueError: No such list is found.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(stack.name + ".") for stack in found):
            continue
        if all(any(is_editable(child) for child in block.modules()) for block in module):
            kind = "encoder" if "encoder" in name.split(".") else "decoder"
            found.append(Stack(kind, name, module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks that holds linear layers, so there is nothing "
            "to edit; pass a causal or seq2seq language model from transformers"
        )
    return sorted(found, key=lambda stack: stack.kind != "encoder")


def mlp_layers(block: nn.Module) -> list[str]:
    """
    Names, relative to the block, of its MLP's linear layers in the order in which they are defined.

    A mixture of experts that holds them as 3-D parameters has no linear layer there: of such a block, its shared
    expert's layers, or else its attention's output projection, are what can be edited.
    """
    linear = list(linear_layers(block))
    mlp = [n for n in linear if not _ATTENTION_NAME.search(n) and n.split(".")[-1] not in _ROUTER_NAMES]
    return mlp or linear[-1:]


def find_targets(model: nn.Module, config: EditorConfig) -> list[Target]:
    """
    The layers that `config` chooses in `model`, in the order of a forward pass.

    Args:
        model (`nn.Module`): The base model.
        config ([`EditorConfig`]): `target_modules`, `layers_to_transform` and `layers_pattern` decide.

    Raises:
        ValueError: Nothing matches, or a match is not a linear layer.
    """
    stacks = block_stacks(model)
    if config.layers_pattern is not None:
        stacks = [stack for stack in stacks if stack.name.split(".")[-1] == config.layers_pattern]
        if not stacks:
            raise ValueError(
                f"layers_pattern={shortened(config.layers_pattern)} names no list of blocks; the model has "
                f"{[stack.name for stack in block_stacks(model)]}"
            )
    chosen = config.target_modules
    if chosen is None or chosen in ("default", "paper"):
        span = _DEFAULT_SPANS.get(config.method, _DEFAULT_SPAN)
        targets = list(_named_choice(stacks, chosen or "default", config.layers_to_transform, span))
    else:
        targets = list(_matching(model, stacks, chosen, config.layers_to_transform))
    if not targets:
        examples = sorted({name for stack in stacks for name in mlp_layers(stack.blocks[-1])})
        raise ValueError(
            f"target_modules={shortened(chosen)} with layers_to_transform={shortened(config.layers_to_transform)} "
            f"matches no layer of {type(model).__name__}; its blocks hold linear layers named {examples}"
        )
    return targets


def lowest_block(targets: Sequence[Target]) -> tuple[str, int]:
    """`(stack, block)` of the first target that a forward pass meets."""
    first = min(targets, key=lambda t: (t.stack != "encoder", t.block))
    return first.stack, first.block


def _named_choice(
    stacks: list[Stack], choice: str, layers: Sequence[int] | None, span: tuple[float, float]
) -> Iterator[Target]:
    paper_blocks = _PAPER_BLOCKS["encoder_decoder" if len(stacks) > 1 else "decoder_only"]
    for stack in stacks:
        depth = len(stack.blocks)
        if layers is not None:
            blocks = [i for i in range(depth) if i in layers]
        elif choice == "paper":
            blocks = list(range(max(0, depth - paper_blocks), depth))
        else:
            first, last = (round(fraction * depth) for fraction in span)
            blocks = list(range(min(first, depth - 1), max(last, first + 1)))
        for index in blocks:
            names = mlp_layers(stack.blocks[index])
            for name in names if choice == "paper" else names[-1:]:
                yield _target(stack, index, name)


def _matching(
    model: nn.Module, stacks: list[Stack], pattern: str | Sequence[str], layers: Sequence[int] | None
) -> Iterator[Target]:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts."""
    matches = expression(pattern) if isinstance(pattern, str) else _listed(pattern)
    for stack in stacks:
        for index, block in enumerate(stack.blocks):
            if layers is not None and index not in layers:
                continue
            for relative, module in block.named_modules():
                name = f"{stack.name}.{index}.{relative}"
                if not matches(name):
                    continue
                if not is_editable(module):
                    raise ValueError(
                        f"target_modules={shortened(pattern)} matches {name!r}, a {type(module).__name__}, which is "
                        f"not a linear layer; choose among {mlp_layers(block)}"
                    )
                yield _target(stack, index, relative)


def expression(pattern: str, field: str = "target_modules") -> Callable[[str], bool]:
    """
    Whether a name matches a regular expression, within a time for all names together: the expression may come from a
    configuration on the Hub, and re takes years for some, `(a+)+` say. The syntax is that of re, as in PEFT; the
    matching is done by regex, which takes most of those in its stride and has a time limit for the rest.
    """
    try:
        re.compile(pattern)
        compiled = regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{field}={shortened(pattern)} is not a regular expression ({error}); names in full or in part go "
            "in a list"
        ) from error
    deadline = time.monotonic() + _MATCHING_SECONDS

    def matches(name: str) -> bool:
        try:
            return compiled.fullmatch(name, timeout=max(deadline - time.monotonic(), 0.001)) is not None
        except TimeoutError as error:
            raise ValueError(
                f"{field}={shortened(pattern)} takes longer than {_MATCHING_SECONDS} seconds to match; list "
                "the layers' names instead"
            ) from error

    return matches


def _listed(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name, or the end of it after a dot, is in a list."""
    wanted = frozenset(names)

    def matches(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:]) in wanted for i in range(len(parts)))

    return matches


def _target(stack: Stack, index: int, relative: str) -> Target:
    module: Any = stack.blocks[index].get_submodule(relative)
    widths = layer_widths(module)
    assert widths is not None
    return Target(f"{stack.name}.{index}.{relative}", module, *widths, stack.kind, index)
