"""Editable Neural Networks: a plain step beside a trained change of the base, which acts once, and with an edit."""

from __future__ import annotations

import copy

import pytest
import torch
from support.methods import gradients
from support.models import RECORDS, EditableModel, all_logits, build_model, small_config
from support.training import QUESTIONS, arguments

from hf_mend import EditorTrainer, EditStore, evaluate_records, get_editable_model
from hf_mend.bases.weights import add_to_weight_
from hf_mend.data.encoding import Query
from hf_mend.editing.search import find_updates
from hf_mend.edits.low_rank import as_pair, dense
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditCollator, TrainingExamples
from hf_mend.training.losses import editing_loss
from hf_mend.training.objective import EditingObjective


def changed(tokenizer, architecture="llama", seed=7, **options) -> EditableModel:
    """A model whose editor has a change of the base that is far from zero."""
    torch.manual_seed(0)
    model = get_editable_model(build_model(architecture), small_config(method="enn", **options), tokenizer)
    calibrate(model, TrainingExamples(RECORDS, QUESTIONS), 6, 3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for change in model.editor.changes:
            change.copy_(0.03 * torch.randn(change.shape, generator=generator))
    return model.eval()


def by_hand(model: EditableModel, updates=()) -> torch.nn.Module:
    """A plain copy of the base with the change, and updates, in its weights."""
    with model.disable_edits():  # a copy takes hooks along
        base = copy.deepcopy(model.base_model)
    for target, change in zip(model.targets, model.editor.changes, strict=True):
        module = base.get_submodule(target.name)
        add_to_weight_(module, change.detach())
        for update in updates:
            add_to_weight_(module, dense(update[target.name]))
    return base


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_the_update_is_a_gradient_step_of_the_changed_model(tokenizer, architecture):
    model = changed(tokenizer, architecture)
    editor = model.editor
    query = Query(RECORDS[0].prompt, RECORDS[0].target)
    found = find_updates(model.context, [model.encoder([query])])[0]
    plain = get_editable_model(by_hand(model), small_config(method="enn"), tokenizer)
    for i, (name, gradient) in enumerate(gradients(plain, query).items()):
        u, v = found.updates[name]
        sizes = [(s.variance + s.mean**2).mean().sqrt() for s in (editor.x_stats[i], editor.delta_stats[i])]
        step = model.editor_config.edit_lr * editor.log_step[i].detach().exp()
        expected = -step * gradient / sizes[0] / sizes[1]
        torch.testing.assert_close(v[0].T @ u[0], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    rows = model.encoder([query])
    with torch.no_grad():
        right = model.base_model(**rows.inputs).logits[rows.positions].argmax(-1) == rows.next_tokens[rows.positions]
    assert found.before.correct[0] == right.tolist(), "before is what the untouched base says"


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_two_edits_carry_the_change_once_and_undoing_both_gives_the_base(tokenizer, architecture):
    model = changed(tokenizer, architecture)
    untouched = all_logits(model, tokenizer)
    first = model.edit(RECORDS[0].prompt, RECORDS[0].target, force=True, max_steps=1)
    with_one = all_logits(model, tokenizer)
    model.edit(RECORDS[1].prompt, RECORDS[1].target, force=True, max_steps=1)
    support, *edits = model.edits
    assert support.is_base_delta and [edit.prompt for edit in edits] == [record.prompt for record in RECORDS[:2]]
    close(all_logits(model, tokenizer), all_logits(by_hand(model, [edit.updates for edit in edits]), tokenizer))
    with model.disable_edits():
        assert torch.equal(all_logits(model, tokenizer), untouched)
    assert model.undo().id == edits[1].id
    assert torch.equal(all_logits(model, tokenizer), with_one)
    model.disable_edit(first.id)
    assert torch.equal(all_logits(model, tokenizer), untouched), "no edit acts, nor does the change"
    model.enable_edit(first.id)
    assert torch.equal(all_logits(model, tokenizer), with_one)
    model.undo()
    assert not model.edits and torch.equal(all_logits(model, tokenizer), untouched)


def test_edits_of_one_call_and_of_one_prompt_see_the_change_once(tokenizer):
    model = changed(tokenizer)
    model.edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]], force=True, max_steps=1)
    both = all_logits(model, tokenizer)
    close(both, all_logits(by_hand(model, [edit.updates for edit in model.edits if edit.requires]), tokenizer))
    model.undo()
    again = model.edit(RECORDS[0].prompt, RECORDS[2].target, force=True, max_steps=1)
    acting = [edit.updates for edit in model.edits.active if edit.requires]
    assert len(acting) == 1 and again.superseded
    close(all_logits(model, tokenizer), all_logits(by_hand(model, acting), tokenizer))


