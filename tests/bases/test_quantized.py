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
    torch.manual_seed(0)
    settings = {**CAUSAL, **SEQ2SEQ}[architecture] | SIZES[architecture]
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSeq2SeqLM
    initialize(auto.from_config(config)).save_pretrained(folder)
    return auto.from_pretrained(folder, quantization_config=quantization(name), device_map="cpu")


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class WithoutWidths(PackedLinear):
    names = ("columns", "rows")


def hqq(layer: nn.Linear) -> nn.Module:
    """A layer of the package hqq itself, which runs on a CPU."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(layer, BaseQuantizeConfig(nbits=4, group_size=16), compute_dtype=torch.float32, device="cpu")


def packed(kind):
    """A model whose blocks hold a quantiser's layers, and the plain model of the same values."""
    base, plain = build_model("llama"), build_model("llama")
    for name, layer in list(base.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, own = name.rpartition(".")
            replaced = kind(layer)
            setattr(base.model.layers.get_submodule(parent), own, replaced)
            values = replaced.dequantize() if kind is hqq else replaced.dequantized()
            plain.model.layers.get_submodule(name).weight.data = values.float()
    return base, plain


@pytest.mark.parametrize("kind", [PackedLinear, OldPackedLinear, hqq])
def test_a_quantisers_own_layers_are_edited_as_plain_ones_of_the_same_values(tokenizer, tmp_path, kind):
    if kind is hqq:
        pytest.importorskip("hqq", reason="hqq is not installed: pip install hqq")
    base, plain = packed(kind)
    ours, theirs = editable(base, tokenizer), editable(plain, tokenizer)
    before = all_logits(ours, tokenizer)
    torch.testing.assert_close(before, all_logits(theirs, tokenizer))
    for model in (ours, theirs):
        assert model.edit(PROMPT, TARGET, max_steps=2).steps == 2
    edited = all_logits(ours, tokenizer)
    assert not torch.equal(edited, before)
    torch.testing.assert_close(edited, all_logits(theirs, tokenizer), rtol=1e-4, atol=1e-5)
    ours.save_edits(tmp_path / "edits")
    ours.save_lora(tmp_path / "lora")
    with pytest.raises(TypeError, match=rf"a {'HQQLinear' if kind is hqq else kind.__name__} has no plain weight.*save_lora.*unquantised"):
        ours.merge_and_unload()
    assert torch.equal(all_logits(ours, tokenizer), edited)
    ours.undo()
    assert torch.equal(all_logits(ours, tokenizer), before)
    ours.load_edits(tmp_path / "edits")
    assert torch.equal(all_logits(ours, tokenizer), edited)
    theirs.undo()
    theirs.load_lora(tmp_path / "lora")
    torch.testing.assert_close(all_logits(theirs, tokenizer), edited, rtol=1e-4, atol=1e-5)


def test_calibration_and_placement_of_a_quantisers_own_layers(tokenizer):
    model = EditableModel(packed(PackedLinear)[0], tokenizer=tokenizer)
    assert model.edit_device == torch.device("cpu")
    result = model.edit(PROMPT, TARGET)
    assert result.probability_after > result.probability_before


def test_layers_that_pass_no_gradient_or_state_no_widths_are_refused_by_name(tokenizer):
    model = editable(packed(WithoutGradient)[0], tokenizer)
    with pytest.raises(ValueError, match="no gradient reaches the layer .*another quantisation"):
        model.edit(PROMPT, TARGET)
    with pytest.raises(ValueError, match=r"nothing to edit: its blocks hold \[.*'WithoutWidths'\].*quantisation"):
        EditableModel(packed(WithoutWidths)[0], tokenizer=tokenizer)
