"""`EditableModel` as its users meet it."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from dataclasses import replace

import pytest
import torch
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, small_config
from support.processes import run_python
from support.scope import scoped

from hf_mend import EditorConfig, EditStore, get_editable_model
from hf_mend.data.encoding import Query
from hf_mend.scope.network import ScopeNetwork


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def test_temporary_and_disabled_edits(base, tokenizer):
    model = editable(base, tokenizer)
    before = all_logits(model, tokenizer)
    with model.edited(PROMPT, TARGET) as result:
        assert result.id == model.edits[0].id
        inside = all_logits(model, tokenizer)
        assert not torch.equal(inside, before)
        with model.disable_edits():
            assert torch.equal(all_logits(model, tokenizer), before)
            with model.disable_edits():
                pass
            assert torch.equal(all_logits(model, tokenizer), before)
        assert torch.equal(all_logits(model, tokenizer), inside)
    assert model.edits == [] and torch.equal(all_logits(model, tokenizer), before)
    with pytest.raises(KeyboardInterrupt), model.edited(PROMPT, TARGET):
        raise KeyboardInterrupt
    assert model.edits == [] and torch.equal(all_logits(model, tokenizer), before)


def test_generate_runs_under_the_edits(base, tokenizer):
    model = editable(base, tokenizer)
    assert model.edit(PROMPT, "rome", max_steps=60).success
    inputs = {"input_ids": torch.tensor([tokenizer(PROMPT)["input_ids"]])}
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert "rome" in text


def test_chat_goes_through_the_template(llama, tokenizer, monkeypatch):
    template = "{% for m in messages %}<bos>{{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    model = editable(llama, tokenizer)
    result = model.edit(PROMPT, TARGET, chat=True, max_steps=1)
    ids = tokenizer("<bos>" + PROMPT + "\n<bos>", add_special_tokens=False)["input_ids"]
    answer = tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    model.undo()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    by_hand = float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().exp())
    assert result.probability_before == pytest.approx(by_hand, rel=1e-3)


# ---- saving and loading ----


def test_a_saved_editor_makes_the_same_edits(base, tokenizer, tmp_path, architecture):
    torch.manual_seed(0)
    model = get_editable_model(base, small_config(), tokenizer)
    with torch.no_grad():
        for parameter in model.editor.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "editor")
    assert sorted(p.name for p in (tmp_path / "editor").iterdir()) == [
        "README.md", "config.json", "editor.safetensors", "editor_config.json",
    ]  # fmt: skip
    again = EditableModel.from_pretrained(build_model(architecture), tmp_path / "editor", tokenizer=tokenizer)
    for one, two in zip(model.editor.state_dict().values(), again.editor.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    model.edit(PROMPT, TARGET, max_steps=1)
    again.edit(PROMPT, TARGET, max_steps=1)
    assert torch.equal(all_logits(model, tokenizer), all_logits(again, tokenizer))


def test_saved_edits_come_back_to_the_bit(base, tokenizer, tmp_path, architecture):
    model = editable(base, tokenizer)
    model.edit([r.prompt for r in RECORDS[:3]], [r.target for r in RECORDS[:3]], max_steps=2)
    expected = all_logits(model, tokenizer)
    model.save_edits(tmp_path / "edits")
    other = editable(build_model(architecture), tokenizer)
    loaded = other.load_edits(tmp_path / "edits")
    assert [e.id for e in loaded] == [e.id for e in model.edits]
    assert [(e.prompt, e.target, e.metadata) for e in loaded] == [
        (e.prompt, e.target, e.metadata) for e in model.edits
    ]
    assert torch.equal(all_logits(other, tokenizer), expected)
    other.undo(loaded[1].id)
    assert len(other.edits) == 2


def test_edits_are_not_left_behind_unsaid(llama, tokenizer, tmp_path, caplog):
    model = editable(llama, tokenizer)
    model.save_pretrained(tmp_path / "editor")
    assert "carries edits" not in caplog.text
    model.edit(PROMPT, TARGET, max_steps=60)
    model.save_pretrained(tmp_path / "editor")
    assert "carries edits (1), which are not saved" in caplog.text and "edits=True" in caplog.text
    caplog.clear()
    model.save_pretrained(tmp_path / "without", edits=False)
    model.save_pretrained(tmp_path / "both", edits=True)
    assert "carries edits" not in caplog.text
    assert not (tmp_path / "editor" / "edits.safetensors").exists()
    assert not (tmp_path / "without" / "edits.safetensors").exists()
    again = EditableModel.from_pretrained(build_model("llama"), tmp_path / "both", tokenizer)
    assert again.load_edits(tmp_path / "both")[0].target == TARGET
    assert torch.equal(all_logits(again, tokenizer), all_logits(model, tokenizer))
    with_store = editable(build_model("llama"), tokenizer)
    with_store.open_store(tmp_path / "store")
    with_store.edit(PROMPT, TARGET, max_steps=60)
    with_store.save_pretrained(tmp_path / "stored")
    assert "carries edits" not in caplog.text, "the store has them"


def test_save_pretrained_takes_the_options_that_transformers_has(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process").exists()
    model.save_pretrained(tmp_path / "editor", safe_serialization=True, push_to_hub=False)
    with pytest.raises(ValueError, match="safe_serialization is False.*safetensors alone"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(TypeError, match="no option 'variant' without push_to_hub"):
        model.save_pretrained(tmp_path / "pickled", variant="fp16")
    assert not (tmp_path / "pickled").exists()


def test_saved_edits_give_the_same_logits_in_a_new_process(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=2)
    model.save_edits(tmp_path / "edits")
    model.save_pretrained(tmp_path / "editor")
    llama.save_pretrained(tmp_path / "base")
    torch.save(all_logits(model, tokenizer), tmp_path / "logits.pt")
    tokenizer.save_pretrained(tmp_path / "base")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_mend import EditableModel
folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + "/base")
tokenizer = AutoTokenizer.from_pretrained(folder + "/base")
model = EditableModel.from_pretrained(base, folder + "/editor", tokenizer=tokenizer)
model.load_edits(folder + "/edits")
with torch.no_grad():
    logits = model(input_ids=torch.tensor([tokenizer("the capital of peru is")["input_ids"]])).logits
assert torch.equal(logits, torch.load(folder + "/logits.pt")), "logits differ"
"""
    done = run_python("-c", script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_train_mode_reaches_the_editor_alone(llama, tokenizer):
    model = editable(llama, tokenizer).train()
    assert model.editor.training and not any(module.training for module in llama.modules())
    assert not any(p.requires_grad for p in llama.parameters())


# ---- bad input ----


def test_strings_without_a_tokenizer(llama):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        get_editable_model(llama, small_config()).edit("a", "b")


def test_undo_of_what_is_not_there(llama, tokenizer):
    model = editable(llama, tokenizer)
    with pytest.raises(IndexError, match="no edit to undo"):
        model.undo()
    model.edit(PROMPT, TARGET)
    with pytest.raises(KeyError, match="no edit has the id 'nope'"):
        model.undo("nope")
    assert len(model.edits) == 1


def test_a_merged_model_is_spent(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.merge_and_unload()
    for call in (lambda: model.edit("a", "b"), model.undo, model.undo_all, model.merge_and_unload, model.unload):
        with pytest.raises(RuntimeError, match="merged into the base model's weights"):
            call()


@pytest.mark.parametrize("spent_by", ["merge_and_unload", "unload"])
def test_nothing_is_saved_of_the_edits_of_a_spent_model(llama, tokenizer, tmp_path, spent_by):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    edit = model.edits[0]
    model.save_edits(tmp_path / "edits")
    model.save_lora(tmp_path / "lora")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    getattr(model, spent_by)()
    for call in (
        lambda: model.save_edits(tmp_path / "edits"),
        lambda: model.save_lora(tmp_path / "lora"),
        lambda: model.save_lora(tmp_path / "lora", [edit]),
        lambda: model.save_pretrained(tmp_path / "editor", edits=True),
        lambda: model.push_edits_to_hub("me/edits"),
        lambda: model.push_lora_to_hub("me/lora"),
        lambda: model.push_to_hub("me/editor", edits=True),
        lambda: model.disable_edits().__enter__(),
    ):
        with pytest.raises(RuntimeError, match="wrap it anew"):
            call()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_an_editor_is_not_saved_with_the_fingerprint_of_a_merged_base(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    again = copy.deepcopy(model)
    again.save_pretrained(tmp_path / "before", edits=False)
    for one in (model, again):
        one.merge_and_unload()
    with pytest.raises(RuntimeError, match="wrap it anew"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()
    again.save_pretrained(tmp_path / "after")
    first, second = (json.loads((tmp_path / name / "editor_config.json").read_text()) for name in ("before", "after"))
    assert first["base_fingerprint"] == second["base_fingerprint"] is not None


# ---- giving the base back ----


def trained_mode(base) -> dict[str, bool]:
    return {name: module.training for name, module in base.named_modules()}


def test_unload_gives_the_base_back_as_it_was(base, tokenizer):
    base.train()
    next(base.children()).eval()  # some of it
    frozen = next(base.parameters()).requires_grad_(False)
    modes = trained_mode(base)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = editable(base, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    assert model.unload() is base
    assert trained_mode(base) == modes
    assert [p.requires_grad for p in base.parameters()] == [p is not frozen for p in base.parameters()]
    assert not any(module._forward_hooks for module in base.modules())
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    for call in (lambda: model.edit("a", "b"), model.undo, model.merge_and_unload, model.unload):
        with pytest.raises(RuntimeError, match=r"base model was given back by unload\(\); load .* wrap it anew"):
            call()
    again = editable(base, tokenizer)
    assert again.edits == [] and again.edit(PROMPT, TARGET, max_steps=1).steps == 1


@pytest.mark.parametrize("context", ["edited", "carrying"])
def test_unload_gives_the_base_back_from_within_a_context(llama, tokenizer, context):
    before = all_logits(llama, tokenizer)
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    with model.carrying([]) if context == "carrying" else model.edited(PROMPT, "lima town", max_steps=1):
        base = model.unload()
        assert torch.equal(all_logits(base, tokenizer), before)
    assert torch.equal(all_logits(base, tokenizer), before) and model.edits == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_no_scope_takes_the_place_of_one_whose_edits_are_set_aside(llama, tokenizer):
    model = scoped(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    edited, other = all_logits(model, tokenizer, PROMPT), copy.deepcopy(model.scope)
    with torch.no_grad():
        other.values.mul_(2)
    with (
        model.carrying([]),
        pytest.raises(ValueError, match="carries edits with keys in its present scope.*undo_all"),
    ):
        model.set_scope(other)
    assert model.scope is not other and torch.equal(all_logits(model, tokenizer, PROMPT), edited)
    assert model.which_edits(PROMPT)[0].acts


def test_an_open_store_keeps_its_edits_when_the_model_is_unloaded(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.open_store(tmp_path / "edits")
    made = model.edit(PROMPT, TARGET, max_steps=1).id
    model.unload()
    assert EditStore(tmp_path / "edits").edits.ids == [made]


def test_the_base_of_a_model_that_is_gone_answers_as_before(llama, tokenizer):
    before = all_logits(llama, tokenizer)
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    edited = all_logits(model, tokenizer)
    shallow = copy.copy(model)
    deep, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    del model
    gc.collect()
    assert torch.equal(all_logits(llama, tokenizer), edited), "a shallow copy owns the edits too"
    del shallow
    gc.collect()
    assert torch.equal(all_logits(llama, tokenizer), before)
    assert not any(module._forward_hooks for module in llama.modules())
    for one in (deep, pickled):
        assert torch.equal(all_logits(one, tokenizer), edited)
    base = deep.base_model
    del deep, one
    gc.collect()
    assert torch.equal(all_logits(base, tokenizer), before)


@pytest.mark.parametrize("safe", [False, True])
def test_what_is_merged_can_be_trained_again(base, tokenizer, safe):
    model = editable(base, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    merged = model.merge_and_unload(safe_merge=safe)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    inputs = {"input_ids": torch.tensor([tokenizer(PROMPT)["input_ids"]])}
    merged(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in merged.parameters())


def test_a_safe_merge_writes_nothing_that_is_not_finite(tokenizer):
    model = editable(build_model("llama").half(), tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    edit, name = model.undo(), model.targets[-1].name
    u, v = edit.updates[name]
    large = replace(edit, updates={**edit.updates, name: (u, v * 1e9)})  # finite as an edit, not in float16
    weights = {key: value.clone() for key, value in model.base_model.state_dict().items()}
    with model.carrying([large]):
        message = (
            rf"the weight of '{name}' with its edits holds NaN or infinity in torch.float16, so nothing was merged"
        )
        with pytest.raises(ValueError, match=message):
            model.merge_and_unload(safe_merge=True)
        assert len(model.edits) == 1
    assert all(torch.equal(value, weights[key]) for key, value in model.base_model.state_dict().items())
    model.merge_and_unload(safe_merge=True)


def test_an_editor_that_was_never_trained_says_so_once(tokenizer, tmp_path, caplog):
    model = editable(build_model("llama"), tokenizer)
    for _ in range(2):
        model.edit(PROMPT, TARGET, max_steps=1, force=True)
    assert caplog.text.count("this 'mend' editor was never trained") == 1
    assert "train it with EditorTrainer, load a trained one with from_pretrained, or leave" in caplog.text
    caplog.clear()
    trained = editable(build_model("llama"), tokenizer)
    with torch.no_grad():
        next(trained.editor.parameters()).add_(0.01)
    EditableModel(build_model("llama"), EditorConfig(method="ft"), tokenizer).edit(PROMPT, TARGET, max_steps=1)
    trained.edit(PROMPT, TARGET, max_steps=1)
    assert "never trained" not in caplog.text


def test_a_scope_that_was_never_trained_says_so_once(tokenizer, caplog):
    config = EditorConfig(method="ft", scope=True)
    model = EditableModel(build_model("llama"), config, tokenizer)
    for target in (TARGET, "the old town"):
        model.edit(PROMPT, target, max_steps=1)
    assert caplog.text.count("the scope was never trained") == 1 and "train_scope(model)" in caplog.text
    caplog.clear()
    trained = EditableModel(build_model("llama"), config, tokenizer)
    scope = ScopeNetwork(trained.scope.width)
    scope.standardise(torch.randn(20, trained.scope.width))
    trained.set_scope(scope)
    trained.edit(PROMPT, TARGET, max_steps=1)
    assert "never trained" not in caplog.text


def test_edits_are_disabled_under_the_old_names_too(llama, tokenizer):
    model = editable(llama, tokenizer)
    made = model.edit(PROMPT, TARGET, max_steps=1).id
    with pytest.warns(FutureWarning, match="EditableModel.turn_off is now called disable_edit"):
        model.turn_off(made)
    assert model.edits.active == []
    with pytest.warns(FutureWarning, match="EditableModel.turn_on is now called enable_edit"):
        model.turn_on(made)
    assert model.edits.active == model.edits


def test_the_start_of_answers_may_stand_in_the_generation_config(tokenizer):
    base = build_model("bart")
    base.generation_config.decoder_start_token_id = base.config.decoder_start_token_id
    base.config.decoder_start_token_id = None
    model = EditableModel(base, EditorConfig(method="ft", edit_lr=0.01), tokenizer)
    assert model.encoder.decoder_start_token_id == 2
    assert model.edit(RECORDS[0].prompt, RECORDS[0].target).success
    base.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="model.config.decoder_start_token_id is not set"):
        model.edit(RECORDS[1].prompt, RECORDS[1].target)
    assert len(model.edits) == 1


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_what_took_is_what_is_generated_after_a_forced_token(base, tokenizer):
    base.generation_config.forced_bos_token_id = forced = tokenizer.convert_tokens_to_ids("Ġthe")
    model = EditableModel(base, EditorConfig(method="ft", edit_lr=0.01), tokenizer)
    prompt, answer = model.encoder.tokens(Query(PROMPT, TARGET))
    rows = model.encoder([Query(PROMPT, TARGET), Query(RECORDS[1].prompt)])
    assert rows.inputs["decoder_input_ids"][0].tolist() == [base.config.decoder_start_token_id, forced, *answer[:-1]]
    assert rows.next_tokens[0].tolist() == [-100, *answer]
    assert rows.positions.nonzero().tolist() == [*([0, 1 + i] for i in range(len(answer))), [1, 1]]
    assert model.edit(PROMPT, TARGET, force=True).success
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4 + len(answer), do_sample=False)[0]
    assert out[: 2 + len(answer)].tolist() == [base.config.decoder_start_token_id, forced, *answer]
