"""Which layers an editor changes, against the names that a person would write down."""

from __future__ import annotations

import pytest
import torch
from support.models import RECORDS, build_model, small_config

from hf_mend import EditorConfig
from hf_mend.bases.targets import block_lists, find_targets, lowest_block, mlp_layers, named_layers


def test_the_papers_choice_is_every_mlp_weight_of_the_last_blocks(base, architecture):
    targets = find_targets(base, EditorConfig(target_modules="paper"))
    lists = block_lists(base)
    last = 2 if len(lists) == 2 else 3
    assert [s.kind for s in lists] == (["encoder", "decoder"] if len(lists) == 2 else ["decoder"])
    for block_list in lists:
        chosen = [t for t in targets if t.side == block_list.kind]
        assert sorted({t.block for t in chosen}) == list(range(4 - last, 4))
        per_block = {"llama": 3}.get(architecture, 2)
        assert len(chosen) == last * per_block == last * len(mlp_layers(block_list.blocks[0]))
    for target in targets:
        weight = target.module.weight
        assert sorted(target.shape) == sorted(weight.shape)
        assert "attn" not in target.name.lower() and "attention" not in target.name.lower()


def test_the_default_choice_is_the_mlps_last_weight_of_some_blocks(base):
    targets = find_targets(base, EditorConfig())
    assert targets and all(t.name.endswith(tuple(mlp_layers(block_lists(base)[0].blocks[0])[-1:])) or
                           t.name.endswith(("wo", "fc2")) for t in targets)  # fmt: skip
    assert all(0 < t.block < 4 for t in targets)


def test_target_modules_follow_pefts_rules(llama):
    by_suffix = find_targets(llama, EditorConfig(target_modules=["down_proj"], layers_to_transform=[0, 3]))
    assert [t.name for t in by_suffix] == ["model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    by_pattern = find_targets(llama, EditorConfig(target_modules=r".*\.[12]\.self_attn\.(q|o)_proj"))
    assert [t.name.split("model.layers.")[1] for t in by_pattern] == [
        "1.self_attn.q_proj", "1.self_attn.o_proj", "2.self_attn.q_proj", "2.self_attn.o_proj",
    ]  # fmt: skip
    exact = find_targets(llama, EditorConfig(target_modules=["model.layers.2.mlp.up_proj"], layers_pattern="layers"))
    assert [t.block for t in exact] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["fc9"]}, r"matches no layer of LlamaForCausalLM; its blocks hold .*down_proj"),
        (
            {"target_modules": ["input_layernorm"]},
            r"matches 'model.layers.0.input_layernorm', a LlamaRMSNorm, which is not",
        ),
        ({"layers_to_transform": [99]}, r"layers_to_transform=\[99\] matches no layer"),
        ({"layers_pattern": "h"}, r"layers_pattern='h' names no list of blocks; the model has \['model.layers'\]"),
    ],
)
def test_target_modules_that_match_nothing_or_what_cannot_be_edited(llama, options, message):
    with pytest.raises(ValueError, match=message):
        find_targets(llama, EditorConfig(**options))


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match="no list of transformer blocks"):
        block_lists(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_attention_weights_can_be_edited_too(llama, tokenizer):
    from hf_mend import get_editable_model

    model = get_editable_model(
        llama, small_config(target_modules=["o_proj"], normalize=False, whiten=False), tokenizer
    )
    model.editor.scale_steps(300.0)
    result = model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1)
    assert result.probability_after > result.probability_before
    assert build_model("llama").config.num_hidden_layers == 4


def block(*names: str) -> torch.nn.Module:
    """A block with a linear layer of each name, and a norm."""
    found = torch.nn.Module()
    for name in [*names, "norm"]:
        parent = found
        *outer, last = name.split(".")
        for part in outer:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.LayerNorm(2) if name == "norm" else torch.nn.Linear(2, 3))
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"], ["mlp.up_proj", "mlp.down_proj"]),
        (["SelfAttention.q", "EncDecAttention.o", "DenseReluDense.wi", "DenseReluDense.wo"],
         ["DenseReluDense.wi", "DenseReluDense.wo"]),
        # Routers and gates of experts choose, and must never be edited; a gated MLP's `gate_proj` is no router.
        (["attention.o", "mlp.gate", "mlp.router", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj",
          "mlp.shared_expert.down_proj"], ["mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj"]),
        # Experts without linear layers: the attention's output projection is left.
        (["self_attn.q_proj", "self_attn.o_proj"], ["self_attn.o_proj"]),
    ],
)  # fmt: skip
def test_the_layers_of_a_blocks_mlp(names, expected):
    assert mlp_layers(block(*names)) == expected


def tower(depth: int) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(block("attn.o", "mlp.up", "mlp.down") for _ in range(depth))


@pytest.mark.parametrize(
    ("depth", "blocks"), [(1, [0]), (2, [1]), (4, [2]), (6, [3, 4]), (12, [7, 8]), (24, list(range(14, 18)))]
)
def test_the_default_blocks_of_a_model_of_any_depth(depth, blocks):
    """From 0.567 to 0.767 of the depth, rounded, and one block at least."""
    model = torch.nn.ModuleDict({"layers": tower(depth)})
    assert [t.name for t in find_targets(model, EditorConfig())] == [f"layers.{i}.mlp.down" for i in blocks]


def test_an_encoder_is_run_before_the_decoder_wherever_it_stands():
    model = torch.nn.ModuleDict(
        {"decoder": torch.nn.ModuleDict({"layers": tower(3)}), "encoder": torch.nn.ModuleDict({"layers": tower(4)}),
         "heads": torch.nn.ModuleList([torch.nn.LayerNorm(2)])}
    )  # fmt: skip
    assert [(one.kind, one.name) for one in block_lists(model)] == [
        ("encoder", "encoder.layers"), ("decoder", "decoder.layers"),
    ]  # fmt: skip
    paper = find_targets(model, EditorConfig(target_modules="paper"))
    assert [t.name for t in paper] == [
        f"{side}.layers.{i}.mlp.{name}"
        for side, blocks in (("encoder", (2, 3)), ("decoder", (1, 2)))
        for i in blocks
        for name in ("up", "down")
    ]
    assert lowest_block(paper[::-1]) == ("encoder", 2) and lowest_block(paper[-3:]) == ("decoder", 1)
    assert [t.shape for t in paper] == [(3, 2)] * 8


def test_layers_are_found_by_name_in_a_block_or_not(llama):
    found = named_layers(llama, ["lm_head", "model.layers.3.mlp.up_proj", "model.norm", "up_proj"])
    assert [(t.name, t.shape) for t in found] == [("model.layers.3.mlp.up_proj", (48, 32)), ("lm_head", (160, 32))]
    assert named_layers(llama, []) == []
