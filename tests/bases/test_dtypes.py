"""Bases in half precision and autocast: editor and factors stay in float32, the base in its own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, fitting, small_config
from support.training import QUESTIONS, arguments, losses

from hf_mend import EditorConfig, EditorTrainer, get_editable_model
from hf_mend.edits.hook import plus
from hf_mend.methods.base import registered_methods


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_a_base_in_half_precision(architecture, tokenizer, tmp_path, dtype):
    model = editable(build_model(architecture).to(dtype), tokenizer)
    before = all_logits(model, tokenizer)
    result = model.edit(PROMPT, TARGET, max_steps=4)
    edited = all_logits(model, tokenizer)
    assert result.probability_after > result.probability_before
    assert {p.dtype for p in model.base_model.parameters()} == {dtype} and edited.dtype == dtype
    assert {p.dtype for p in model.editor.parameters()} == {torch.float32}
    assert {side.dtype for pair in model.edits[0].updates.values() for side in pair} == {torch.float32}
    model.save_edits(tmp_path)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before)
    model.load_edits(tmp_path)
    assert torch.equal(all_logits(model, tokenizer), edited)


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_an_edit_in_half_precision_is_near_that_in_full(llama, tokenizer, dtype):
    full = editable(llama, tokenizer)
    half = editable(build_model("llama").to(dtype), tokenizer)
    for model in (full, half):
        model.edit(PROMPT, TARGET, max_steps=1)
    for name, (u, v) in full.edits[0].updates.items():
        ours, theirs = v.T @ u, half.edits[0].updates[name][1].T @ half.edits[0].updates[name][0]
        assert float((ours - theirs).norm() / ours.norm()) < 0.1


@pytest.mark.parametrize("method", ["mend", "malmen"])
@pytest.mark.parametrize("edit_lr", [30.0, 3e3, 3e5, 1e6])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_steps_that_overflow_float16_are_made_smaller_or_not_made(architecture, tokenizer, method, edit_lr):
    """What float32 edits, float16 edits or refuses; nothing that is not finite is kept."""
    model = editable(build_model(architecture).half(), tokenizer, method=method, edit_lr=edit_lr)
    before = all_logits(model, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=3)
    assert all_logits(model, tokenizer).isfinite().all() and all_logits(model, tokenizer, PROMPT).isfinite().all()
    model.undo_all()
    try:
        model.edit(PROMPT, TARGET, max_steps=1)
    except ValueError as error:
        assert "nothing was edited; let the step be made smaller" in str(error) and not model.edits
        assert torch.equal(all_logits(model, tokenizer), before)
    else:
        assert all_logits(model, tokenizer, PROMPT).isfinite().all()


def test_an_addition_past_the_range_of_float16_ends_at_its_largest_number():
    output, term = torch.tensor([60000.0, -60000.0, 1.0]).half(), torch.tensor([1e5, -1e5, 2.0])
    assert plus(output, term).tolist() == [65504.0, -65504.0, 3.0]
    near = torch.tensor([-1e5, 1e5, 0.0])  # out of range by itself, and the sum is not
    assert plus(output, near).tolist() == [-40000.0, 40000.0, 1.0]
    wide = torch.tensor([60000.0])
    assert plus(wide, torch.tensor([1e5])).item() == 160000.0


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_editing_under_autocast(tokenizer, architecture):
    model = editable(build_model(architecture), tokenizer)
    before = all_logits(model, tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model.edit(PROMPT, TARGET, max_steps=4)
    assert result.probability_after > result.probability_before
    assert {side.dtype for pair in model.edits[0].updates.values() for side in pair} == {torch.float32}
    assert not torch.equal(all_logits(model, tokenizer), before)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before)


@pytest.mark.parametrize(
    "base_dtype",
    [pytest.param(torch.float32, id="float32", marks=pytest.mark.slow), pytest.param(torch.bfloat16, id="bfloat16")],
)
def test_training_in_mixed_precision(tokenizer, tmp_path, base_dtype):
    torch.manual_seed(0)
    model = get_editable_model(build_model("llama").to(base_dtype), small_config(), tokenizer)
    args = arguments(tmp_path, bf16=True, max_steps=12, learning_rate=1e-2, step_learning_rate=0.1)
    trainer = EditorTrainer(model, args, RECORDS, questions=QUESTIONS)
    trainer.train()
    values = losses(trainer)
    assert sum(values[-5:]) < sum(values[:5])
    assert {p.dtype for p in model.editor.parameters()} == {torch.float32}
    assert {p.dtype for p in model.base_model.parameters()} == {base_dtype}


def test_an_editor_fits_its_base_in_any_dtype_without_a_warning(tokenizer, tmp_path, caplog):
    torch.manual_seed(0)
    get_editable_model(build_model("llama"), small_config(), tokenizer).save_pretrained(tmp_path)
    for dtype in HALF:
        EditableModel.from_pretrained(build_model("llama").to(dtype), tmp_path, tokenizer)
    assert "weights differ" not in caplog.text


CASTS = {
    "bfloat16": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "half": (lambda model: model.half(), torch.float16),
    "double": (lambda model: model.double(), torch.float64),
    "to_both": (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
    "back": (lambda model: model.bfloat16().float(), torch.float32),
}


@pytest.mark.parametrize(
    ("method", "cast"),
    [*((method, "bfloat16") for method in ("gradient", "enn", "memit")), *(("mend", cast) for cast in CASTS)],
)
def test_a_cast_is_the_bases_and_the_editor_stays_in_float32(tokenizer, method, cast):
    convert, dtype = CASTS[cast]
    torch.manual_seed(0)
    model = EditableModel(build_model("llama"), EditorConfig(method=method), tokenizer)
    torch.manual_seed(0)
    cast_before = EditableModel(convert(build_model("llama")), EditorConfig(method=method), tokenizer)
    state = {name: value.clone() for name, value in model.editor.state_dict().items()}
    assert convert(model) is model and model.dtype == dtype
    for name, value in model.editor.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name])
    for one in (model, cast_before):
        one.edit(PROMPT, TARGET, max_steps=2)
    assert torch.equal(all_logits(model, tokenizer), all_logits(cast_before, tokenizer))
    model.undo()
    assert model.edits.find(PROMPT) == []


def test_a_cast_after_an_edit_keeps_it_and_what_is_learnt(tokenizer):
    model = EditableModel(build_model("llama"), tokenizer=tokenizer)
    model.edit(PROMPT, TARGET)
    learnt = {name: value.clone() for name, value in model.editor.state_dict().items()}
    edited = all_logits(model, tokenizer)
    model.to(torch.bfloat16)
    assert all(torch.equal(value, learnt[name]) for name, value in model.editor.state_dict().items())
    torch.testing.assert_close(all_logits(model, tokenizer).float(), edited, rtol=0.1, atol=0.1)
    assert model.edit(RECORDS[1].prompt, RECORDS[1].target).steps > 0


def test_moves_reach_the_editor_and_its_statistics():
    model = EditableModel(build_model("llama"))
    assert model.to("cpu") is model.cpu() is model
    parameters = [*model.base_model.parameters(), *model.editor.buffers()]
    assert model.to("meta", torch.bfloat16) is model
    everything = [*model.base_model.parameters(), *model.editor.parameters(), *model.editor.buffers()]
    assert len(everything) == len(parameters) and all(tensor.is_meta for tensor in everything)
    assert {tensor.dtype for tensor in model.editor.buffers()} == {torch.float32}


def test_a_float64_base_is_merged_in_float64(tokenizer):
    model = editable(build_model("llama").double(), tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    layer = model.targets[0].module
    before, (u, v) = layer.weight.clone(), model.edits[0].updates[model.targets[0].name]
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight += 1e-12 * torch.randn_like(layer.weight)
    fine = layer.weight - before
    model.merge_and_unload()
    left = layer.weight - before - (v.T @ u).double()
    torch.testing.assert_close(left, fine, rtol=0, atol=1e-14)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As scripts set it that load models in half the memory."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = [torch.bfloat16, torch.float64]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(
            method,
            dtype,
            id=f"{method}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if dtype is torch.float64 and method != "mend" else [],
        )
        for method in registered_methods()
        for dtype in DEFAULTS
    ],
)
def test_edits_do_not_depend_on_torchs_default_dtype(tokenizer, tmp_path, method, dtype):
    prompts, targets = [record.prompt for record in RECORDS[:3]], [record.target for record in RECORDS[:3]]
    found = []
    for number, default in enumerate((torch.float32, dtype)):
        base = build_model("llama")
        with default_dtype(default):
            torch.manual_seed(1)
            config = small_config(method, **fitting(method, num_steps=3, kl_texts=2))
            model = EditableModel(base, config, tokenizer).eval()
            results = model.edit(prompts, targets, max_steps=2)
            model.save_lora(tmp_path / str(number))
            found.append(([dict(edit.updates) for edit in model.edits], [r.probability_after for r in results]))
            assert {value.dtype for value in model.editor.state_dict().values()} <= {torch.float32, torch.int64}
    assert found[0][1] == found[1][1]
    for ours, theirs in zip(*(edits for edits, _ in found), strict=True):
        for name, pair in ours.items():
            assert all(torch.equal(one, other) for one, other in zip(pair, theirs[name], strict=True))
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "1" / "adapter_model.safetensors").values())


@pytest.mark.parametrize("dtype", DEFAULTS, ids=["bfloat16", "float64"])
def test_training_does_not_depend_on_torchs_default_dtype(tokenizer, tmp_path, dtype):
    found = []
    for default in (torch.float32, dtype):
        base = build_model("llama")
        with default_dtype(default):
            torch.manual_seed(0)
            model = get_editable_model(base, small_config(), tokenizer)
            trainer = EditorTrainer(model, arguments(tmp_path, max_steps=2), RECORDS, questions=QUESTIONS)
            trainer.train()
            found.append(model.editor.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
