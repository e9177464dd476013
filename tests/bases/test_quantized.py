"""Quantised bases: edits sit beside the quantised weight in full precision."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.models import CAUSAL, RECORDS, SEQ2SEQ, VOCAB, all_logits, editable, initialize
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, TorchAoConfig

from hf_mend import EditableModel


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
