"""Limits of a base: how many tokens it takes, and which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.architectures import build
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, make_tokenizer
from support.training import QUESTIONS, fresh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    EncoderDecoderConfig,
    Gemma3Config,
    PreTrainedModel,
)

from hf_mend.bases.limits import longest_input
from hf_mend.data.encoding import Query
from hf_mend.training.continuations import with_continuations
from hf_mend.training.examples import TrainingExamples


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160,
}  # fmt: skip
BEHIND_PADDING = ["camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"]
LISTED = ["gpt2", "opt", "mpt", "bart", "led"]


def decoder(model_type: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type, **{**SIZES, "max_position_embeddings": 34, "is_decoder": True, "pad_token_id": 1, **settings}
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", [*BEHIND_PADDING, "bert", "electra", *LISTED])
def test_a_text_of_the_longest_length_is_the_longest_that_the_model_takes(model_type):
    model = build(model_type) if model_type in LISTED else decoder(model_type)
    longest = longest_input(model.config)
    assert longest is not None
    ids = torch.full((1, longest), 7)
    rest = {"decoder_input_ids": ids[:, :1]} if model.config.is_encoder_decoder else {}
    model(input_ids=ids, **rest)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 7), **rest)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (AutoConfig.for_model("xlnet"), None),
        (AutoConfig.for_model("bloom"), None),
        (AutoConfig.for_model("t5"), None),
        (AutoConfig.for_model("llama", max_position_embeddings=99), 99),
        (AutoConfig.for_model("mpt", max_seq_len=77), 77),
        (AutoConfig.for_model("gpt2", n_positions=55), 55),
        (Gemma3Config(text_config={"max_position_embeddings": 66}), 66),
        (EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(max_position_embeddings=44), BertConfig()), 44),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_where_configurations_state_it(config, longest):
    assert longest_input(config) == longest


def test_a_text_past_the_positions_behind_the_padding_is_refused_before_the_model_runs(tokenizer):
    model = editable(decoder("roberta"), tokenizer, layers_to_transform=[1])
    outcomes = set()
    for repeats in range(4, 9):
        prompt = " ".join(["the capital of peru is"] * repeats)
        tokens = sum(map(len, model.encoder.tokens(Query(prompt, "lima"))))
        outcomes.add(tokens <= 32)
        if tokens <= 32:
            assert model.edit(prompt, "lima", max_steps=1, force=True).steps == 1
        else:
            with pytest.raises(ValueError, match=f"has {tokens} tokens with its target, the model takes 32"):
                model.edit(prompt, "lima")
    assert outcomes == {True, False}


def test_a_base_without_a_limit_is_edited(tokenizer):
    config = AutoConfig.for_model("xlnet", vocab_size=160, d_model=32, n_layer=4, n_head=4, d_inner=48)
    torch.manual_seed(0)
    model = EditableModel(AutoModelForCausalLM.from_config(config).eval(), tokenizer=tokenizer)
    assert config.max_position_embeddings == -1 and model.edit(RECORDS[0].prompt, RECORDS[0].target).steps > 0


def test_rows_of_a_batch_are_not_mixed_up_where_blocks_run_with_tokens_before_rows(tokenizer):
    config = AutoConfig.for_model("xlnet", vocab_size=160, d_model=32, n_layer=4, n_head=4, d_inner=48)
    torch.manual_seed(0)
    model = editable(AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    prompts, targets = [record.prompt for record in RECORDS[:2]], [record.target for record in RECORDS[:2]]
    with pytest.raises(ValueError, match="tokens before rows.* edit with batch_size=1"):
        model.edit(prompts, targets, force=True)
    with model.edited(prompts, targets, batch_size=1, max_steps=1, check=False, force=True):
        together = [edit.updates for edit in model.edits[-2:]]
    for prompt, target, updates in zip(prompts, targets, together, strict=True):
        with model.edited(prompt, target, max_steps=1, check=False, force=True):
            for name, pair in model.edits[-1].updates.items():
                torch.testing.assert_close(pair, updates[name])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bart"])
def test_a_pad_token_past_the_embedding_is_masked_padding(architecture):
    tokenizer = make_tokenizer()
    alone = editable(build_model(architecture), tokenizer)
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.add_tokens([f"[{i}]" for i in range(160)])
    padded.pad_token = "[100]"
    assert padded.pad_token_id >= 160
    beyond = editable(build_model(architecture), padded)
    prompts, targets = [r.prompt for r in RECORDS[:3]] + ["the river"], [r.target for r in RECORDS[:4]]
    for one in (alone, beyond):
        one.edit(prompts, targets, max_steps=1)
    torch.testing.assert_close(all_logits(beyond, tokenizer), all_logits(alone, tokenizer), rtol=1e-4, atol=1e-5)


def test_another_token_past_the_embedding_is_refused_by_name(llama):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"[{i}]" for i in range(160)])
    size, token = len(tokenizer), tokenizer.convert_tokens_to_ids("[150]")
    model = editable(llama, tokenizer)
    plain = all_logits(model, make_tokenizer())
    message = rf"holds the token '\[150\]' with the id {token}, .* embedding has 160 rows, the tokenizer {size} tokens"
    with pytest.raises(ValueError, match=message):
        model.edit(["the river is", "the capital [150] is"], ["lima", "rome"])
    with pytest.raises(ValueError, match=message):
        model.edit("the capital is", "[150]")
    assert model.edits == [] and torch.equal(all_logits(model, make_tokenizer()), plain)


def test_texts_that_leave_no_room_are_not_continued(tokenizer):
    model = fresh(tokenizer, "gpt2")
    examples = TrainingExamples(RECORDS, QUESTIONS, continuation_rows=1)
    with_continuations(examples, model, tokens=60, progress=False)
    assert examples.continuations == {}  # of 64 positions
    with_continuations(examples, model, tokens=8, progress=False)
    assert examples.continuations
