"""Quantised bases: edits sit beside the quantised weight in full precision."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.models import (
    CAUSAL,
    RECORDS,
    SEQ2SEQ,
    VOCAB,
    EditableModel,
    all_logits,
    build_model,
    editable,
    initialize,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, TorchAoConfig


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "t5": {"d_model": 64, "d_ff": 128}}


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install hf_mend[quantization]")


def quantization(name: str):
    if name == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantized(architecture: str, name: str, folder):
    """A model saved in float32 and loaded quantised; widths are multiples of what the quantisers' blocks want."""
    base = wide(architecture)
    base.save_pretrained(folder)
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSeq2SeqLM
    return auto.from_pretrained(folder, quantization_config=quantization(name), device_map="cpu")


def wide(architecture: str):
    torch.manual_seed(0)
    settings = {**CAUSAL, **SEQ2SEQ}[architecture] | SIZES[architecture]
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSeq2SeqLM
    return initialize(auto.from_config(config).eval())


def stored(base) -> dict[str, torch.Tensor]:
    """Copies of the plain tensors among the weights."""
    return {name: value.data.clone() for name, value in base.named_parameters() if type(value.data) is torch.Tensor}


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bnb-4bit", marks=needs("bitsandbytes")),
        pytest.param("bnb-8bit", marks=needs("bitsandbytes")),
        pytest.param("torchao-int8", marks=needs("torchao")),
    ],
)
def test_edit_undo_save_and_load_beside_a_quantised_weight(tokenizer, tmp_path, architecture, name):
    base = quantized(architecture, name, tmp_path / "base")
    weights = stored(base)
    model = editable(base, tokenizer)
    before = all_logits(model, tokenizer)
    result = model.edit(PROMPT, TARGET, max_steps=2)
    edited = all_logits(model, tokenizer)
    assert result.probability_after > result.probability_before
    assert {side.dtype for pair in model.edits[0].updates.values() for side in pair} == {torch.float32}
    model.save_pretrained(tmp_path / "editor")
    model.save_edits(tmp_path / "edits")
    with pytest.raises(TypeError, match="an edit cannot be merged into it.*save_lora.*unquantised"):
        model.merge_and_unload()
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before)
    again = EditableModel.from_pretrained(base, tmp_path / "editor", tokenizer)
    again.load_edits(tmp_path / "edits")
    assert torch.equal(all_logits(again, tokenizer), edited)
    after = stored(base)
    assert weights and all(torch.equal(value, after[key]) for key, value in weights.items())


@needs("bitsandbytes")
def test_a_base_that_ran_before_it_was_wrapped(tokenizer, tmp_path):
    base = quantized("llama", "bnb-4bit", tmp_path)
    with torch.no_grad():  # on some CPUs this packs the weights for a kernel without a gradient
        base(input_ids=torch.tensor([[5, 6, 7]]))
    result = editable(base, tokenizer).edit(PROMPT, TARGET, max_steps=2)
    assert result.probability_after > result.probability_before


class PackedLinear(nn.Module):
    """A quantiser's layer that is no `nn.Linear`: eight-bit integers and scales, as those of AWQ and GPTQ."""

    names = ("in_features", "out_features")

    def __init__(self, layer: nn.Linear):
        super().__init__()
        for name, width in zip(self.names, (layer.in_features, layer.out_features), strict=True):
            setattr(self, name, width)
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (layer.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def dequantized(self) -> torch.Tensor:
        return self.qweight.float() * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantized())


class OldPackedLinear(PackedLinear):
    names = ("infeatures", "outfeatures")


class WithoutGradient(PackedLinear):
    """For a kernel that has no backward pass."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class WithoutWidths(PackedLinear):
    names = ("columns", "rows")


class InInferenceMode(PackedLinear):
    """As AWQ's layers on GPUs: their kernel has a backward pass, which they use in training mode alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(not self.training):
            return super().forward(x)


class PackedAtFirstPass(PackedLinear):
    """As GPT-QModel's layers on CPUs: a first pass without a gradient takes a kernel that has no backward pass."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        self.linear_mode: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.linear_mode is None:
            self.linear_mode = "train" if x.requires_grad else "inference"
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.linear_mode == "train"):
            return super().forward(x)


def hqq(layer: nn.Linear) -> nn.Module:
    """A layer of the package hqq itself, which runs on a CPU."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(layer, BaseQuantizeConfig(nbits=4, group_size=16), compute_dtype=torch.float32, device="cpu")


def gptq(layer: nn.Linear) -> nn.Module:
    """A layer of the package gptqmodel, as it holds GPTQ's weights on any device."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    scales = layer.weight.detach().unflatten(1, (-1, 16)).abs().amax(-1) / 7  # (d_out, groups)
    return _of_gptqmodel(TorchLinear, layer, scales, torch.full_like(scales, 8), symmetric=True)


def awq(layer: nn.Linear) -> nn.Module:
    """A layer of the package gptqmodel, as it holds AWQ's weights on any device."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    groups = layer.weight.detach().unflatten(1, (-1, 16))
    scales = (groups.amax(-1) - groups.amin(-1)) / 15
    return _of_gptqmodel(AwqTorchLinear, layer, scales, (-groups.amin(-1) / scales).round(), symmetric=False)


