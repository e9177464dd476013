"""KnowledgeEditor against its formula on autograd's own gradient, and through editing, training and saving."""

from __future__ import annotations

import pytest
import torch
from support.methods import SHAPES, factors, gradients
from support.models import RECORDS, EditableModel, all_logits, build_model, small_config
from support.slow import slow_but
from support.training import PARAPHRASES_ALONE, QUESTIONS, arguments

from hf_mend import EditorTrainer, get_editable_model
from hf_mend.bases.gradients import trace
from hf_mend.data.encoding import Query
from hf_mend.methods.ke import KnowledgeEditor
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditCollator, TrainingExamples
from hf_mend.training.objective import EditingObjective


def perturbed(model: EditableModel, amount: float = 0.1) -> EditableModel:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.editor.named_parameters():
            if name != "log_step":
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model


def calibrated(tokenizer, architecture="llama", **options) -> EditableModel:
    torch.manual_seed(0)
    model = get_editable_model(build_model(architecture), small_config(method="ke", **options), tokenizer)
    calibrate(model, TrainingExamples(RECORDS, QUESTIONS), 6, 3)
    return model


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_the_update_is_the_papers_formula_on_the_dense_gradient(tokenizer, architecture, normalize):
    model = perturbed(calibrated(tokenizer, architecture, normalize=normalize))
    editor = model.editor
    query = Query(RECORDS[0].prompt, RECORDS[0].target)
    rows = model.encoder([query])
    traced, _ = trace(model.split, model.targets, rows.inputs, rows.next_tokens)
    with torch.no_grad():
        updates = editor(traced)
        state = editor.condensed(traced)
    for i, (name, dense) in enumerate(gradients(model, query).items()):
        d_out, d_in = dense.shape
        with torch.no_grad():
            parts = [part[0] for part in editor.gates[i](state)]
        alpha, beta, gamma, delta = parts[:4]
        if normalize:
            for stats in (editor.x_stats[i], editor.delta_stats[i]):
                dense = dense / (stats.variance + stats.mean**2).mean().sqrt()
        step = model.editor_config.edit_lr * editor.log_step[i].exp() * parts[4].sigmoid()
        gate = d_out * torch.outer(alpha.softmax(0), gamma)
        expected = -step * (gate * dense + d_out * torch.outer(beta.softmax(0), delta))
        u, v = updates[name]
        assert u.shape == (1, traced[name][0].shape[1] + 1, d_in)
        torch.testing.assert_close(
            v[0].T @ u[0], expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max())
        )


def test_it_starts_as_a_step_down_the_gradient_and_every_parameter_gets_one():
    method = KnowledgeEditor(small_config(method="ke", normalize=False, edit_lr=0.5), SHAPES)
    updates = method(factors())
    for name, (x, delta) in factors().items():
        u, v = updates[name]
        torch.testing.assert_close(v.transpose(1, 2) @ u, -0.25 * delta.transpose(1, 2) @ x)
    random = KnowledgeEditor(small_config(method="ke", init="xavier", num_hidden_layers=2), SHAPES)
    random.observe_factors(factors(seed=1))
    sum(v.square().sum() * u.square().sum() for u, v in random(factors()).values()).backward()
    assert all(p.grad is not None and p.grad.any() and torch.isfinite(p.grad).all() for p in random.parameters())


def test_padding_and_the_other_edits_of_a_batch_change_nothing():
    method = KnowledgeEditor(small_config(method="ke", init="xavier"), SHAPES)
    method.observe_factors(factors(seed=1))
    whole = method(factors())
    for i, length in ((0, 3), (1, 5)):
        for left, right in ((0, 0), (2, 0), (0, 3), (1, 2)):
            pad = torch.nn.functional.pad
            alone = {
                name: tuple(pad(side[i : i + 1, :length], (0, 0, left, right)) for side in pair)
                for name, pair in factors().items()
            }
            for name, (u, v) in method(alone).items():
                theirs_u, theirs_v = whole[name]
                torch.testing.assert_close(v[0].T @ u[0], theirs_v[i].T @ theirs_u[i])


def test_an_edit_without_a_gradient_is_finite():
    method = KnowledgeEditor(small_config(method="ke", init="xavier"), SHAPES)
    nothing = {name: (torch.zeros_like(x), torch.zeros_like(delta)) for name, (x, delta) in factors().items()}
    assert all(torch.isfinite(side).all() for pair in method(nothing).values() for side in pair)


@pytest.mark.parametrize("architecture", slow_but(["llama"], ["llama", "t5"]))
def test_training_lowers_the_loss_and_the_editor_survives_its_file(tokenizer, tmp_path, architecture):
    torch.manual_seed(0)
    config = small_config(method="ke", rank=16)
    model = get_editable_model(build_model(architecture), config, tokenizer)
    args = arguments(tmp_path, max_steps=30, learning_rate=1e-2, step_learning_rate=0.1, lr_scheduler_type="constant",
                     group_size=2, **PARAPHRASES_ALONE)  # fmt: skip
    trainer = EditorTrainer(model, args, RECORDS, RECORDS[:2], questions=QUESTIONS)
    examples = TrainingExamples(RECORDS, QUESTIONS, seed=99)
    batch = EditCollator(model.encoder)([examples[i] for i in range(len(RECORDS))])
    calibrate(model, examples, 8, 4)
    first = float(EditingObjective(model)(batch).loss.detach())
    trainer.train()
    assert float(EditingObjective(model)(batch).loss.detach()) < first - 0.1
    assert trainer.evaluate()["eval_edit_success"] >= 0

    model.save_pretrained(tmp_path / "editor")
    again = EditableModel.from_pretrained(build_model(architecture), tmp_path / "editor", tokenizer)
    untouched = all_logits(again, tokenizer)
    for one in (model, again):
        one.eval().edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]], force=True, keep_failed=True)
    assert torch.equal(all_logits(model, tokenizer), all_logits(again, tokenizer))
    assert not torch.equal(all_logits(again, tokenizer), untouched)
    again.undo_all()
    assert torch.equal(all_logits(again, tokenizer), untouched)


def test_large_steps_in_two_stages_have_the_same_loss_and_gradient(tokenizer):
    model = perturbed(calibrated(tokenizer))
    examples = TrainingExamples(RECORDS, QUESTIONS)
    batch = EditCollator(model.encoder)([examples[i] for i in range(4)])
    found = []
    for at_once in (None, 1):
        model.editor.zero_grad()
        loss = EditingObjective(model)(batch, group_size=2, micro_batch_size=at_once).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.editor.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
