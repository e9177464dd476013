"""Experts held as 3-D parameters: an edit acts beside all of a block's, from their input to their output."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from support.architectures import build
from support.gradients import autograd_gradients, encoder_for, queries
from support.models import RECORDS, all_logits, small_config
from torch import nn

from hf_mend import EditableModel
from hf_mend.bases.experts import experts_widths
from hf_mend.bases.gradients import trace
from hf_mend.bases.split import SplitModel


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def edited_mixture(tokenizer, base=None, **options) -> EditableModel:
    torch.manual_seed(1)
    config = small_config(**{"normalize": False, "whiten": False, "edit_lr": 0.1, **options})
    return EditableModel(build("mixtral") if base is None else base, config, tokenizer).eval()


class Experts(nn.Module):
    """Parameters as transformers' experts have them, of widths that are all different."""

    def __init__(self, transposed: bool, gate: bool):
        super().__init__()
        up, down = (3, 5, 16) if gate else (3, 5, 8), (3, 8, 7)
        self.is_transposed, self.has_gate = transposed, gate
        shapes = (up, down) if transposed else tuple((count, out, into) for count, into, out in (up, down))
        setattr(self, "gate_up_proj" if gate else "up_proj", nn.Parameter(torch.zeros(shapes[0])))
        self.down_proj = nn.Parameter(torch.zeros(shapes[1]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_widths_are_those_of_what_the_experts_compute(transposed, gate):
    assert experts_widths(Experts(transposed, gate)) == (5, 7)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2)])
def test_other_modules_are_no_experts(module):
    assert experts_widths(module) is None


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_factors_are_the_gradient_however_the_experts_run(tokenizer, implementation):
    base = build("mixtral")
    base.set_experts_implementation(implementation)
    model = edited_mixture(tokenizer, base)
    rows = encoder_for(base, tokenizer)(queries())
    expected = autograd_gradients(base, model.targets, rows)
    factors, _ = trace(SplitModel(base, model.targets), model.targets, rows.inputs, rows.next_tokens)
    assert list(factors) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    for name, (x, delta) in factors.items():
        torch.testing.assert_close(torch.einsum("bto,bti->oi", delta, x), expected[name], rtol=1e-3, atol=1e-5)


def test_an_edit_is_a_linear_layer_beside_the_experts(tokenizer):
    model = edited_mixture(tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    by_hand = build("mixtral")
    for name, (u, v) in model.edits[0].updates.items():
        by_hand.get_submodule(name).register_forward_hook(
            lambda _, args, output, matrix=u.T @ v: output + args[0] @ matrix
        )
    torch.testing.assert_close(all_logits(model, tokenizer), all_logits(by_hand, tokenizer), rtol=1e-4, atol=1e-5)


def test_offloaded_experts_are_edited_alike(tokenizer):
    expected = edited_mixture(tokenizer).edit(PROMPT, TARGET, max_steps=1)
    model = edited_mixture(tokenizer, cpu_offload(build("mixtral"), execution_device="cpu"))
    result = model.edit(PROMPT, TARGET, max_steps=1)
    assert result.probability_after == pytest.approx(expected.probability_after, rel=1e-4)


def test_edits_belong_to_the_experts_that_they_were_made_beside(tokenizer, tmp_path, caplog):
    model = edited_mixture(tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    model.save_edits(tmp_path)
    other = build("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(2)
    edited_mixture(tokenizer).load_edits(tmp_path)
    assert "the weights differ" not in caplog.text
    edited_mixture(tokenizer, other).load_edits(tmp_path)
    assert "the shapes fit but the weights differ" in caplog.text


def test_attention_is_edited_where_an_edit_is_to_be_merged(tokenizer):
    model = edited_mixture(tokenizer, target_modules=["o_proj"])
    model.edit(PROMPT, TARGET, max_steps=1)
    edited = all_logits(model, tokenizer)
    torch.testing.assert_close(all_logits(model.merge_and_unload(), tokenizer), edited, rtol=1e-3, atol=1e-4)


def test_experts_that_do_not_run_are_named(tokenizer):
    base = build("mixtral")
    for block in base.model.layers:
        block.mlp.forward = lambda hidden: hidden  # as a kernel for the whole block would
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.experts' did not run.*use_kernels=False"):
        edited_mixture(tokenizer, base).edit(PROMPT, TARGET)


def test_logits_that_are_not_the_next_tokens_are_refused(llama, tokenizer):
    model = EditableModel(llama, small_config(), tokenizer).eval()
    handle = llama.lm_head.register_forward_pre_hook(lambda _, args: (args[0][:, 1:],))
    try:
        with pytest.raises(ValueError, match=r"LlamaForCausalLM gives logits at positions \(1, \d+\) for tokens"):
            model.edit(PROMPT, TARGET)
    finally:
        handle.remove()
