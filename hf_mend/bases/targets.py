"""The layers that an editor changes, found in any causal or seq2seq architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import EditorConfig
from ..data.deprecation import renamed_arguments
from ..hub.files import shortened
from .experts import is_experts
from .patterns import expression
from .weights import inner_layer, is_editable, layer_widths


# Components of a layer's name within its block. They cover the architectures of docs/architectures.md and, as far as
# their default configurations can be built, all language models of transformers.
ATTENTION_NAME = re.compile(r"attn|attention|EncDecAttention|SelfAttention", re.IGNORECASE)
MLP_NAME = re.compile(r"mlp|ffn|feed_?forward|(?:^|\.)ff\d?\.|DenseReluDense|shared_expert", re.IGNORECASE)
# What chooses, scales or shifts, and experts that a token may not be routed to: no default, whatever stands beside it.
# DBRX's attention lies in a `norm_attn_norm`.
_AUXILIARY_NAME = re.compile(
    r"(?:^|\.)(?:gate|\w*router\w*|\w+_(?:expert|message|input)_gate|(?!norm_attn_norm)\w*norm\w*|\w*position_bias"
    r"|\w*adapter\w*|experts|expert_\d+)(?:\.|$)"
)
_PAPER_BLOCKS = {"decoder_only": 3, "encoder_decoder": 2}


@renamed_arguments(stack="side")
@dataclass(frozen=True)
class Target:
    """
    One layer beside which an edit may act: a linear layer, or all experts of a block as one.

    Args:
        name (`str`): Qualified name of the layer in the base model.
        module (`nn.Module`): The layer, an `nn.Linear`, GPT-2's `Conv1D` or a quantiser's, or a block's experts.
        d_in (`int`): Width of the layer's input.
        d_out (`int`): Width of the layer's output.
        side (`str`): `"encoder"` or `"decoder"`.
        block (`int`): Index of the block in its list.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    side: str
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape, `(d_out, d_in)`, whatever the layer's own layout."""
        return self.d_out, self.d_in


@dataclass(frozen=True)
class BlockList:
    """A run of transformer blocks: `kind` is `"encoder"` or `"decoder"`, `name` the `nn.ModuleList`'s name."""

    kind: str
    name: str
    blocks: nn.ModuleList


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """
    Return name within the block -> linear layer, or its experts as one. One with an adapter around it counts once,
    adapter included.
    """
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if is_editable(module) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def named_layers(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """Return a model's linear layers of these names, in a block or not, whatever layers an editor edits."""
    wanted = set(names)
    found = []
    for name, module in linear_layers(model).items() if wanted else ():
        widths = layer_widths(module)
        if name in wanted and widths is not None:
            found.append(Target(name, module, *widths, side="", block=-1))
    return found


def layers_of_same_kind(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """
    Return the layers that other blocks have under the same names as some layers have in theirs.

    Args:
        model (`nn.Module`): The base model.
        names (`Iterable[str]`): The layers' full names; those outside blocks count for nothing.
    """
    given, found = set(names), []
    for block_list in block_lists(model):
        start = f"{block_list.name}."
        kinds = dict.fromkeys(name[len(start) :].partition(".")[2] for name in sorted(given) if name.startswith(start))
        for index, block in enumerate(block_list.blocks):
            linear = linear_layers(block)
            found += [_target(block_list, index, kind) for kind in kinds if kind in linear]
    return [target for target in found if target.name not in given]


def block_lists(model: nn.Module) -> list[BlockList]:
    """
    Return the model's lists of transformer blocks that read text, in the order in which a forward pass runs them: one,
    or in an encoder-decoder model the encoder's and the decoder's, which the model's outermost parts tell apart.

    A list is an outermost `nn.ModuleList` whose every element holds a linear layer. Towers that read images or sound
    are left out, and of several lists of one kind, the outermost is the text's, and of those the one with the most
    weights.

    Args:
        model (`nn.Module`): A causal or seq2seq transformers model.

    Raises:
        ValueError: No such list is found.
    """
    found: list[BlockList] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(block_list.name + ".") for block_list in found):
            continue
        if all(any(is_editable(child) for child in block.modules()) for block in module):
            found.append(BlockList(_kind(model, name), name, module))
    of_text = _within_decoder(model, [one for one in found if _reads_text(model, one.name)])
    largest = (
        max((one for one in of_text if one.kind == kind), key=_rank, default=None) for kind in ("encoder", "decoder")
    )
    chosen = [block_list for block_list in largest if block_list is not None]
    if not chosen:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        kinds = sorted({type(leaf).__name__ for one in lists for leaf in one.modules() if not [*leaf.children()]})
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks that holds linear layers, so there is nothing "
            f"to edit: its blocks hold {kinds[:8]}. Pass a causal or seq2seq language model from transformers, in "
            "another quantisation if these are a quantiser's layers that do not state their widths"
        )
    return chosen


