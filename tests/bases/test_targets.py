"""Which layers an editor changes, against the names that a person would write down."""

from __future__ import annotations

import pytest
import torch
from support.models import RECORDS, EditableModel, all_logits, build_model, initialize, small_config
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, EncoderDecoderConfig, EncoderDecoderModel

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


def test_all_linear_is_every_linear_layer_of_the_blocks_as_in_peft(llama):
    from peft import LoraConfig, get_peft_model

    own = find_targets(llama, EditorConfig(target_modules="all-linear"))
    names = {target.name for target in own}
    tuned = get_peft_model(llama, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {name.removesuffix(".lora_A") for name, _ in tuned.base_model.model.named_modules() if "lora_A" in name}
    assert names == {name.partition(".lora_A")[0] for name in theirs} and len(own) == len(names) == 4 * 7
    few = find_targets(build_model("llama"), EditorConfig(target_modules="all-linear", layers_to_transform=[1]))
    assert {target.block for target in few} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": "o_proj"},
            r"linear layers named .*self_attn.o_proj.*; a string is a regular expression for whole names: "
            r"give the list \['o_proj'\] for that name",
        ),
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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # What chooses, scales or shifts is never an MLP's, at any depth of its name.
        (["self_attn.q_proj", "self_attn.o_proj", "mlp.router.layer", "mlp.gate.down.fc"], ["self_attn.o_proj"]),
        (["self_attn.o_proj", "self_attn.relative_position_bias.linear", "self_attn.gate_proj",
          "mlp_message_gate.message_gate_proj"], ["self_attn.o_proj"]),
        (["input_layernorm.mlp.fc2", "attn.o", "mlp.up", "ada_norm.linear"], ["mlp.up"]),
        # DBRX's attention lies between its norms.
        (["norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj", "ffn.router.layer"],
         ["norm_attn_norm.attn.out_proj"]),
        # Of many experts a token sees few.
        (["attn.o", "ffn.experts.expert_0.fc1", "ffn.experts.expert_1.fc2", "ffn.router.classifier"], ["attn.o"]),
        # A mixer and its small projections stand behind an MLP, wherever they are defined, and for themselves alone.
        (["feed_forward.up_proj", "feed_forward.down_proj", "mamba.in_proj", "mamba.out_proj"],
         ["feed_forward.up_proj", "feed_forward.down_proj"]),
        (["mixer.in_proj", "mixer.out_proj"], ["mixer.in_proj", "mixer.out_proj"]),
        (["intermediate.dense", "output.dense", "output.adapter_modules.en.dense"],
         ["intermediate.dense", "output.dense"]),
        (["mlp.gate"], []),
    ],
)  # fmt: skip
def test_the_layers_of_unusual_blocks(names, expected):
    assert mlp_layers(block(*names)) == expected


def wide_block(**widths: tuple[int, int]) -> torch.nn.Module:
    """A block with an MLP of layers of these widths."""
    return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({k: torch.nn.Linear(*v) for k, v in widths.items()})})


def test_the_default_is_the_matrix_back_to_the_hidden_width_wherever_it_is_defined():
    blocks = torch.nn.ModuleList([wide_block(gate_proj=(4, 6), down_proj=(6, 4), up_proj=(4, 6)) for _ in range(4)])
    model = torch.nn.ModuleDict({"layers": blocks})
    assert [t.name for t in find_targets(model, EditorConfig())] == ["layers.2.mlp.down_proj"]


CAUSAL_CONFIGS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 160,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "settings", "layer"),
    [
        ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, "model.layers.2.mlp.experts"),
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
         "model.layers.2.self_attention.kv_proj"),
        ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
                       "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16},
         "model.layers.2.feed_forward.down_proj"),
        ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
                   "mamba_expand": 2, "mamba_chunk_size": 16, "attn_layer_indices": [1]},
         "model.layers.2.feed_forward.down_proj"),
        ("mamba", {"state_size": 8, "time_step_rank": 4}, "backbone.layers.2.mixer.out_proj"),
        ("bert", {"is_decoder": True}, "bert.encoder.layer.2.output.dense"),
    ],
)  # fmt: skip
def test_mixtures_and_hybrids_are_edited_in_their_default_layer(tokenizer, model_type, settings, layer):
    config = AutoConfig.for_model(model_type, **{**CAUSAL_CONFIGS, **settings})
    torch.manual_seed(0)
    model = EditableModel(initialize(AutoModelForCausalLM.from_config(config).eval()), tokenizer=tokenizer)
    assert [(target.name, target.side) for target in model.targets] == [(layer, "decoder")]
    plain = all_logits(model, tokenizer)
    result = model.edit(RECORDS[0].prompt, RECORDS[0].target)
    assert result.probability_after > result.probability_before
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)


def test_a_decoder_made_of_a_bert_is_the_decoder(tokenizer):
    sizes = {key: value for key, value in CAUSAL_CONFIGS.items() if key != "num_key_value_heads"}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**sizes), BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = EditableModel(initialize(EncoderDecoderModel(config=config).eval()), tokenizer=tokenizer)
    assert [(target.side, target.name) for target in model.targets] == [
        ("encoder", "encoder.encoder.layer.2.output.dense"), ("decoder", "decoder.bert.encoder.layer.2.output.dense"),
    ]  # fmt: skip
    result = model.edit(RECORDS[0].prompt, RECORDS[0].target)
    assert result.probability_after > result.probability_before


def test_of_several_lists_the_one_with_the_most_weights_is_chosen():
    model = torch.nn.ModuleDict({"small": tower(5), "layers": tower(8), "projections": tower(2)})
    assert [one.name for one in block_lists(model)] == ["layers"]
    model = torch.nn.ModuleDict({"tower": torch.nn.ModuleDict({"layers": tower(9)}), "layers": tower(8)})
    assert [one.name for one in block_lists(model)] == ["layers"]