def test_edits_go_wherever_others_do_and_take_the_change_along(tokenizer, tmp_path):
    model = changed(tokenizer)
    untouched = all_logits(model, tokenizer)
    model.edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]], force=True, max_steps=1)
    edited = all_logits(model, tokenizer)
    model.save_edits(tmp_path / "edits")
    model.save_lora(tmp_path / "lora")
    other = get_editable_model(build_model("llama"), small_config(), tokenizer)
    for load, folder in ((other.load_edits, "edits"), (other.load_lora, "lora")):
        load(tmp_path / folder)
        close(all_logits(other, tokenizer), edited)
        other.undo_all()
        assert torch.equal(all_logits(other, tokenizer), untouched)
    other.open_store(tmp_path / "store")
    other.load_edits(tmp_path / "edits")
    from_store = get_editable_model(build_model("llama"), small_config(), tokenizer)
    from_store.open_store(tmp_path / "store")
    assert torch.equal(all_logits(from_store, tokenizer), all_logits(other, tokenizer))
    model.compress_edits(rank=64)
    close(all_logits(model, tokenizer), edited)
    model.edit(RECORDS[2].prompt, RECORDS[2].target, force=True, max_steps=1)
    parts = [edit.updates for edit in model.edits if edit.requires]
    expected = all_logits(by_hand(model, parts), tokenizer)
    close(all_logits(model, tokenizer), expected)
    close(all_logits(model.merge_and_unload(), tokenizer), expected)


def test_an_edit_without_its_change_is_refused(tokenizer, tmp_path):
    model = changed(tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, force=True)
    support, edit = model.edits
    message = rf"the edit '{edit.id}' acts with the change '{support.id}' beside it, which is missing; take it along"
    with pytest.raises(ValueError, match=message):
        model.save_lora(tmp_path / "lora", [edit])
    with pytest.raises(ValueError, match=message), model.carrying([edit]):
        pass
    with pytest.raises(ValueError, match=rf"'{edit.id}' acts with the change '{support.id}', which stays with it"):
        model.undo(support.id)
    with model.carrying([support, edit]):
        pass
    before = all_logits(model, tokenizer)
    with torch.no_grad():
        model.editor.changes[0].add_(0.01)
    with pytest.raises(ValueError, match=rf"carries edits that act with the change '{support.id}', and this editor's"):
        model.edit(RECORDS[1].prompt, RECORDS[1].target, force=True)
    assert torch.equal(all_logits(model, tokenizer), before)
    model.compress_edits(2)  # the one that stands for both acts with that change too
    with pytest.raises(ValueError, match=rf"carries edits that act with the change '{support.id}', and this editor's"):
        model.edit(RECORDS[1].prompt, RECORDS[1].target, force=True)


@pytest.mark.parametrize("options", [{"group_size": 2}, {"calls_per_batch": 2}])
def test_the_loss_is_that_of_the_changed_model_against_the_untouched_base(tokenizer, options):
    """The same method without a change, on a base that has it in its weights, but for what must stay."""
    model = changed(tokenizer)
    examples = TrainingExamples(RECORDS, QUESTIONS)
    batch = EditCollator(model.encoder)([examples[i] for i in range(4)])
    loss = EditingObjective(model)(batch, locality_weights={"neighborhood": 2.0}, **options)
    plain = get_editable_model(by_hand(model), small_config(method="enn"), tokenizer)
    plain.editor.load_state_dict(model.editor.state_dict())
    with torch.no_grad():
        for change in plain.editor.changes:
            change.zero_()
    theirs = EditingObjective(plain)(batch, **options)
    torch.testing.assert_close(loss.edit, theirs.edit, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loss.locality["unrelated"], theirs.locality["unrelated"])
    loss.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.editor.parameters())


