"""Models that read text beside images or sound: text edits change the text's blocks, with or without an image."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.gradients import autograd_gradients, encoder_for, queries
from support.models import RECORDS, VOCAB, EditableModel, all_logits, build_model, editable
from support.multimodal import CONFIGS, beside, build

from hf_mend.bases.gradients import trace
from hf_mend.bases.split import SplitModel


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


@pytest.fixture(params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def logits_beside(name: str, model) -> torch.Tensor:
    """Logits of a prompt with an image or sound in it."""
    with torch.no_grad():
        return model(**beside(name, getattr(model, "base_model", model))).logits


@pytest.mark.parametrize("choice", ["default", "paper"])
def test_only_blocks_that_read_text_are_edited_and_the_factors_are_autograds(name, tokenizer, choice, caplog):
    base = build(name)
    targets = editable(base, tokenizer, target_modules=choice).targets
    names = [target.name for target in targets]
    assert names and all(".mlp." in one and ("language_model" in one or "text_model" in one) for one in names)
    rows = encoder_for(base, tokenizer)(queries())
    expected = autograd_gradients(base, targets, rows)
    factors, _ = trace(SplitModel(base, targets), targets, rows.inputs, rows.next_tokens)
    for one in names:
        x, delta = factors[one]
        torch.testing.assert_close(torch.einsum("bto,bti->oi", delta, x), expected[one], rtol=1e-3, atol=1e-5)
    assert [r for r in caplog.records if r.name.startswith("hf_mend")] == [], "the shortcut is used"


def test_an_edit_holds_beside_an_image_and_in_every_form(name, tokenizer, tmp_path):
    model = editable(build(name), tokenizer)
    plain, plain_beside = all_logits(model, tokenizer), logits_beside(name, model)
    result = model.edit(PROMPT, TARGET, max_steps=4)
    assert result.probability_after > result.probability_before
    edited, edited_beside = all_logits(model, tokenizer), logits_beside(name, model)
    assert not torch.equal(edited, plain) and not torch.equal(edited_beside, plain_beside)
    model.save_lora(tmp_path)
    peft = PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    torch.testing.assert_close(all_logits(peft, tokenizer), edited, rtol=1e-3, atol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(all_logits(merged, tokenizer), edited, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits_beside(name, merged), edited_beside, rtol=1e-3, atol=1e-4)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)
    assert torch.equal(logits_beside(name, model), plain_beside)
    model.load_lora(tmp_path)
    assert torch.equal(logits_beside(name, model), edited_beside)


OLD_NAMES = {
    "Gemma3": ("language_model.model.", "model.language_model."),
    "Qwen2VL": ("model.", "model.language_model."),
    "Qwen2Audio": ("language_model.model.", "model.language_model."),
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_adapters_by_the_names_of_earlier_versions_of_transformers(name, tokenizer, tmp_path):
    model = editable(build(name), tokenizer)
    model.edit(PROMPT, TARGET, max_steps=2)
    edited = logits_beside(name, model)
    model.save_lora(tmp_path)
    model.undo_all()
    old, new = OLD_NAMES[name]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        weights = tmp_path / file
        if file.endswith("json"):
            weights.write_text(weights.read_text().replace(new, old))
        else:
            tensors = {key.replace(new, old): tensor for key, tensor in load_file(weights).items()}
            save_file(tensors, weights)  # and without the note of the edits, as it would be from elsewhere
    (edit,) = model.load_lora(tmp_path)
    assert set(edit.updates) == {target.name for target in model.targets}
    torch.testing.assert_close(logits_beside(name, model), edited, rtol=1e-4, atol=1e-4)


def test_a_new_model_needs_no_configuration(tokenizer):
    model = EditableModel(build("Gemma3"), tokenizer=tokenizer)
    assert [target.name for target in model.targets] == ["model.language_model.layers.2.mlp.down_proj"]
    result = model.edit(PROMPT, TARGET)
    assert result.probability_after > result.probability_before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.AutoModel.from_config(build_model("llama").config), "LlamaModel has no language head"),
        (
            lambda: transformers.AutoModelForSequenceClassification.from_config(build_model("llama").config),
            "has no language head, .* AutoModelForCausalLM",
        ),
        (
            lambda: transformers.BlipForConditionalGeneration(
                transformers.BlipConfig(
                    text_config={"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                                 "intermediate_size": 8, "num_attention_heads": 4},
                    vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                   "intermediate_size": 8, "image_size": 28, "patch_size": 14},
                )
            ),
            "needs pixel_values, not text alone",
        ),
        (
            lambda: transformers.WhisperForConditionalGeneration(
                transformers.WhisperConfig(
                    vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2, decoder_start_token_id=1,
                )
            ),
            "needs input_features, not text alone",
        ),
        (
            lambda: transformers.FSMTForConditionalGeneration(
                transformers.FSMTConfig(
                    src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
                    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8,
                )
            ),
            "makes its logits with its embedding",
        ),
    ],
    ids=["no head", "classifier", "captions", "speech", "no output layer"],
)  # fmt: skip
def test_what_does_not_go_from_text_to_text_is_refused_and_left_as_it_was(make, message):
    base = make().train()
    trained = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(ValueError, match=message):
        EditableModel(base)
    assert base.training and [parameter.requires_grad for parameter in base.parameters()] == trained