def _kind(model: nn.Module, name: str) -> str:
    """Return `"encoder"` or `"decoder"` for a list's name; a BERT that decodes has an `encoder` and is a decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        return "decoder"
    sides = [part for part in name.split(".") if part.endswith(("encoder", "decoder"))]
    return "encoder" if sides and sides[0].endswith("encoder") else "decoder"


def _reads_text(model: nn.Module, name: str) -> bool:
    """Whether none of the models around a list, the whole one aside, states that it reads something else than text."""
    parts = name.split(".")
    around: list[Any] = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    return all("text" in module.input_modalities for module in around if isinstance(module, PreTrainedModel))


def _within_decoder(model: nn.Module, found: list[BlockList]) -> list[BlockList]:
    """Return those of some lists that belong to the text decoder of a model without an encoder, if it names one."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return found
    blocks = set(model.get_decoder().modules())
    return [block_list for block_list in found if block_list.blocks in blocks] or found


def _rank(block_list: BlockList) -> tuple[int, int]:
    """Return how near to the whole model a list is, and the number of weights in its linear layers."""
    widths = [layer_widths(layer) for block in block_list.blocks for layer in linear_layers(block).values()]
    return -block_list.name.count("."), sum(pair[0] * pair[1] for pair in widths if pair is not None)


def mlp_layers(block: nn.Module) -> list[str]:
    """
    Return the names, relative to the block, of its MLP's linear layers in the order of their definition.

    Where nothing is named like an MLP, that is every layer that is neither attention nor auxiliary: a router, a norm's
    scale, an adapter, one of many experts. A mixture of experts that holds them as 3-D parameters has no linear layer
    there: of such a block, that is its shared expert's, or else its experts as one. Where there is neither, it is
    attention's output projection.
    """
    layers = linear_layers(block)
    main = [name for name in layers if not _AUXILIARY_NAME.search(name)]
    rest = [name for name in main if not ATTENTION_NAME.search(name)]
    mlp = [name for name in rest if MLP_NAME.search(name)]
    if mlp or rest:
        return mlp or rest
    experts = [name for name, layer in layers.items() if is_experts(inner_layer(layer))]
    if experts:
        return experts
    ungated = [name for name in main if "gate" not in name.split(".")[-1]]
    return [_last_layer(block, ungated or main)] if main else []


def _last_layer(block: nn.Module, names: Sequence[str]) -> str:
    """Return the last of some layers, in order of definition, that leads back to the width that they start from."""
    widths = {name: layer_widths(block.get_submodule(name)) for name in names}
    first = widths[names[0]]
    back = [name for name in names if first is not None and (widths[name] or first)[1] == first[0]]
    return back[-1] if back else names[-1]


def find_targets(model: nn.Module, config: EditorConfig) -> list[Target]:
    """
    Return the layers that `config` chooses in `model`, in the order of a forward pass.

    Args:
        model (`nn.Module`): The base model.
        config ([`EditorConfig`]): `target_modules`, `layers_to_transform` and `layers_pattern` decide.

    Raises:
        ValueError: Nothing matches, or a match is not a linear layer.
    """
    lists = block_lists(model)
    if config.layers_pattern is not None:
        lists = [block_list for block_list in lists if block_list.name.split(".")[-1] == config.layers_pattern]
        if not lists:
            raise ValueError(
                f"layers_pattern={shortened(config.layers_pattern)} names no list of blocks; the model has "
                f"{[block_list.name for block_list in block_lists(model)]}"
            )
    chosen = config.target_modules
    if chosen is None or chosen in ("default", "paper"):
        targets = list(_named_choice(lists, chosen or "default", config.layers_to_transform, config.default_span))
    elif chosen == "all-linear":
        targets = list(_every_layer(lists, config.layers_to_transform))
    else:
        targets = list(_matching(model, lists, chosen, config.layers_to_transform))
    if config.scope:
        targets = _above_the_encoder(targets, named=chosen not in (None, "default", "paper"))
    if not targets:
        names = sorted({name for block_list in lists for name in linear_layers(block_list.blocks[-1])})
        ends = {name.split(".")[-1] for name in names}
        hint = ""
        if isinstance(chosen, str) and chosen in {*names, *ends}:
            hint = f"; a string is a regular expression for whole names: give the list [{chosen!r}] for that name"
        raise ValueError(
            f"target_modules={shortened(chosen)} with layers_to_transform={shortened(config.layers_to_transform)} "
            f"matches no layer of {type(model).__name__}; its blocks hold linear layers named {names}{hint}"
        )
    return targets


