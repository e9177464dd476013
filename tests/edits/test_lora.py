"""Exported adapters in plain PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import RECORDS, VOCAB, EditableModel, all_logits, build_model, editable, initialize
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.mark.parametrize("uniform_rank", [False, True])
def test_plain_peft_gives_the_edited_models_logits(base, tokenizer, tmp_path, architecture, uniform_rank):
    model = editable(base, tokenizer)
    plain = all_logits(model, tokenizer)
    model.edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]], max_steps=2)
    # A layer of another rank, and one without an update.
    del model._active.edits[0].updates[model.targets[0].name]
    for edit in model._active.edits:
        del edit.updates[model.targets[-1].name]
    model._active.replace(model.edits)
    expected = all_logits(model, tokenizer)
    assert (expected - plain).abs().max() > 1e-3
    model.save_lora(tmp_path, uniform_rank=uniform_rank)
    peft = PeftModel.from_pretrained(build_model(architecture), str(tmp_path)).eval()
    torch.testing.assert_close(all_logits(peft, tokenizer), expected, rtol=1e-3, atol=1e-4)
    with peft.disable_adapter():
        torch.testing.assert_close(all_logits(peft, tokenizer), plain)
    merged = peft.merge_and_unload()
    torch.testing.assert_close(all_logits(merged, tokenizer), expected, rtol=1e-3, atol=1e-4)


def test_some_of_the_edits(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    expected = all_logits(model, tokenizer)
    model.edit(RECORDS[1].prompt, RECORDS[1].target)
    model.save_lora(tmp_path, edits=model.edits[:1])
    peft = PeftModel.from_pretrained(build_model("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(all_logits(peft, tokenizer), expected, rtol=1e-3, atol=1e-4)


def test_no_edit_no_adapter(llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no edit to write as a LoRA adapter"):
        editable(llama, tokenizer).save_lora(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def bits(edits):
    return [(e.describe(), {n: (u.tolist(), v.tolist()) for n, (u, v) in e.updates.items()}) for e in edits]


@pytest.mark.parametrize("uniform_rank", [False, True])
def test_an_exported_adapter_comes_back_as_edits(base, tokenizer, tmp_path, architecture, uniform_rank):
    model = editable(base, tokenizer)
    model.edit([r.prompt for r in RECORDS[:3]], [r.target for r in RECORDS[:3]], max_steps=2)
    expected = all_logits(model, tokenizer)
    assert model.save_lora(tmp_path, uniform_rank=uniform_rank) == 0
    again = editable(build_model(architecture), tokenizer)
    plain = all_logits(again, tokenizer)
    loaded = again.load_lora(tmp_path)
    assert bits(loaded) == bits(model.edits) == bits(again.edits)
    assert torch.equal(all_logits(again, tokenizer), expected)
    with pytest.raises(ValueError, match="carries the edit"):
        again.load_lora(tmp_path)
    again.undo_all()
    assert torch.equal(all_logits(again, tokenizer), plain)


def foreign_adapter(architecture, tmp_path, **options):
    """An adapter that PEFT itself made, with weights that matter, and the logits under it."""
    base = build_model(architecture)
    names = [n for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and "lm_head" not in n]
    chosen = names[1::3]
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    peft = get_peft_model(base, LoraConfig(target_modules=chosen, lora_dropout=0.1, **options)).eval()
    peft.save_pretrained(tmp_path)
    return peft, chosen


@pytest.mark.parametrize("use_rslora", [False, True])
def test_any_plain_adapter_loads_as_one_edit(architecture, tokenizer, tmp_path, use_rslora):
    import copy

    # Sorted, as PEFT writes them: where two match a layer, the first counts, before and after.
    patterns = {"rank_pattern": {r".*\.2\..*": 3, "0.*": 2}, "alpha_pattern": {r".*\.1\..*": 9}}
    peft, chosen = foreign_adapter(architecture, tmp_path / "lora", use_rslora=use_rslora, **copy.deepcopy(patterns))
    expected = all_logits(peft, tokenizer)
    model = editable(build_model(architecture), tokenizer)
    plain = all_logits(model, tokenizer)
    (edit,) = model.load_lora(tmp_path / "lora")
    assert set(edit.updates) == set(chosen) and edit.prompt == ""
    torch.testing.assert_close(all_logits(model, tokenizer), expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    model.save_edits(tmp_path / "edits")
    again = editable(build_model(architecture), tokenizer)
    again.load_edits(tmp_path / "edits")
    assert torch.equal(all_logits(again, tokenizer), all_logits(model, tokenizer))
    assert model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=2, force=True).superseded is None
    model.undo()
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)


def altered(path, change):
    file = path / "adapter_config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "'use_dora'=True: DoRA rescales"),
        ({"bias": "all"}, "'bias'='all': it trains biases"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'=.*whole layers"),
    ],
)
def test_what_is_more_than_lora_is_refused(llama, tokenizer, tmp_path, options, message):
    foreign_adapter("llama", tmp_path, **options)
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match=message):
        model.load_lora(tmp_path)
    if not options.get("use_dora"):  # no bias in this model, and its own whole layer brings nothing else
        return
    # Also where the configuration hides it.
    hidden = {"use_dora": False, "bias": "none", "modules_to_save": None}
    altered(tmp_path, lambda values: values.update(hidden))
    with pytest.raises(ValueError, match="expected pairs of lora_A and lora_B"):
        model.load_lora(tmp_path)
    assert model.edits == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(peft_type="IA3"), "only LORA can be an edit"),
        (lambda c: c.update(r=5), "says rank 5"),
        (lambda c: c.update(lora_alpha=float("1e9")), "expected positive numbers"),
        (lambda c: c.update(rank_pattern={"(": 2}), "not a regular expression"),
        (lambda c: c.update(rank_pattern=[1]), "is no pattern"),
        (lambda c: c.update(init_lora_weights="pissa"), "changes the base model's weights"),
        (lambda c: c.update(some_new_kind=True), "'some_new_kind'=True: it goes beyond plain LoRA"),
    ],
)
def test_altered_configurations_are_refused(llama, tokenizer, tmp_path, change, message):
    foreign_adapter("llama", tmp_path)
    altered(tmp_path, change)
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match=message):
        model.load_lora(tmp_path)
    assert model.edits == []


def test_layers_that_the_model_has_not(llama, tokenizer, tmp_path):
    foreign_adapter("llama", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("layers.", "floors."): t for name, t in load_file(weights).items()}, weights)
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match="floors.*belong to another model"):
        model.load_lora(tmp_path)
    assert model.edits == []


def test_max_rank_and_its_error(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit([r.prompt for r in RECORDS[:4]], [r.target for r in RECORDS[:4]], max_steps=2, force=True)
    exact = {name: sum(e.updates[name][1].T @ e.updates[name][0] for e in model.edits) for name in model.editor.shapes}
    error = model.save_lora(tmp_path, max_rank=3)
    again = editable(build_model("llama"), tokenizer)
    (edit,) = again.load_lora(tmp_path)
    errors = []
    for name, (u, v) in edit.updates.items():
        sizes = torch.linalg.svdvals(exact[name].double())
        best = float((sizes[3:].square().sum() / sizes.square().sum()).sqrt())
        errors.append(best)
        assert len(u) == 3
        assert float((exact[name] - v.T @ u).norm() / exact[name].norm()) == pytest.approx(best, rel=1e-3)
    assert error == pytest.approx(max(errors), rel=1e-3) and error > 0
    with pytest.raises(ValueError, match="max_rank is 0"):
        model.save_lora(tmp_path, max_rank=0)


def test_hot_swap_between_two_adapters(llama, tokenizer, tmp_path):
    model, expected = editable(llama, tokenizer), []
    for i in (0, 1):
        with model.edited(RECORDS[i].prompt, RECORDS[i].target, max_steps=2, force=True):
            expected.append(all_logits(model, tokenizer))
            model.save_lora(tmp_path / str(i))
    peft = PeftModel.from_pretrained(build_model("llama"), str(tmp_path / "0"), adapter_name="0").eval()
    peft.load_adapter(str(tmp_path / "1"), adapter_name="1")
    for i in (1, 0, 1):
        peft.set_adapter(str(i))
        torch.testing.assert_close(all_logits(peft, tokenizer), expected[i], rtol=1e-3, atol=1e-4)


def test_an_adapter_on_a_tied_output_layer_is_not_merged_into_the_embedding(tokenizer, tmp_path):
    peft = get_peft_model(
        build_model("gpt2"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, fan_in_fan_out=False)
    )
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    model = editable(build_model("gpt2"), tokenizer)
    model.load_lora(tmp_path)
    loaded, embedding = all_logits(model, tokenizer), model.base_model.transformer.wte.weight.clone()
    torch.testing.assert_close(loaded, all_logits(peft, tokenizer), rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="that of 'transformer.wte' too .* keep the edits beside the weight"):
        model.merge_and_unload()
    assert torch.equal(model.base_model.transformer.wte.weight, embedding)
    assert torch.equal(all_logits(model, tokenizer), loaded)


def scales_by_one_alpha(folder):
    """The scale of each tensor where one alpha is divided by each tensor's own rank, as in llama.cpp."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    return {alpha / len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}