def test_large_steps_in_two_stages_have_the_same_loss_and_gradient(tokenizer):
    model = changed(tokenizer)
    examples = TrainingExamples(RECORDS, QUESTIONS)
    batch = EditCollator(model.encoder)([examples[i] for i in range(4)])
    found = []
    for at_once in (None, 1):
        model.editor.zero_grad()
        loss = editing_loss(model.context, batch, group_size=2, micro_batch_size=at_once)
        loss.loss.backward()
        found.append((loss.loss.detach(), [p.grad.clone() for p in model.editor.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss_and_the_editor_survives_its_file(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = get_editable_model(build_model("llama"), small_config(method="enn"), tokenizer)
    args = arguments(tmp_path, max_steps=20, learning_rate=5e-3, step_learning_rate=0.1, lr_scheduler_type="constant")
    trainer = EditorTrainer(model, args, RECORDS, RECORDS[:2], questions=QUESTIONS)
    examples = TrainingExamples(RECORDS, QUESTIONS, seed=99)
    batch = EditCollator(model.encoder)([examples[i] for i in range(len(RECORDS))])
    calibrate(model, examples, 8, 4)
    first = float(EditingObjective(model)(batch).loss.detach())
    trainer.train()
    assert float(EditingObjective(model)(batch).loss.detach()) < first - 0.1
    assert all(change.any() for change in model.editor.changes)
    model.save_pretrained(tmp_path / "editor")
    again = EditableModel.from_pretrained(build_model("llama"), tmp_path / "editor", tokenizer)
    for one in (model, again):
        one.eval().edit(RECORDS[0].prompt, RECORDS[0].target, force=True)
    assert torch.equal(all_logits(model, tokenizer), all_logits(again, tokenizer))


def test_measured_edits_are_those_that_are_made(tokenizer):
    model = changed(tokenizer)
    measured = evaluate_records(
        model.split, model.targets, model.editor, model.encoder, RECORDS[:3], max_steps=3, progress=False
    )
    for record, one in zip(RECORDS, measured, strict=False):
        with model.edited(record.prompt, record.target, force=True, max_steps=3) as result:
            assert result.success == one.success
            texts = [model.encoder([Query(text)]) for text in record.neighborhood]
            after = [model(**rows.inputs).logits[rows.positions].argmax() for rows in texts]
        before = [model(**rows.inputs).logits[rows.positions].argmax() for rows in texts]
        stayed = [bool(a == b) for a, b in zip(after, before, strict=True)]
        assert one.neighborhood == pytest.approx(sum(stayed) / len(stayed))


def test_a_pair_stands_for_its_matrix():
    for shape in ((3, 5), (5, 3)):
        change = torch.randn(shape)
        u, v = as_pair(change)
        assert len(u) == len(v) == 3
        torch.testing.assert_close(dense((u, v)), change)


def test_an_undo_here_leaves_the_change_that_an_edit_of_another_process_needs(tokenizer, tmp_path):
    path = tmp_path / "store"
    one, other = changed(tokenizer), changed(tokenizer)
    one.open_store(path)
    first = one.edit(RECORDS[0].prompt, RECORDS[0].target, force=True, max_steps=1)
    other.open_store(path)
    second = other.edit(RECORDS[1].prompt, RECORDS[1].target, force=True, max_steps=1)
    one.undo(first.id)
    store = EditStore(path)
    (support,) = [edit.id for edit in store.edits if edit.is_base_delta]
    assert store.edits.ids == [support, second.id]
    again = changed(tokenizer)
    again.open_store(path)
    other.undo(first.id)
    close(all_logits(again, tokenizer), all_logits(other, tokenizer))
    with pytest.raises(ValueError, match=f"acts with the change '{support}'"):
        store.undo([support])
    again.undo(second.id)
    assert not EditStore(path).edits
