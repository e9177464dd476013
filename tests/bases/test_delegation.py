"""What libraries ask of a model is answered by the base model, under the edits."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import RECORDS, EditableModel, all_logits, build_model, editable
from transformers import GenerationConfig, PreTrainedModel, pipeline

from hf_mend import get_editable_model


PROMPT = RECORDS[0].prompt


def test_a_pipeline_generates_the_edited_text(llama, tokenizer, caplog):
    model = editable(llama, tokenizer)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    before = generator(PROMPT, **options)[0]["generated_text"]
    assert "is not supported" not in caplog.text
    assert model.edit(PROMPT, "rome", max_steps=60).success
    edited = generator(PROMPT, **options)[0]["generated_text"]
    assert "rome" in edited and "rome" not in before
    # The oracle is a plain model with the edit in its weights.
    merged = copy.deepcopy(model).merge_and_unload()
    plain = pipeline("text-generation", model=merged, tokenizer=tokenizer, device="cpu")
    assert plain(PROMPT, **options)[0]["generated_text"] == edited
    several = generator([PROMPT, "the capital of peru is"], batch_size=2, **options)
    assert several[0][0]["generated_text"] == edited
    assert "EditableModel" in repr(generator)
    with model.disable_edits():
        assert generator(PROMPT, **options)[0]["generated_text"] == before


def test_what_is_asked_of_a_model_is_the_base_models(base, tokenizer):
    model = editable(base, tokenizer)
    assert model.can_generate() is True
    assert model.generation_config is base.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=3)
    assert base.generation_config.max_new_tokens == 3
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.get_output_embeddings() is base.get_output_embeddings()
    assert model.get_decoder() is base.get_decoder() and model.get_encoder() is base.get_encoder()
    assert model.main_input_name == base.main_input_name == "input_ids"
    assert model.num_parameters() == base.num_parameters() and model.num_parameters(only_trainable=True) == 0
    assert model.num_parameters(exclude_embeddings=True) == base.num_parameters(exclude_embeddings=True)
    assert model.get_memory_footprint() == base.get_memory_footprint()
    assert (model.dtype, model.device, model.name_or_path) == (base.dtype, base.device, base.config.name_or_path)
    model.gradient_checkpointing_enable()
    assert base.is_gradient_checkpointing and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not base.is_gradient_checkpointing and not model.is_gradient_checkpointing
    model.add_model_tags(["edited"])
    assert "edited" in base.model_tags


def test_what_the_base_lacks_is_lacking(llama, tokenizer):
    model = editable(llama, tokenizer)
    assert not hasattr(model, "hf_device_map") and not hasattr(model, "no_such_name")
    assert getattr(model, "hf_device_map", None) is None
    llama.hf_device_map = {"": "cpu"}
    assert model.hf_device_map == {"": "cpu"}
    assert not isinstance(model, PreTrainedModel)


def test_a_vocabulary_keeps_its_size(llama, tokenizer):
    model = editable(llama, tokenizer)
    size = llama.config.vocab_size
    assert model.resize_token_embeddings(size) is model.resize_token_embeddings() is llama.get_input_embeddings()
    with pytest.raises(NotImplementedError, match=rf"cannot change from {size} to {size + 8} tokens.*resize the base"):
        model.resize_token_embeddings(size + 8)
    assert llama.get_input_embeddings().weight.shape[0] == size


def test_continuous_batching_is_refused(llama, tokenizer):
    """Its paged cache keeps nothing of a scope's, so edits would be missed without a word."""
    model = editable(llama, tokenizer)
    ids = [tokenizer(PROMPT)["input_ids"]]
    for inputs, options in [((ids,), {"max_new_tokens": 3}), ((), {"inputs": ids})]:
        with pytest.raises(NotImplementedError, match=r"generate_batch.*paged cache.*generate with padded batches"):
            model.generate_batch(*inputs, **options)
    with pytest.raises(NotImplementedError, match=r"base_model\.generate_batch .*without a scope.*unload\(\)"):
        model.generate_batch(ids)


def test_inputs_of_a_step_of_generation(tokenizer):
    model = editable(build_model("gpt2"), tokenizer)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    assert torch.equal(model.prepare_inputs_for_generation(ids)["input_ids"], ids)


def test_an_edited_model_assists_and_is_assisted(llama, tokenizer):
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = build_model("llama", seed=7)
    assistant = editable(llama, tokenizer)
    assistant.edit(PROMPT, "rome", max_steps=5)
    expected = plain.generate(ids, **options)
    assert torch.equal(plain.generate(ids, assistant_model=assistant, **options), expected)
    generator = pipeline("text-generation", model=plain, tokenizer=tokenizer, assistant_model=assistant)
    assert generator(PROMPT, return_tensors=True, **options)[0]["generated_token_ids"] == expected[0].tolist()
    edited = assistant.generate(ids, **options)
    assert torch.equal(assistant.generate(ids, assistant_model=assistant, **options), edited)


def test_the_way_of_attention_is_the_base_model_s(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, "rome", max_steps=5)
    before = all_logits(model, tokenizer)
    model.set_attn_implementation("eager")
    assert llama.config._attn_implementation == "eager"
    torch.testing.assert_close(all_logits(model, tokenizer), before, rtol=1e-4, atol=1e-5)


def test_adapters_of_peft_train_on_the_edited_model(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, "rome", max_steps=5)
    edited = all_logits(model, tokenizer)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    assert torch.equal(tuned(input_ids=ids).logits, model(ids).logits)
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    found = {name for name, value in tuned.named_parameters() if value.grad is not None}
    assert found and all("lora_" in name for name in found)
    assert tuned.generate(input_ids=ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2
    with tuned.disable_adapter():
        assert torch.equal(all_logits(model, tokenizer), edited)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("load_adapter", "before it is wrapped.*load_lora adds an adapter"),
        ("add_adapter", "before it is wrapped"),
        ("disable_adapters", r"disable_edits\(\)"),
        ("active_adapters", "edits.active"),
        ("merge_adapter", r"merge_and_unload\(\)"),
        ("init_continuous_batching", "generate with padded batches"),
        ("continuous_batching_context_manager", "generate with padded batches"),
        ("get_base_model", r"model.base_model .*unload\(\)"),
        ("peft_config", "model.editor_config"),
        ("get_nb_trainable_parameters", "model.editor"),
        ("compute_transition_scores", "model.base_model.compute_transition_scores"),
        ("vocab_size", "model.base_model.vocab_size"),
    ],
)
def test_what_is_not_there_names_what_is(llama, tokenizer, name, instead):
    model = editable(llama, tokenizer)
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; .*{instead}"):
        getattr(model, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'$"):
        _ = model.no_such_name
    assert not hasattr(model, name) and copy.deepcopy(model).edits == model.edits


@pytest.mark.parametrize("given", ["openai-community/gpt2", None, {"model": 1}])
def test_a_base_is_a_model(given, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="base_model is .*expected a model that transformers has loaded.*AutoEditable"):
        EditableModel(given, tokenizer=tokenizer)


def test_a_configuration_is_one(llama, tokenizer):
    with pytest.raises(TypeError, match=r"editor_config is 'mend', a str; .*EditorConfig\(method='mend'\)"):
        get_editable_model(llama, "mend", tokenizer)
    with pytest.raises(TypeError, match="a LoraConfig; expected an EditorConfig"):
        get_editable_model(llama, LoraConfig(), tokenizer)
