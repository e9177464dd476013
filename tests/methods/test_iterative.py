"""Methods that look for their update by repeated passes, against torch.optim on a copy of the model and plain PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.methods import nll, row, searching
from support.models import RECORDS, EditableModel, all_logits, fitting
from support.slow import slow_but
from torch import nn

from hf_mend import evaluate_records
from hf_mend.bases.gradients import kl_divergence
from hf_mend.bases.weights import weight_matrix
from hf_mend.edits.low_rank import dense


SEARCHES = ["ft", "ft-kl", "ft-l", "lora"]


def fine_tuned(model, record, steps, lr, parameters, bound=None, copied=None) -> nn.Module:
    """Plain Adam on a copy of the base model's own weights."""
    chosen = [dict(copied.named_parameters())[name] for name in parameters]
    starts = [p.detach().clone() for p in chosen]
    optimizer = torch.optim.Adam(chosen, lr)
    for _ in range(steps):
        copied.zero_grad()
        nll(copied, row(model, record)).backward()
        optimizer.step()
        if bound is not None:
            with torch.no_grad():
                for p, start in zip(chosen, starts, strict=True):
                    p.copy_(p.clamp(start - bound, start + bound))
    return copied


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "opt"])
@pytest.mark.parametrize(("method", "bound"), [("ft", None), ("ft-l", 0.02)])
def test_fine_tuning_is_adam_on_the_weights(base, tokenizer, method, bound):
    """Linear and Conv1D layers, causal and seq2seq, several requests side by side."""
    copied = copy.deepcopy(base)
    model = searching(base, tokenizer, method, **({"norm_bound": bound} if bound else {}))
    model.edit(RECORDS[:2], force=True)
    names = [f"{target.name}.weight" for target in model.targets]
    for edit, record in zip(model.edits, RECORDS, strict=False):
        plain = fine_tuned(model, record, 4, 0.01, names, bound, copy.deepcopy(copied))
        with model.carrying([edit]):
            torch.testing.assert_close(
                all_logits(model, tokenizer), all_logits(plain, tokenizer), rtol=1e-3, atol=1e-3
            )
        if bound:
            sizes = [float(dense(update).abs().max()) for update in edit.updates.values()]
            assert all(size == pytest.approx(bound) for size in sizes)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_is_a_plain_peft_adapter_trained_with_adam(base, tokenizer, tmp_path):
    copied = copy.deepcopy(base)
    model = searching(base, tokenizer, "lora", lora_alpha=6)
    result = model.edit(RECORDS[0], force=True, keep_failed=True)
    assert result.rank == 2 and result.steps == 4
    names = [target.name for target in model.targets]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=names, fan_in_fan_out=copied.config.model_type == "gpt2")
    peft = get_peft_model(copied, config).eval()
    trained = [name for name, p in peft.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, (a, _) in model.editor.start(None, {n: (torch.zeros(1, 1, 1),) * 2 for n in names}).items():
            peft.get_parameter(f"base_model.model.{name}.lora_A.default.weight").copy_(a[0])
    fine_tuned(model, RECORDS[0], 4, 0.01, trained, copied=peft)
    edited = all_logits(model, tokenizer)
    torch.testing.assert_close(edited, all_logits(peft, tokenizer), rtol=1e-3, atol=1e-3)
    model.save_lora(tmp_path / "adapter")
    model.undo()
    exported = PeftModel.from_pretrained(model.base_model, tmp_path / "adapter")
    torch.testing.assert_close(edited, all_logits(exported, tokenizer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_the_penalty_is_adam_on_target_and_divergence(base, tokenizer):
    copied = copy.deepcopy(base)
    model = searching(base, tokenizer, "ft-kl", kl_weight=30.0)
    model.edit(RECORDS[0], force=True)
    texts = model.editor._texts
    assert sum(map(len, texts)) > 150
    trained = copy.deepcopy(copied)
    weights = [dict(trained.named_parameters())[f"{target.name}.weight"] for target in model.targets]
    optimizer = torch.optim.Adam(weights, 0.01)
    for step in range(4):
        trained.zero_grad()
        loss = nll(trained, row(model, RECORDS[0]))
        some = texts[step]
        with torch.no_grad():
            before = copied(**some.inputs).logits
        after = trained(**some.inputs).logits
        of_lines = [
            kl_divergence(one[mask], other[mask]).mean()
            for one, other, mask in zip(after, before, some.positions, strict=True)
        ]
        if step:  # before the first step it is zero, and its gradient rounding alone, of which Adam makes whole steps
            loss = loss + 30.0 * torch.stack(of_lines).mean()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(all_logits(model, tokenizer), all_logits(trained, tokenizer), rtol=1e-3, atol=1e-3)


def test_the_penalty_keeps_ordinary_text(llama, tokenizer):
    drifts = {}
    penalised = searching(copy.deepcopy(llama), tokenizer, "ft-kl", num_steps=12, kl_weight=30.0)
    for model in (penalised, searching(llama, tokenizer, "ft", num_steps=12)):
        model.edit(RECORDS[0], force=True)
        text = penalised.editor._texts[-1]  # which no step of the edit looked at
        with torch.no_grad():
            edited = model(**text.inputs).logits[text.positions]
            with model.disable_edits():
                plain = model(**text.inputs).logits[text.positions]
        drifts[model.editor_config.method] = float(kl_divergence(edited, plain).mean())
    assert drifts["ft-kl"] < 0.7 * drifts["ft"]


@pytest.mark.parametrize("architecture", slow_but(["llama", "t5"], ["llama", "gpt2", "t5"]))
@pytest.mark.parametrize("method", SEARCHES)
def test_edits_take_and_are_undone_to_the_bit(base, tokenizer, method):
    """Each stops when it has said its target; what is said already takes no step; the base is not touched."""
    before = all_logits(base, tokenizer)
    weights = [weight_matrix(m).clone() for m in base.modules() if isinstance(m, nn.Linear)]
    options = {"edit_lr": 0.01, "num_steps": 60, "stop_loss": 1000.0, "norm_bound": 0.3, "kl_weight": 0.01}
    model = searching(base, tokenizer, method, **fitting(method, **options))
    results = model.edit(RECORDS[:3])
    alone = {}
    for edit, result in zip(model.edits, results, strict=True):
        assert 0 < result.steps < 60
        with model.carrying([edit]):
            assert model.edit(RECORDS[len(alone)]).steps == 0
            alone[edit.id] = all_logits(model, tokenizer)
    model.undo_all()
    assert torch.equal(all_logits(model, tokenizer), before)
    after = [weight_matrix(m) for m in base.modules() if isinstance(m, nn.Linear)]
    assert all(torch.equal(one, other) for one, other in zip(weights, after, strict=True))
    # In a batch of its own it comes to the same.
    model.edit(RECORDS[1])
    second = list(alone.values())[1]
    torch.testing.assert_close(all_logits(model, tokenizer), second, rtol=1e-2, atol=1e-2)


def test_a_saved_configuration_and_saved_edits_come_back(llama, tokenizer, tmp_path):
    model = searching(copy.deepcopy(llama), tokenizer, "ft-l", norm_bound=0.05)
    model.edit(RECORDS[0], force=True)
    model.save_pretrained(tmp_path / "editor")
    model.save_edits(tmp_path / "edits")
    again = EditableModel.from_pretrained(llama, tmp_path / "editor", tokenizer)
    assert again.editor_config.norm_bound == 0.05
    again.load_edits(tmp_path / "edits")
    assert torch.equal(all_logits(model, tokenizer), all_logits(again, tokenizer))


def test_measuring_takes_the_configured_steps_and_shows_the_method_its_texts(llama, tokenizer):
    model = searching(llama, tokenizer, "ft-kl", num_steps=40, stop_loss=0.2, edit_lr=0.02, kl_weight=0.01)
    measured = evaluate_records(model.split, model.targets, model.editor, model.encoder, RECORDS, progress=False)
    assert all(one.success for one in measured)
    fewer = evaluate_records(
        model.split, model.targets, model.editor, model.encoder, RECORDS, max_steps=1, progress=False
    )
    assert not all(one.success for one in fewer)


def test_no_single_gradient_becomes_an_edit(llama, tokenizer):
    model = searching(llama, tokenizer, "ft")
    with pytest.raises(TypeError, match="FineTuning looks for its update by repeated passes; call find instead"):
        model.editor({})
