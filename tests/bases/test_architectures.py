"""Every architecture of the list, end to end on a tiny random model: trace, split, edit, undo, save, LoRA."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from support.architectures import CAUSAL, SEQ2SEQ, build
from support.gradients import autograd_gradients, encoder_for, queries
from support.models import RECORDS, EditableModel, all_logits, small_config
from support.slow import slow_but
from support.training import QUESTIONS, arguments, losses
from transformers import PreTrainedModel

import hf_mend
from hf_mend import EditorConfig, EditorTrainer, get_editable_model
from hf_mend.bases.gradients import trace
from hf_mend.bases.split import SplitModel, logits_of
from hf_mend.bases.targets import find_targets


# Its blocks hand global tokens on beside the hidden state, so every pass runs the whole model.
NOT_SPLIT = {"pegasus_x"}
# Edits act beside the experts, of which they are no weight: they cannot be merged or exported.
BESIDE_EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss"}


# One of each kind; the others run with the slow tests.
FAST = [
    "llama", "gemma2", "opt", "gpt2", "gptj", "gpt_neox", "mixtral", "deepseek_v3",
    "t5", "t5 (gated, flan and v1.1)", "bart", "pegasus_x",
]  # fmt: skip


@pytest.fixture(params=slow_but(FAST, [*CAUSAL, *SEQ2SEQ]))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(name: str) -> PreTrainedModel:
    return build(name)


def test_factors_are_autograds_weight_gradient_and_passes_can_be_split(base, name, tokenizer, caplog):
    targets = find_targets(base, EditorConfig(target_modules="paper"))
    rows = encoder_for(base, tokenizer)(queries())
    expected = autograd_gradients(base, targets, rows)
    split = SplitModel(base, targets)
    factors, _ = trace(split, targets, rows.inputs, rows.next_tokens)
    for target in targets:
        x, delta = factors[target.name]
        gradient = torch.einsum("bto,bti->oi", delta, x)
        want = expected[target.name]
        want = want.T if want.shape != gradient.shape else want
        torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-5)
    warned = [r.getMessage() for r in caplog.records if r.name.startswith("hf_mend")]
    if name in NOT_SPLIT:
        assert len(warned) == 1 and "every pass runs the whole model instead" in warned[0]
    else:
        assert warned == [], "the shortcut is used"
    with torch.no_grad():
        state = split.run_below(rows.inputs)
        whole = base(**rows.inputs).logits[rows.positions]
        torch.testing.assert_close(logits_of(split, rows, state), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["default", "paper"])
def test_edit_undo_save_load_and_lora(base, name, tokenizer, tmp_path, choice, caplog):
    torch.manual_seed(1)
    config = small_config(normalize=False, whiten=False, edit_lr=0.1, target_modules=choice, layers_to_transform=None)
    model = EditableModel(base, config, tokenizer).eval()
    plain = all_logits(model, tokenizer)
    result = model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1)
    assert result.probability_after != result.probability_before
    edited = all_logits(model, tokenizer)
    assert not torch.equal(edited, plain)
    model.save_edits(tmp_path / "edits")
    if name in BESIDE_EXPERTS:
        with pytest.raises(
            ValueError, match=r"mlp\.experts' is all experts of its block.*target_modules=\['o_proj'\]"
        ):
            model.save_lora(tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
    else:
        model.save_lora(tmp_path / "lora")
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)
    again = EditableModel(build(name), config, tokenizer).eval()
    again.load_edits(tmp_path / "edits")
    assert torch.equal(all_logits(again, tokenizer), edited)
    with again.disable_edits():
        assert torch.equal(all_logits(again, tokenizer), plain)
    if name in BESIDE_EXPERTS:
        with pytest.raises(TypeError, match="beside a block's experts .* cannot be merged"):
            again.merge_and_unload()
        assert torch.equal(all_logits(again, tokenizer), edited)
        return
    if name == "deepseek_v3":
        assert "fuses its experts' weights" in caplog.text  # PEFT would load it wrong, and the user is told
    else:
        peft = PeftModel.from_pretrained(build(name), str(tmp_path / "lora")).eval()
        torch.testing.assert_close(all_logits(peft, tokenizer), edited, rtol=1e-3, atol=1e-4)
    back = EditableModel(build(name), config, tokenizer).eval()
    back.load_lora(tmp_path / "lora")
    assert torch.equal(all_logits(back, tokenizer), edited)
    torch.testing.assert_close(all_logits(again.merge_and_unload(), tokenizer), edited, rtol=1e-3, atol=1e-4)


def test_calibration_text_and_an_edit_without_an_editor(base, tokenizer):
    model = EditableModel(base, tokenizer=tokenizer)
    plain = all_logits(model, tokenizer)
    result = model.edit(RECORDS[0].prompt, RECORDS[0].target)
    assert result.steps > 0 and result.probability_after > result.probability_before
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)


def test_training(base, tokenizer, tmp_path):
    torch.manual_seed(0)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    config = small_config(target_modules="default", layers_to_transform=None)
    model = get_editable_model(base, config, tokenizer)
    before = {name: value.clone() for name, value in model.editor.named_parameters()}
    trainer = EditorTrainer(model, arguments(tmp_path, max_steps=2), RECORDS, questions=QUESTIONS)
    trainer.train()
    assert all(math.isfinite(value) for value in losses(trainer))
    assert any(not torch.equal(value, before[name]) for name, value in model.editor.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


def test_the_page_lists_what_is_tested():
    from write_architectures import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run PYTHONPATH=tests python docs/write_architectures.py"


def test_the_sweep_tells_what_is_exact_from_what_fails(monkeypatch):
    from sweep_model_types import NO_TEXT, SETTINGS, all_types, check

    assert {*NO_TEXT, *SETTINGS} <= {*all_types()} and not {*NO_TEXT} & {*SETTINGS}
    assert check("llama") == {"result": "exact", "why": "", "layers": ["mlp.down_proj"]}
    assert check("blip")["result"] == "refused"
    monkeypatch.setattr(hf_mend.EditableModel, "undo", lambda model: None)
    found = check("llama")
    assert (found["result"], found["why"]) == ("failing", "an undo does not restore the logits")
