"""Edits as a PEFT LoRA adapter: the same two thin matrices under other names."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.utils import logging

from ..bases.experts import is_experts
from ..bases.names import current_names
from ..bases.patterns import MATCHING_SECONDS, expression, is_literal
from ..bases.targets import Target
from ..bases.weights import (
    equal_in_dtype,
    inner_layer,
    named_like_fused_experts,
    plain_parameter,
    refused_by_peft,
    stores_transposed,
)
from ..hub.atomic import replaced_folder
from ..hub.files import read_json, read_json_file, read_tensors, shortened, write_tensors
from .edit import Edit, active_edits, is_description
from .low_rank import Update


logger = logging.get_logger("hf_mend.lora")  # the name that it had in 0.1.0, by which programs may listen to it

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_LONGEST_PATTERNS = 1_000_000  # characters
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_WEIGHT_NAME = re.compile(r"base_model\.model\.(?P<layer>.+?)(?:\.base_layer)?\.(?P<kind>weight|bias)")
_SIDES = {"A": (".lora_A.", ".lora_B."), "B": (".lora_B.", ".lora_A.")}
_MORE_THAN_LORA = {
    "use_dora": "DoRA rescales the whole weight",
    "use_qalora": "QA-LoRA pools the input",
    "bias": "it trains biases",
    "lora_bias": "it trains biases",
    "modules_to_save": "it brings whole layers",
    "trainable_token_indices": "it brings rows of the embedding",
    "target_parameters": "it changes parameters that are no linear layer's",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts at some tokens alone",
}
# Fields that every version of PEFT knows; the others are written where they differ from PEFT's own default.
_FIRST_FIELDS = frozenset(
    [
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "fan_in_fan_out",
        "bias",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
    ]
)
# Fields that leave an adapter the product of two thin matrices; adapters that set any other are refused.
_PLAIN_FIELDS = frozenset(
    [
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "use_rslora",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "runtime_config",
        "megatron_core",
        "ensure_weight_tying",
    ]
)


def check_adaptable(edited: Iterable[Target]) -> None:
    """
    Check that an adapter can hold edits of some layers.

    Args:
        edited (`Iterable[Target]`): The layers.

    Raises:
        ValueError: One is a block's experts.
    """
    experts = [target.name for target in edited if is_experts(inner_layer(target.module))]
    if experts:
        raise ValueError(
            f"{experts[0]!r} is all experts of its block, and an edit beside them is no change of a weight, so a LoRA "
            "adapter cannot hold it; keep the edits with save_edits, or make edits that an adapter can hold with "
            "target_modules=['o_proj'], attention's output projection"
        )


def warn_of_unloadable(base_model: nn.Module, names: Iterable[str]) -> None:
    """
    Warn where PEFT cannot load an adapter of some layers, or would map it onto fused experts (see
    [`refused_by_peft`] and [`named_like_fused_experts`]).

    Args:
        base_model (`nn.Module`): The base model.
        names (`Iterable[str]`): The exported layers.
    """
    refused = refused_by_peft(base_model, names)
    if refused:
        logger.warning(
            f"PEFT loads no adapter of {refused[0]!r} in a {type(base_model).__name__}, whose kernels pass the layer "
            "by, so this one is of use to load_lora alone. Keep it with save_edits, merge it, or choose other "
            "target_modules"
        )
    ambiguous = named_like_fused_experts(base_model, names)
    if ambiguous:
        logger.warning(
            f"{type(base_model).__name__} fuses its experts' weights, and PEFT maps adapters of layers named like "
            f"{ambiguous[0]!r} onto those, so it cannot load this one as it is meant. Keep it with save_edits, or "
            "merge it"
        )


def write_lora(
    folder: str | Path,
    targets: Sequence[Target],
    updates: Mapping[str, Update],
    task_type: str | None,
    base_model_name_or_path: str | None,
    zeros: Sequence[Target] | None = None,
    edits: Sequence[Edit] = (),
) -> None:
    """
    Write `adapter_config.json` and `adapter_model.safetensors`, all or nothing.

    An update `v^T u` is LoRA's `B A` with `A = u`, `B = v^T` and scale 1. Layers without an update are left out, or
    written as zeros.

    Args:
        folder (`str` or `Path`): The folder to write.
        targets (`Sequence[Target]`): The edited layers.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)`.
        task_type (`str`, *optional*): `"CAUSAL_LM"` or `"SEQ_2_SEQ_LM"`.
        base_model_name_or_path (`str`, *optional*): The base model's name.
        zeros (`Sequence[Target]`, *optional*): Layers to write as zeros, as servers require that stack a kind of layer
            over all blocks; all layers have one rank then. Without it, each layer has the rank of its update.
        edits (`Sequence[Edit]`): The edits whose rows, one below another, the updates are; noted for [`read_lora`].

    Raises:
        ValueError: There is no update to write.
    """
    updates = {name: pair for name, pair in updates.items() if len(pair[0])}
    if not updates:
        raise ValueError("there is no edit to write as a LoRA adapter; make one first")
    ranks = {name: len(u) for name, (u, _) in updates.items()}
    largest = max(ranks.values())
    uniform = zeros is not None
    empty = {
        one.name: tuple(torch.zeros(0, width, dtype=torch.float32) for width in (one.d_in, one.d_out))
        for one in zeros or ()
    }
    tensors = {}
    for name, (u, v) in {**empty, **updates}.items():
        pad = (0, 0, 0, largest - len(u) if uniform else 0)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(u, pad)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(v, pad).T
    # Keys of a pattern are regular expressions; alpha equal to the rank makes LoRA's scale 1.
    pattern = {} if uniform else {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=sorted({**empty, **updates}),
        fan_in_fan_out=any(stores_transposed(target.module) for target in targets),
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    )
    entries = [
        {
            **replace(edit, scope=None, updates={}).describe(),
            "ranks": {name: u[0] for name, (u, _) in edit.shapes().items() if name in updates},
        }
        for edit in edits
    ]
    with replaced_folder(folder) as work:
        config.save_pretrained(str(work))
        _leave_defaults_out(work / ADAPTER_CONFIG_NAME)
        write_tensors(work / ADAPTER_WEIGHTS_NAME, tensors, {"edits": json.dumps(entries)} if edits else {})


def _leave_defaults_out(path: Path) -> None:
    """Remove what an older PEFT may not know from an adapter's configuration, unless it says something."""
    known = LoraConfig().to_dict()
    kept = {
        name: value
        for name, value in read_json_file(path).items()
        if name in _FIRST_FIELDS or (name != "peft_version" and value != known.get(name))
    }
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_lora(config_path: str | Path, weights_path: str | Path, base_model: nn.Module) -> list[Edit]:
    """
    Read a LoRA adapter as edits: those that [`write_lora`] noted, or, of any other adapter, one without a prompt.

    Args:
        config_path (`str` or `Path`): `adapter_config.json`.
        weights_path (`str` or `Path`): `adapter_model.safetensors`.
        base_model (`nn.Module`): The model that the adapter is for. Layers get the names that they have there.

    Raises:
        ValueError: A file is damaged, or the adapter is more than low-rank updates of linear layers; the message names
            the part that cannot be an edit.
    """
    config = read_json_file(config_path)
    scale_of = _scales(config, config_path)
    tensors, metadata = read_tensors(weights_path)
    tensors = _without_own_weights(_plain_names(tensors), base_model, weights_path)
    updates: dict[str, Update] = {}
    for name in sorted(tensors):
        found = _TENSOR_NAME.fullmatch(name)
        other = name.replace(".lora_A.", ".lora_B.") if found and found["side"] == "A" else None
        if not found or name.replace(*_SIDES[found["side"]]) not in tensors:
            raise ValueError(
                f"{weights_path} holds {shortened(name)}, expected pairs of lora_A and lora_B of linear layers; only "
                "such an adapter can be an edit, load others with PEFT"
            )
        if other is None:
            continue
        a, b = tensors[name], tensors[other]  # (rank, d_in), (d_out, rank)
        rank, scale = scale_of(found["layer"])
        if a.dim() != 2 or b.dim() != 2 or len(a) != rank or b.shape[1] != rank:
            raise ValueError(
                f"{weights_path}: the adapter of {found['layer']!r} has shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                f"{config_path} says rank {rank}; the files do not belong together, or one was altered"
            )
        v = b.float().T.contiguous()
        updates[found["layer"]] = (a.float().contiguous(), v if scale == 1 else v * scale)
    if not updates:
        raise ValueError(f"{weights_path} holds no tensor; download or save it again")
    edits = _noted_edits(metadata, updates, weights_path)
    if not edits:
        acting = {name: pair for name, pair in updates.items() if pair[1].any()} or updates
        edits = [Edit(uuid.uuid4().hex[:12], "", "", acting, {"lora": shortened(Path(config_path).parent.name)})]
    names = current_names(base_model, updates)
    for edit in edits:
        edit.updates = {names[name]: pair for name, pair in edit.updates.items()}
    return edits


def _plain_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by the names that PEFT saves: without a compiled model's part, and the default adapter's."""
    return {
        re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", name.replace("_orig_mod.", "")): value
        for name, value in tensors.items()
    }


def _without_own_weights(
    tensors: Mapping[str, torch.Tensor], base_model: nn.Module, source: str | Path
) -> dict[str, torch.Tensor]:
    """
    Return the tensors without the base model's own weights, which PEFT saves beside an adapter of an output layer.

    Raises:
        ValueError: Such a weight is another than the base model's.
    """
    own = {name: found for name in tensors if (found := _WEIGHT_NAME.fullmatch(name)) and ".lora_" not in name}
    layers = current_names(base_model, {found["layer"] for found in own.values()})
    left = dict(tensors)
    for name, found in own.items():
        layer = layers[found["layer"]]
        weight = plain_parameter(base_model, layer, found["kind"])
        if weight is None:
            continue
        if not equal_in_dtype(left.pop(name), weight):
            raise ValueError(
                f"{source} brings a {found['kind']} of {shortened(layer)} that differs from the base model's, which "
                "an edit cannot hold; load it with PEFT, merge it, and edit the merged model"
            )
    return left


def _scales(config: Mapping[str, Any], source: str | Path) -> Callable[[str], tuple[int, float]]:
    """
    Return a function from a layer's name to its rank and the factor of the product, of an adapter that is nothing but
    LoRA.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{source} is of the type {shortened(config.get('peft_type'))}; only LORA can be an edit")
    for field, value in config.items():
        if value and value != "none" and field not in _PLAIN_FIELDS:
            reason = _MORE_THAN_LORA.get(field, "it goes beyond plain LoRA")
            raise ValueError(
                f"{source} has {shortened(field)}={shortened(value)}: {reason}, which an edit cannot hold; load "
                "it with PEFT, merge it, and edit the merged model"
            )
    kind = config.get("init_lora_weights", True)
    if not isinstance(kind, bool) and kind not in ("gaussian", "orthogonal", "eva", None):
        raise ValueError(
            f"{source} has init_lora_weights={shortened(kind)}, which changes the base model's weights; convert it "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    ranks, alphas = ({} if config.get(field) is None else config[field] for field in ("rank_pattern", "alpha_pattern"))
    numbers: list[Any] = [config.get("r"), config.get("lora_alpha")]
    for pattern in (ranks, alphas):
        if not isinstance(pattern, dict) or len(pattern) > 10_000:
            raise ValueError(f"{source}: {shortened(pattern)} is no pattern, expected layers and numbers")
        numbers += pattern.values()
    if not all(type(number) in (int, float) and 0 < number < 1e6 for number in numbers):
        raise ValueError(f"{source} has ranks and alphas {shortened(numbers)}, expected positive numbers")
    rank_of, alpha_of = (
        _first_match(pattern, config[default], source) for pattern, default in ((ranks, "r"), (alphas, "lora_alpha"))
    )

    def scale_of(layer: str) -> tuple[int, float]:
        rank, alpha = rank_of(layer), alpha_of(layer)
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale_of


def _first_match(pattern: Mapping[str, Any], default: Any, source: str | Path) -> Callable[[str], Any]:
    """
    Return a function from a layer's name to the value that PEFT takes for it: that of the first key that the end of
    the name matches.
    """
    if sum(map(len, pattern)) > _LONGEST_PATTERNS:
        raise ValueError(f"{source} has patterns of more than {_LONGEST_PATTERNS} characters; load it with PEFT")
    names: dict[str, tuple[int, Any]] = {}
    others: list[tuple[int, Callable[[str], bool], Any]] = []
    until = time.monotonic() + 5 * MATCHING_SECONDS  # for all of them
    for index, (key, value) in enumerate(pattern.items()):
        name = is_literal(key)
        if name is not None:
            names.setdefault(name, (index, value))
        else:
            others.append((index, expression(rf"(?:.*\.)?(?:{key})", "a pattern of the adapter", until), value))

    def value_of(layer: str) -> Any:
        parts = layer.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        index, value = min(
            (names[end] for end in ends if end in names), key=lambda one: one[0], default=(None, default)
        )
        earlier = (other for place, matches, other in others if (index is None or place < index) and matches(layer))
        return next(earlier, value)

    return value_of


def _noted_edits(metadata: Mapping[str, str], updates: Mapping[str, Update], source: str | Path) -> list[Edit]:
    """Return the edits whose rows the updates are, as the header says."""
    if "edits" not in metadata:
        return []
    noted = read_json(metadata["edits"], f"the header of {source}")
    edits: list[Edit] = []
    starts = dict.fromkeys(updates, 0)
    entry: Any
    for entry in noted if isinstance(noted, list) else [None]:
        ranks = entry.get("ranks") if isinstance(entry, dict) else None
        if not isinstance(ranks, dict) or not is_description(entry) or not ranks.keys() <= updates.keys():
            raise ValueError(f"{source}: its header's edits were altered: {shortened(entry)}; save it again")
        edit = Edit.from_file(entry, {}, str(source))
        own: dict[str, Update] = {}
        for name, rank in ranks.items():
            u, v = updates[name]
            if type(rank) is not int or not 0 <= rank <= len(u) - starts[name]:
                raise ValueError(f"{source}: its header claims {shortened(rank)} more rows of {name!r}; save it again")
            rows = slice(starts[name], starts[name] + rank)
            own[name] = (u[rows].clone(), v[rows].clone())
            starts[name] += rank
        edit.updates = own
        edits.append(edit)
    # PEFT adds up all rows, so rows that no acting edit has would make the adapter two.
    hidden = [name for name, (_, v) in updates.items() if v[starts[name] :].any()]
    acting = {id(edit) for edit in active_edits(edits)}
    waiting = [edit.id for edit in edits if id(edit) not in acting]
    if edits and (hidden or waiting):
        what = f"leave out rows of {shortened(hidden[:3])}" if hidden else f"disable {shortened(waiting[:3])}"
        raise ValueError(
            f"{source}: its header's edits {what}, which act in PEFT; the header was altered, save it again"
        )
    return edits