def stacked_kinds(folder, blocks: int):
    """The kinds of layer that a server keeps that stacks each kind over all blocks."""
    names = load_file(folder / "adapter_model.safetensors")
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    return {kind for kind in kinds if all(any(f".{i}." in n and f".{kind}.lora_A" in n for n in names)
                                          for i in range(blocks))}  # fmt: skip


@pytest.mark.parametrize("choice", ["default", "paper"])
def test_servers_that_stack_layers_or_know_one_rank_take_the_adapter(llama, tokenizer, tmp_path, choice):
    model = editable(llama, tokenizer, target_modules=choice, layers_to_transform=None)
    model.edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]], max_steps=2)
    del model._active.edits[0].updates[model.targets[0].name]  # a layer of another rank
    model._active.replace(model.edits)
    expected = all_logits(model, tokenizer)
    model.save_lora(tmp_path / "servers")
    model.save_lora(tmp_path / "small", uniform_rank=False)
    kinds = {target.name.split(".")[-1] for target in model.targets}
    assert stacked_kinds(tmp_path / "servers", 4) == kinds and stacked_kinds(tmp_path / "small", 4) == set()
    assert scales_by_one_alpha(tmp_path / "servers") == {1.0}
    for folder in ("servers", "small"):
        peft = PeftModel.from_pretrained(build_model("llama"), str(tmp_path / folder)).eval()
        torch.testing.assert_close(all_logits(peft, tokenizer), expected, rtol=1e-3, atol=1e-4)


