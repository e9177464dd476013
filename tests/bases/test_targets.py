"""Which layers an editor changes, against the names that a person would write down."""

from __future__ import annotations

import pytest
import torch
from support.models import RECORDS, build_model, small_config

from hf_mend import EditorConfig
from hf_mend.bases.targets import block_lists, find_targets, mlp_layers


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
