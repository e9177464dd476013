"""Bases that a user has wrapped, or set up otherwise than plain inference wants: each works or says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from support.models import RECORDS, EditableModel, all_logits, build_model, editable


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def with_lora(architecture: str, modules: list[str]):
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    return get_peft_model(build_model(architecture), config)


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [("llama", ["down_proj", "q_proj"]), ("llama", ["v_proj"]), ("gpt2", ["c_fc", "c_proj"]), ("t5", ["wo", "q"])],
)
def test_an_active_lora_adapter_stays_and_the_edit_goes_beside_it(tokenizer, tmp_path, architecture, modules):
    wrapped = with_lora(architecture, modules)
    # The oracle is a plain model with the adapter in its weights.
    plain = editable(copy.deepcopy(wrapped).merge_and_unload(), tokenizer)
    model = editable(wrapped, tokenizer)
    assert [target.name for target in model.targets] == [target.name for target in plain.targets]
    torch.testing.assert_close(all_logits(model, tokenizer), all_logits(plain, tokenizer), rtol=1e-4, atol=1e-4)
    before = all_logits(model, tokenizer)
    for one in (model, plain):
        one.edit(PROMPT, TARGET, max_steps=1)
    torch.testing.assert_close(all_logits(model, tokenizer), all_logits(plain, tokenizer), rtol=1e-3, atol=1e-3)
    model.save_edits(tmp_path)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before)
    plain.undo()
    plain.load_edits(tmp_path)  # names are those of the model without adapters
    edited = all_logits(plain, tokenizer)
    model.load_edits(tmp_path)
    merged = model.merge_and_unload()
    torch.testing.assert_close(all_logits(merged, tokenizer), edited, rtol=1e-3, atol=1e-3)
    assert merged.state_dict().keys() == build_model(architecture).state_dict().keys()
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(all_logits(loaded, tokenizer), all_logits(merged, tokenizer))


@pytest.mark.parametrize("kind", ["dora", "disabled", "injected", "on the embedding"])
def test_adapters_of_other_kinds_are_merged_with_the_edits(tokenizer, tmp_path, kind):
    base, modules = build_model("llama"), ["down_proj", "v_proj"]
    modules += ["embed_tokens"] if kind == "on the embedding" else []
    config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, use_dora=kind == "dora")
    wrapped = inject_adapter_in_model(config, base) if kind == "injected" else get_peft_model(base, config)
    if kind == "disabled":
        wrapped.base_model.disable_adapter_layers()
    model = editable(wrapped, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    edited = all_logits(model, tokenizer)
    merged = model.merge_and_unload()
    torch.testing.assert_close(all_logits(merged, tokenizer), edited, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert torch.equal(all_logits(loaded, tokenizer), all_logits(merged, tokenizer))
    assert merged.state_dict().keys() == build_model("llama").state_dict().keys()


def test_an_adapter_that_cannot_be_merged_leaves_everything_as_it_was(tokenizer):
    config = LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    tied = LoraConfig(r=4, target_modules=["c_proj", "lm_head"], init_lora_weights=False)
    for architecture, adapter, message in (
        ("llama", config, "'lm_head'; save_edits, merge the adapter with PEFT before"),
        ("gpt2", tied, "'lm_head' cannot be merged .*tied"),
    ):
        model = editable(get_peft_model(build_model(architecture), adapter), tokenizer)
        model.edit(PROMPT, TARGET, max_steps=1)
        edited, state = all_logits(model, tokenizer), copy.deepcopy(model.base_model.state_dict())
        with pytest.raises(TypeError, match=message):
            model.merge_and_unload()
        assert torch.equal(all_logits(model, tokenizer), edited)
        assert all(torch.equal(value, state[name]) for name, value in model.base_model.state_dict().items())
        model.undo()  # still usable


def test_an_editor_of_the_plain_base_fits_the_base_with_an_adapter(tokenizer, tmp_path):
    editable(build_model("llama"), tokenizer).save_pretrained(tmp_path)
    model = EditableModel.from_pretrained(with_lora("llama", ["down_proj"]), tmp_path, tokenizer)
    assert model.edit(PROMPT, TARGET, max_steps=1).steps == 1


def test_a_learned_prompt_cannot_be_edited(tokenizer):
    wrapped = get_peft_model(build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING, a learned prompt.*edit the model without it"):
        editable(wrapped, tokenizer)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tokenizer, reentrant):
    plain, model = editable(build_model("llama"), tokenizer), build_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = editable(model.train(), tokenizer)
    for one in (model, plain):
        one.edit(PROMPT, TARGET, max_steps=2)
    assert torch.equal(all_logits(model, tokenizer), all_logits(plain, tokenizer))


def test_a_compiled_base_is_edited_uncompiled(tokenizer, caplog):
    plain, model = (editable(base, tokenizer) for base in (build_model("llama"), torch.compile(build_model("llama"))))
    assert "compile what merge_and_unload() returns" in caplog.text
    for one in (model, plain):
        one.edit(PROMPT, TARGET, max_steps=2)
    assert torch.equal(all_logits(model, tokenizer), all_logits(plain, tokenizer))


@pytest.mark.parametrize("part", ["", "model.layers.1"])
def test_a_base_compiled_in_place_says_what_to_do(tokenizer, part):
    base = build_model("llama")
    base.get_submodule(part).compile()
    with pytest.raises(ValueError, match=r"(Llama|layers\.1).* was compiled in place .* load the base model without"):
        editable(base, tokenizer)


def test_a_base_that_carries_another_models_edits_is_said(tokenizer, caplog):
    first = editable(build_model("llama"), tokenizer)
    ids = [first.edit(record.prompt, record.target, max_steps=1).id for record in RECORDS[:2]]
    first.disable_edit(ids[0])
    again = editable(first.base_model, tokenizer)
    assert caplog.text.count("another EditableModel's edits act in this base model (1)") == 1
    assert "undo_all() there first" in caplog.text
    first.enable_edit(ids[0])
    editable(first.base_model, tokenizer)
    assert caplog.text.count("another EditableModel's edits act in this base model (2)") == 1
    caplog.clear()
    with first.disable_edits():
        editable(first.base_model, tokenizer)
    first.undo_all()
    editable(first.base_model, tokenizer)
    assert again.edits == [] and "another EditableModel" not in caplog.text


def test_a_safe_merge_with_an_adapter(tokenizer):
    for broken in (False, True):
        wrapped = with_lora("llama", ["down_proj"])
        model = editable(wrapped, tokenizer)
        model.edit(PROMPT, TARGET, max_steps=1)
        edited = all_logits(model, tokenizer)
        if broken:
            layer = next(target.module for target in model.targets if hasattr(target.module, "lora_B"))
            with torch.no_grad():
                layer.lora_B["default"].weight[0, 0] = float("inf")
            state = copy.deepcopy(model.base_model.state_dict())
            with pytest.raises(ValueError, match="NaN"):
                model.merge_and_unload(safe_merge=True)
            assert all(torch.equal(value, state[name]) for name, value in model.base_model.state_dict().items())
            assert len(model.edits) == 1
        else:
            merged = model.merge_and_unload(safe_merge=True)
            torch.testing.assert_close(all_logits(merged, tokenizer), edited, rtol=1e-3, atol=1e-3)


def test_unload_leaves_a_users_adapter_in_its_place(tokenizer):
    wrapped = with_lora("llama", ["down_proj"])
    before = all_logits(wrapped, tokenizer)
    needed = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}
    assert len(set(needed.values())) == 2
    model = editable(wrapped, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    model.unload()
    assert torch.equal(all_logits(wrapped, tokenizer), before)
    assert {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()} == needed