def _of_gptqmodel(kind, layer: nn.Linear, scales: torch.Tensor, zeros: torch.Tensor, symmetric: bool) -> nn.Module:
    widths = {"in_features": layer.in_features, "out_features": layer.out_features}
    options = {"bits": 4, "group_size": 16, "desc_act": False, "sym": symmetric, "register_buffers": True}
    packed = kind(**widths, **options)
    packed.pack(layer, scales, zeros, torch.arange(layer.in_features) // 16)
    packed.optimized = True  # not compiled
    packed.post_init()
    return packed.eval()


def values_of(layer) -> torch.Tensor:
    """The weight that a quantiser's layer stands for."""
    if isinstance(layer, PackedLinear):
        return layer.dequantized()
    return layer(torch.eye(layer.in_features)).T.float().contiguous()


OF_PACKAGES = {hqq: "hqq", gptq: "gptqmodel", awq: "gptqmodel"}


@torch.no_grad()
def packed(kind):
    """A model whose blocks hold a quantiser's layers, and the plain model of the same values."""
    if kind in OF_PACKAGES:
        package = OF_PACKAGES[kind]
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    base, plain = (wide("llama") if kind in OF_PACKAGES else build_model("llama") for _ in range(2))
    for name, layer in list(base.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            replaced = kind(layer)
            base.model.layers.set_submodule(name, replaced)
            plain.model.layers.get_submodule(name).weight.data = values_of(replaced)
    return base, plain


@pytest.mark.parametrize("kind", [PackedLinear, OldPackedLinear, InInferenceMode, PackedAtFirstPass, hqq, gptq, awq])
def test_a_quantisers_own_layers_are_edited_as_plain_ones_of_the_same_values(tokenizer, tmp_path, kind):
    base, plain = packed(kind)
    ours, theirs = editable(base, tokenizer), editable(plain, tokenizer)
    before = all_logits(ours, tokenizer)
    # GPT-QModel's layers compute AWQ in float16.
    near = {"rtol": 2e-2, "atol": 2e-2} if kind in (gptq, awq) else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(before, all_logits(theirs, tokenizer), **near)
    steps = [model.edit(PROMPT, TARGET, max_steps=2).steps for model in (ours, theirs)]
    assert steps[0] == steps[1]
    edited = all_logits(ours, tokenizer)
    assert not torch.equal(edited, before)
    torch.testing.assert_close(edited, all_logits(theirs, tokenizer), **near)
    ours.save_edits(tmp_path / "edits")
    ours.save_lora(tmp_path / "lora")
    name = type(ours.targets[0].module).__name__
    with pytest.raises(TypeError, match=rf"a {name} has no plain weight.*save_lora.*unquantised"):
        ours.merge_and_unload()
    assert torch.equal(all_logits(ours, tokenizer), edited)
    ours.undo()
    assert torch.equal(all_logits(ours, tokenizer), before)
    ours.load_edits(tmp_path / "edits")
    assert torch.equal(all_logits(ours, tokenizer), edited)
    theirs.undo()
    theirs.load_lora(tmp_path / "lora")
    torch.testing.assert_close(all_logits(theirs, tokenizer), edited, **near)


def test_calibration_and_placement_of_a_quantisers_own_layers(tokenizer):
    model = EditableModel(packed(PackedLinear)[0], tokenizer=tokenizer)
    assert model.edit_device == torch.device("cpu")
    result = model.edit(PROMPT, TARGET)
    assert result.probability_after > result.probability_before


def test_a_layer_that_drops_the_gradient_is_refused_though_others_come_past_it(tokenizer):
    base = build_model("llama")
    upper = base.model.layers[3].mlp
    upper.down_proj = WithoutGradient(upper.down_proj)
    model = editable(base, tokenizer)
    with pytest.raises(ValueError, match=r"through the layer 'model.layers.3.mlp.down_proj', a WithoutGradient.*back"):
        model.edit(PROMPT, TARGET)
    assert model.edits == []


def test_a_layer_that_is_packed_before_it_is_wrapped_says_what_to_do(tokenizer):
    base, _ = packed(PackedAtFirstPass)
    with torch.no_grad():
        base(input_ids=torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="at their first pass: load the base model anew and make it editable before"):
        editable(base, tokenizer).edit(PROMPT, TARGET)


def test_layers_that_state_no_widths_are_refused_by_name(tokenizer):
    base = build_model("llama")
    for name, layer in list(base.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            base.model.layers.set_submodule(name, WithoutWidths(layer))
    with pytest.raises(ValueError, match=r"nothing to edit: its blocks hold \[.*'WithoutWidths'\].*quantisation"):
        EditableModel(base, tokenizer=tokenizer)


def test_layers_that_were_placed_by_the_alphabet_are_chosen_as_their_class_defines_them(tokenizer):
    base, plain = packed(PackedLinear)
    for module in base.model.layers.modules():  # as optimum places GPTQ's
        for name in sorted(name for name, child in module.named_children() if isinstance(child, PackedLinear)):
            module._modules[name] = module._modules.pop(name)
    assert [*base.model.layers[0].mlp._modules] == ["act_fn", "down_proj", "gate_proj", "up_proj"]
    for chosen in ("default", "paper", "all-linear"):
        of_both = [editable(one, tokenizer, target_modules=chosen).targets for one in (base, plain)]
        assert [target.name for target in of_both[0]] == [target.name for target in of_both[1]]
