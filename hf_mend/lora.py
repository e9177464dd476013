"""Edits as a PEFT LoRA adapter: the same two thin matrices under other names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .edits import Update
from .files import replaced_folder, write_tensors
from .targets import Target


logger = logging.get_logger(__name__)

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_EXPERT_NAMES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def warn_of_fused_experts(base_model: nn.Module, names: Iterable[str]) -> None:
    """
    PEFT takes every layer of a mixture of experts that is named like an expert's for the fused experts' parameter.

    Args:
        base_model (`nn.Module`): The base model.
        names (`Iterable[str]`): The exported layers.
    """
    taken = [name for name in names if name.split(".")[-1] in _EXPERT_NAMES]
    if taken and any(parameter.dim() == 3 for parameter in base_model.parameters()):
        logger.warning(
            f"{type(base_model).__name__} fuses its experts' weights, and PEFT maps adapters of layers named like "
            f"{taken[0]!r} onto those, so it cannot load this one as it is meant. Keep it with save_edits, or merge it"
        )


def write_lora(
    folder: str | Path,
    targets: Sequence[Target],
    updates: Mapping[str, Update],
    task_type: str | None,
    base_model_name_or_path: str | None,
    uniform_rank: bool = False,
) -> None:
    """
    Writes `adapter_config.json` and `adapter_model.safetensors`, all or nothing.

    An update `v^T u` is LoRA's `B A` with `A = u`, `B = v^T` and scale 1. Layers without an update are left out.

    Args:
        folder (`str` or `Path`): Where to write.
        targets (`Sequence[Target]`): The edited layers.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)`.
        task_type (`str`, *optional*): `"CAUSAL_LM"` or `"SEQ_2_SEQ_LM"`.
        base_model_name_or_path (`str`, *optional*): The base model's name.
        uniform_rank (`bool`, defaults to `False`): Pad all layers with zeros to one rank, as some servers want it.

    Raises:
        ValueError: There is no update to write.
    """
    updates = {name: pair for name, pair in updates.items() if len(pair[0])}
    if not updates:
        raise ValueError("there is no edit to write as a LoRA adapter; make one first")
    ranks = {name: len(u) for name, (u, _) in updates.items()}
    largest = max(ranks.values())
    tensors = {}
    for name, (u, v) in updates.items():
        missing = largest - ranks[name] if uniform_rank else 0
        pad = (0, 0, 0, missing)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(u, pad)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(v, pad).T
    # Keys of a pattern are regular expressions; alpha equal to the rank makes LoRA's scale 1.
    pattern = {} if uniform_rank else {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=sorted(updates),
        fan_in_fan_out=any(isinstance(target.module, Conv1D) for target in targets),
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    )
    with replaced_folder(folder) as work:
        config.save_pretrained(str(work))
        write_tensors(work / ADAPTER_WEIGHTS_NAME, tensors, {})
