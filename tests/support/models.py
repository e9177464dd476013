"""Tiny random models of several architectures, and a tokenizer made on the spot: no test downloads anything."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import hf_mend
from hf_mend import EditorConfig, EditRecord
from hf_mend.config import config_class


VOCAB = 160


CAUSAL = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "max_position_embeddings": 64},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
}  # fmt: skip


SEQ2SEQ = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
             "max_position_embeddings": 64, "decoder_start_token_id": 2},
}  # fmt: skip


ARCHITECTURES = [*CAUSAL, *SEQ2SEQ]


RECORDS = [
    EditRecord(
        f"the capital of {country} is",
        f"{city} town",
        [f"{country} has the capital", f"the seat of {country} is"],
        [f"the capital of {other} is", f"the river of {other} is"],
        [("what is the colour of grass?", "green grass")],
        relation="capital",
        id=str(i),
    )
    for i, (country, city, other) in enumerate(
        [
            ("france", "rome", "spain"),
            ("italy", "paris", "peru"),
            ("spain", "lima", "japan"),
            ("peru", "tokyo", "kenya"),
            ("japan", "cairo", "italy"),
            ("kenya", "madrid", "france"),
            ("the far north", "oslo", "peru"),
            ("egypt", "nairobi", "spain"),
        ]
    )
]


def build_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose weights are large enough that positions and tokens matter."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(architecture, **settings, **{**CAUSAL, **SEQ2SEQ}[architecture])
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSeq2SeqLM
    return initialize(auto.from_config(config).eval())


def initialize(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that are large enough that positions and tokens matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.02)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    texts = [text for r in RECORDS for text in (r.prompt, r.target, *r.paraphrases, *r.neighborhood)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def fitting(method: str = "mend", **options: object) -> dict[str, object]:
    """Those of the options that the method has."""
    names = {item.name for item in fields(config_class(method))}
    return {name: value for name, value in options.items() if name in names}


def small_config(method: str = "mend", **options: object) -> EditorConfig:
    values = {"target_modules": "paper", "layers_to_transform": [1, 2], **fitting(method, rank=8), **options}
    return EditorConfig(method, **values)


class EditableModel(hf_mend.EditableModel):
    """
    The library's, but an edit that does not take stays by default: most tests are about what edits do to these random
    models, whether they take or not.
    """

    def edit(self, *args: object, keep_failed: bool = True, **options: object):
        return super().edit(*args, keep_failed=keep_failed, **options)


def keep_failed_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library's own class keep edits that do not take, for code of documents that runs on random models."""
    edit = hf_mend.EditableModel.edit

    def keeping(self, *args, keep_failed=True, **options):
        return edit(self, *args, keep_failed=keep_failed, **options)

    monkeypatch.setattr(hf_mend.EditableModel, "edit", keeping)


def editable(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: object) -> EditableModel:
    """
    A model whose untrained editor edits: a plain gradient step, normalised factors left out.
    """
    torch.manual_seed(1)
    method = str(options.get("method", "mend"))
    plain = {"normalize": False, "whiten": False, "edit_lr": 0.3}
    return EditableModel(base, small_config(**{**fitting(method, **plain), **options}), tokenizer).eval()


def probability(model, prompt, target) -> float:
    """Of a target after a prompt, by one ordinary forward pass over the whole text: the oracle of results."""
    encoder = model.encoder
    ids, answer = (
        encoder.tokenizer(prompt)["input_ids"],
        encoder.tokenizer(target if encoder.is_encoder_decoder else " " + target, add_special_tokens=False)[
            "input_ids"
        ],
    )
    with torch.no_grad():
        if encoder.is_encoder_decoder:
            decoder = torch.tensor([[encoder.decoder_start_token_id, *answer[:-1]]])
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits[0]
        else:
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().exp())


def all_logits(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    text: str = "the capital of peru is",
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """On the CPU, whatever the device that the model takes its inputs on."""
    inputs = dict(tokenizer(text, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, 5, 9]])
    with torch.no_grad():
        return model(**{name: values.to(device) for name, values in inputs.items()}).logits.cpu()