def test_layers_of_zeros_are_no_part_of_an_edit(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=2)
    model.save_lora(tmp_path, max_rank=1)
    again = editable(build_model("llama"), tokenizer)
    (edit,) = again.load_lora(tmp_path)
    assert set(edit.updates) == {target.name for target in model.targets}


# The fields that PEFT 0.3 knew.
FIRST_FIELDS = {
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "target_modules",
    "task_type",
}  # fmt: skip


def test_the_configuration_holds_no_field_that_an_older_peft_does_not_know(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]], max_steps=2)
    del model._active.edits[0].updates[model.targets[0].name]
    model._active.replace(model.edits)
    model.save_lora(tmp_path / "servers")
    assert json.loads((tmp_path / "servers" / "adapter_config.json").read_text()).keys() == FIRST_FIELDS
    model.save_lora(tmp_path / "small", uniform_rank=False)
    fields = json.loads((tmp_path / "small" / "adapter_config.json").read_text()).keys()
    assert fields == FIRST_FIELDS | {"rank_pattern", "alpha_pattern"}  # which say something


def test_peft_refuses_what_mambas_kernels_pass_by_and_save_lora_says_so(tokenizer, tmp_path, caplog):
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=4, state_size=8, time_step_rank=4,
                                  vocab_size=VOCAB, pad_token_id=0)  # fmt: skip
    base = initialize(AutoModelForCausalLM.from_config(config).eval())
    model = EditableModel(base, tokenizer=tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    edited = all_logits(model, tokenizer)
    model.save_lora(tmp_path)
    assert "PEFT loads no adapter of 'backbone.layers.2.mixer.out_proj' in a MambaForCausalLM" in caplog.text
    model.undo_all()
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        PeftModel.from_pretrained(base, str(tmp_path))
    model.load_lora(tmp_path)
    assert torch.equal(all_logits(model, tokenizer), edited)


def output_layer_adapter(folder):
    """An adapter of PEFT's on an output layer, whose weight it saves too, and the logits under it."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["down_proj", "lm_head"], init_lora_weights=False)
    peft = get_peft_model(build_model("llama"), config).eval()
    peft.save_pretrained(folder)
    return peft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_layers_own_weight_beside_an_adapter(llama, tokenizer, tmp_path, dtype):
    expected = all_logits(output_layer_adapter(tmp_path), tokenizer)
    weights = tmp_path / "adapter_model.safetensors"
    assert "base_model.model.lm_head.base_layer.weight" in load_file(weights)
    model = editable(llama.to(dtype), tokenizer)
    (edit,) = model.load_lora(tmp_path)
    assert "lm_head" in edit.updates
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(all_logits(model, tokenizer).float(), expected, rtol=tolerance, atol=tolerance)
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 5] += 1
    save_file(tensors, weights)
    model.undo_all()
    with pytest.raises(ValueError, match="brings a weight of 'lm_head' that differs from the base model's"):
        model.load_lora(tmp_path)
    assert model.edits == []


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda name: "_orig_mod." + name,
    ],
)
def test_names_of_compiled_models_and_of_raw_state_dicts(llama, tokenizer, tmp_path, rename):
    peft, chosen = foreign_adapter("llama", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(weights).items()}, weights)
    model = editable(llama, tokenizer)
    (edit,) = model.load_lora(tmp_path)
    assert set(edit.updates) == set(chosen)
    torch.testing.assert_close(all_logits(model, tokenizer), all_logits(peft, tokenizer), rtol=1e-3, atol=1e-4)
