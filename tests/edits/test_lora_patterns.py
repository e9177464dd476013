"""The patterns of an adapter's configuration: which value a layer gets, and what a stranger's may cost."""

from __future__ import annotations

import json
import re
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.models import editable

from hf_mend.edits.lora import _first_match


LAYERS = [f"model.layers.{index}.{module}" for index in range(12) for module in ("mlp.up_proj", "mlp.down_proj")]


def by_peft(pattern: dict[str, int], layer: str, default: int) -> int:
    """As `peft.utils.get_pattern_key` has it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


@pytest.mark.parametrize(
    "keys",
    [
        [r"model\.layers\.3\.mlp\.up_proj", "up_proj", r"layers\.4\.mlp\.down_proj", "down_proj"],
        ["model.layers.1.mlp.up_proj", "layers.1..mlp.up_proj", r"layers\.(3|5)\.mlp\.\w+", "proj", "up_proj"],
        ["up_proj", r"layers\.[0-5]\.mlp\.up_proj", ".*down_proj"],
        [r"layers\.[0-5]\.mlp\.up_proj", "up_proj", r"1\.mlp\.down_proj"],
        ["mlp.up_proj|down_proj", "up_proj"],
        [],
    ],
)
def test_the_first_key_that_the_end_of_a_name_matches(keys):
    pattern = {key: value for value, key in enumerate(keys, start=1)}
    value_of = _first_match(pattern, 99, "config")
    assert [value_of(layer) for layer in LAYERS] == [by_peft(pattern, layer, 99) for layer in LAYERS]


def adapter(folder: Path, model, **config: object) -> Path:
    """A plain adapter of rank 2 on a layer of the model."""
    folder.mkdir()
    target = model.targets[0]
    sides = {"A": torch.ones(2, target.d_in), "B": torch.ones(target.d_out, 2)}
    tensors = {f"base_model.model.{target.name}.lora_{side}.weight": value for side, value in sides.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["x"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "pattern",
    [
        {"(?:(?:(?:a){1000}){1000}){1000}": 2},
        {f"({'x' * 180}{index}|.*)_proj": 3 for index in range(1_500)},
        {f"layers.{index}.mlp.up_proj": 2 for index in range(10_001)},
        {"a" * 1_000_001: 2},
        {f"({'.?' * 200}){{{index}}}{'.*' * 100}": 2 for index in range(1, 100)},
    ],
)
def test_patterns_of_a_stranger_cost_little(llama, tokenizer, tmp_path, pattern):
    model = editable(llama, tokenizer)
    folder = adapter(tmp_path / "adapter", model, rank_pattern=pattern)
    begin = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        model.load_lora(folder)
    assert time.process_time() - begin < 12 and len(model.edits) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10  # kilobytes


def test_many_names_as_patterns(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    names = {f"model.layers.{index}.mlp.{kind}_proj": 3 for index in range(500) for kind in ("x", "y")}
    begin = time.process_time()
    model.load_lora(adapter(tmp_path / "adapter", model, rank_pattern=names, alpha_pattern=names))
    assert time.process_time() - begin < 5 and len(model.edits) == 1