def _above_the_encoder(targets: list[Target], named: bool) -> list[Target]:
    """
    Return those of some layers that stand above what a scope reads: in an encoder-decoder model the encoder's output,
    which has to be the un-edited model's.

    Raises:
        ValueError: The encoder's layers were chosen by name, or there are no others.
    """
    within = [target.name for target in targets if target.side == "encoder"]
    if within and (named or len(within) == len(targets)):
        raise ValueError(
            "with scope=True an encoder-decoder model's edits are the decoder's, as the scope reads what the encoder "
            f"gives, and {shortened(within[0])} is one of the encoder's ({len(within)} are); name the decoder's alone "
            "by a regular expression in target_modules or by layers_pattern, leave both out, or let edits act "
            "everywhere by scope=False (hf-mend train --no-scope)"
        )
    return [target for target in targets if target.side != "encoder"]


def lowest_block(targets: Sequence[Target]) -> tuple[str, int]:
    """Return `(side, block)` of the first target that a forward pass meets."""
    first = min(targets, key=lambda t: (t.side != "encoder", t.block))
    return first.side, first.block


def _named_choice(
    lists: list[BlockList], choice: str, layers: Sequence[int] | None, span: tuple[float, float]
) -> Iterator[Target]:
    paper_blocks = _PAPER_BLOCKS["encoder_decoder" if len(lists) > 1 else "decoder_only"]
    for block_list in lists:
        depth = len(block_list.blocks)
        if layers is not None:
            blocks = [i for i in range(depth) if i in layers]
        elif choice == "paper":
            blocks = list(range(max(0, depth - paper_blocks), depth))
        else:
            first, last = (round(fraction * depth) for fraction in span)
            first = min(first, depth - 1)
            blocks = list(range(first, max(last, first + 1)))
        for index in blocks:
            block = block_list.blocks[index]
            names = mlp_layers(block)
            for name in names if choice == "paper" or not names else [_last_layer(block, names)]:
                yield _target(block_list, index, name)


def _every_layer(lists: list[BlockList], layers: Sequence[int] | None) -> Iterator[Target]:
    """Yield all linear layers of the blocks, but routers and the like."""
    for block_list in lists:
        for index, block in enumerate(block_list.blocks):
            if layers is None or index in layers:
                for name in linear_layers(block):
                    if not _AUXILIARY_NAME.search(name):
                        yield _target(block_list, index, name)


def _matching(
    model: nn.Module, lists: list[BlockList], pattern: str | Sequence[str], layers: Sequence[int] | None
) -> Iterator[Target]:
    """
    Yield the layers that match by PEFT's rule: a string is a regular expression for the whole name, a list holds names
    or their last parts.
    """
    matches = expression(pattern) if isinstance(pattern, str) else _listed(pattern)
    for block_list in lists:
        for index, block in enumerate(block_list.blocks):
            if layers is not None and index not in layers:
                continue
            for relative, module in block.named_modules():
                name = f"{block_list.name}.{index}.{relative}"
                if not matches(name):
                    continue
                if not is_editable(module):
                    raise ValueError(
                        f"target_modules={shortened(pattern)} matches {name!r}, a {type(module).__name__}, which is "
                        f"not a linear layer; choose among {mlp_layers(block)}"
                    )
                yield _target(block_list, index, relative)


def _listed(names: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a name, or the end of it after a dot, is in a list."""
    wanted = frozenset(names)

    def matches(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:]) in wanted for i in range(len(parts)))

    return matches


def _target(block_list: BlockList, index: int, relative: str) -> Target:
    module: Any = block_list.blocks[index].get_submodule(relative)
    widths = layer_widths(module)
    assert widths is not None
    return Target(f"{block_list.name}.{index}.{relative}", module, *widths, block_list.kind, index)
