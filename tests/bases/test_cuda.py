"""On an NVIDIA GPU: what the same calls give on the CPU, and training, memory and device maps there."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accelerate import dispatch_model
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, fitting, small_config
from support.training import QUESTIONS, arguments, losses

from hf_mend import EditorTrainer, get_editable_model
from hf_mend.edits.low_rank import dense
from hf_mend.evaluation.evaluate import evaluate
from hf_mend.methods.base import registered_methods
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import TrainingExamples


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = torch.device("cuda:0")
T5_AROUND = ["embed_tokens", "final_layer_norm", "dropout"]
logits = partial(all_logits, device=GPU)
PROMPTS, TARGETS = [r.prompt for r in RECORDS[:3]], [r.target for r in RECORDS[:3]]


def assert_same_edits(one: EditableModel, other: EditableModel, tolerance: float = 1e-3) -> None:
    for mine, theirs in zip(one.edits, other.edits, strict=True):
        for name, (u, v) in mine.updates.items():
            ours, expected = dense((u.cpu(), v.cpu())), dense(tuple(side.cpu() for side in theirs.updates[name]))
            assert float((ours - expected).norm()) <= tolerance * float(expected.norm())


def test_an_edit_is_that_of_the_cpu(base, architecture, tokenizer, tmp_path):
    here, there = editable(copy.deepcopy(base), tokenizer), editable(base.to(GPU), tokenizer)
    assert there.device == GPU and {p.device for p in there.editor.parameters()} == {GPU}
    before = logits(there, tokenizer)
    results = [model.edit(PROMPTS, TARGETS) for model in (here, there)]
    for mine, theirs in zip(*results, strict=True):
        assert mine.after == theirs.after and mine.steps == theirs.steps
        assert mine.probability_after == pytest.approx(theirs.probability_after, rel=1e-3, abs=1e-6)
    assert_same_edits(here, there)
    edited = logits(there, tokenizer)
    torch.testing.assert_close(edited, all_logits(here, tokenizer), rtol=1e-3, atol=1e-3)
    there.save_edits(tmp_path)
    there.undo_all()
    assert torch.equal(logits(there, tokenizer), before)
    there.load_edits(tmp_path)
    assert torch.equal(logits(there, tokenizer), edited)
    with there.disable_edits():
        assert torch.equal(logits(there, tokenizer), before)
    torch.testing.assert_close(logits(there.merge_and_unload(), tokenizer), edited, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("method", registered_methods())
def test_every_method_edits_as_on_the_cpu(base, tokenizer, method):
    torch.manual_seed(0)
    models = [
        EditableModel(weights, small_config(method, **fitting(method, num_steps=4, kl_texts=2)), tokenizer).eval()
        for weights in (copy.deepcopy(base), base)
    ]
    if models[0].editor.trains:
        calibrate(models[0], TrainingExamples(RECORDS, QUESTIONS), 4, 4)
        models[1].editor.load_state_dict(models[0].editor.state_dict())
    models[1].to(GPU)
    for prompts, targets in ((PROMPTS, TARGETS), ([RECORDS[3].prompt], [RECORDS[3].target])):  # beside those there
        results = [model.edit(prompts, targets, force=True) for model in models]
        for mine, theirs in zip(*results, strict=True):
            assert mine.steps == theirs.steps
            assert mine.probability_after == pytest.approx(theirs.probability_after, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("method", ["mend", "malmen", "ke", "enn"])
def test_training_begins_as_on_the_cpu(architecture, tokenizer, tmp_path, method):
    found = []
    for use_cpu in (True, False):
        torch.manual_seed(0)
        model = get_editable_model(build_model(architecture), small_config(method=method), tokenizer)
        options = {"use_cpu": use_cpu, "max_steps": 3, "per_device_train_batch_size": 4, "group_size": 2}
        kept = {} if use_cpu else {"hidden_states_dir": str(tmp_path / "states")}
        trainer = EditorTrainer(
            model, arguments(tmp_path, **options, **kept), RECORDS, eval_dataset=RECORDS, questions=QUESTIONS
        )
        trainer.train()
        found.append((losses(trainer), trainer.evaluate()))
    assert found[1][0][0] == pytest.approx(found[0][0][0], rel=0.02)
    assert model.device == GPU and found[1][1].keys() == found[0][1].keys()


def test_training_in_mixed_precision(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = get_editable_model(build_model("llama"), small_config(), tokenizer)
    trainer = EditorTrainer(
        model, arguments(tmp_path, use_cpu=False, bf16=True, max_steps=12), RECORDS, questions=QUESTIONS
    )
    trainer.train()
    assert {p.dtype for p in model.editor.parameters()} == {torch.float32}
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_base_in_half_precision(base, tokenizer, dtype):
    model = editable(base.to(GPU, dtype), tokenizer)
    before = logits(model, tokenizer)
    result = model.edit(PROMPTS[0], TARGETS[0], max_steps=4)
    assert result.probability_after > result.probability_before
    model.undo()
    assert torch.equal(logits(model, tokenizer), before)


# From disk a base without tied weights alone: Accelerate (1.15) knows those by the address that they had in CPU
# memory, where, once they are on the GPU, what it reads from disk may come to lie.
@pytest.mark.parametrize(
    ("architecture", "elsewhere"), [("llama", "cpu"), ("llama", "disk"), ("gpt2", "cpu"), ("t5", "cpu")]
)
def test_a_base_that_is_only_partly_on_the_gpu(base, architecture, tokenizer, tmp_path, elsewhere):
    plain = editable(copy.deepcopy(base), tokenizer)
    stacks, around = {
        "llama": (["model.layers"], ["model.embed_tokens", "model.norm", "model.rotary_emb"]),
        "gpt2": (["transformer.h"], ["transformer.wte", "transformer.wpe", "transformer.ln_f"]),
        "t5": (
            ["encoder.block", "decoder.block"],
            ["shared", *(f"{half}.{name}" for half in ("encoder", "decoder") for name in T5_AROUND)],
        ),
    }[architecture]
    blocks = {f"{stack}.{i}": "cuda:0" if i < 2 else elsewhere for stack in stacks for i in range(4)}
    device_map = {**dict.fromkeys([*around, "lm_head"], "cuda:0"), **blocks}
    dispatched = dispatch_model(base, device_map, offload_dir=str(tmp_path), force_hooks=True)
    model = editable(dispatched, tokenizer)
    assert any(p.is_meta for p in dispatched.parameters())
    for one in (plain, model):
        one.edit(PROMPTS, TARGETS)
    assert_same_edits(model, plain)
    torch.testing.assert_close(logits(model, tokenizer), all_logits(plain, tokenizer), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["mend", "gradient"])
@pytest.mark.parametrize("edits", [(1, 2), (4,)])
def test_an_evaluation_measures_what_it_does_on_the_cpu(tokenizer, tmp_path, method, edits):
    states = []
    for device in ("cpu", GPU):
        model = editable(build_model("llama").to(device), tokenizer, method=method)
        states.append(evaluate(model, RECORDS, edits=edits, text="the capital of peru is a town " * 20))
        assert model.edits == []
    for mine, theirs in zip(*states, strict=True):
        assert mine.metrics == pytest.approx(theirs.metrics, rel=0.02, abs=1e-3)
        size = sum(p.numel() * p.element_size() for p in model.base_model.parameters())
        assert theirs.peak_memory is not None and theirs.peak_memory > size


def test_generation_and_observed_text(tokenizer):
    here, there = (editable(build_model("llama").to(device), tokenizer, method="memit") for device in ("cpu", GPU))
    said = []
    for model in (here, there):
        model.observe(["the capital of peru is lima", ("the river of", "spain")])
        model.edit(PROMPTS[0], TARGETS[0])
        inputs = tokenizer("the capital of france is", return_tensors="pt", return_token_type_ids=False)
        said.append(model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False).cpu())
    assert torch.equal(*said)
