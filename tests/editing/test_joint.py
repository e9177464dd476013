"""Edits merged by one ridge regression, against dense solutions and autograd through the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import RECORDS, EditableModel, all_logits, build_model, fitting, small_config
from support.training import arguments, perturbed

from hf_mend import EditorConfig, EditorTrainer, evaluate_records, get_editable_model
from hf_mend.bases.gradients import trace
from hf_mend.bases.weights import weight_matrix
from hf_mend.data.encoding import Query
from hf_mend.edits.low_rank import compacted, dense
from hf_mend.edits.preserved_keys import PreservedKeys
from hf_mend.methods import get_method
from hf_mend.methods.ridge import leading_eigenvectors, ridge_keys


def moment_of(width: int) -> torch.Tensor:
    text = torch.randn(200, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    return text.T @ text / 200


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("widths", [None, "some"])
def test_ridge_keys_give_the_dense_solution(tokens, widths):
    """On both sides of the width, where the solve is of the tokens and of the inputs."""
    moment = leading_eigenvectors(moment_of(8), 8, 0.1)
    if widths:
        moment.widths = torch.rand(8, dtype=torch.float64) + 0.5
    x, d = torch.randn(2, tokens, 8, dtype=torch.float64), torch.randn(2, tokens, 5, dtype=torch.float64)
    x[1, -1] = 0
    keys = ridge_keys(x, 0.7, moment)
    plain = ridge_keys(x, 0.7)
    for i in range(2):
        for found, penalty in ((keys[i], moment.matrix()), (plain[i], torch.eye(8, dtype=torch.float64))):
            expected = torch.linalg.solve(x[i].T @ x[i] + 0.7 * penalty, x[i].T @ d[i]).T
            torch.testing.assert_close(d[i].T @ found, expected)
            assert not found[~x[i].any(-1)].any()


def test_a_second_moment_inverts_what_it_is():
    moment = moment_of(8)
    whole = leading_eigenvectors(moment, 8, 0.1)
    torch.testing.assert_close(whole.matrix(), moment + 0.1 * moment.diagonal().mean() * torch.eye(8).double())
    cut = leading_eigenvectors(moment, 3, 0.1)
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(cut.solve(x) @ cut.matrix(), x)
    values = torch.linalg.eigvalsh(cut.matrix())
    torch.testing.assert_close(values[:5], values[:1].expand(5))
    # What is left out counts as its mean, so that the trace stays, and the leading ones as they are.
    torch.testing.assert_close(cut.matrix().trace(), 1.1 * moment.trace())
    added = 0.1 * moment.diagonal().mean()
    torch.testing.assert_close(values[5:], torch.linalg.eigvalsh(moment)[5:] + added)


def test_a_compacted_update_is_the_same_matrix():
    for d_out, d_in in ((4, 9), (9, 4)):
        update = (torch.randn(20, d_in), torch.randn(20, d_out))
        small = compacted(update)
        assert small[0].shape[0] == 4
        torch.testing.assert_close(dense(small), dense(update))


def joint_by_hand(model, records) -> dict[str, torch.Tensor]:
    """Each layer's dense update from the formula, shifts of every token taken from a MEND editor of equal weights."""
    mend = get_method("mend")(model.editor_config, model.editor.shapes)
    mend.load_state_dict(model.editor.state_dict(), strict=False)
    inputs: dict[str, list[torch.Tensor]] = {t.name: [] for t in model.targets}
    shifts: dict[str, list[torch.Tensor]] = {t.name: [] for t in model.targets}
    for record in records:
        rows = model.encoder([Query(record.prompt, record.target)])
        factors, _ = trace(model.split, model.targets, rows.inputs, rows.next_tokens)
        with torch.no_grad():
            for name, (u, v) in mend(factors).items():
                for x, key, value in zip(factors[name][0][0], u[0], v[0], strict=True):
                    inputs[name].append(x)
                    shifts[name].append(value * (key @ x))
    moments = {name: group.second_moment(i) for group in model.editor.groups for i, name in enumerate(group.names)}
    updates = {}
    for i, name in enumerate(model.editor.shapes):
        x, d = torch.stack(inputs[name]).double(), torch.stack(shifts[name]).double()
        penalty = torch.eye(x.shape[1]) if moments[name] is None else moments[name].matrix()
        strength = float(model.editor.log_ridge[i].exp().detach())
        updates[name] = torch.linalg.solve(x.T @ x + strength * penalty.double(), x.T @ d).T.float()
    return updates


@pytest.mark.parametrize(("architecture", "whiten"), [("llama", True), ("gpt2", False), ("t5", True), ("opt", False)])
def test_edits_of_one_call_are_the_ridge_solution_whatever_their_batches(tokenizer, architecture, whiten):
    model = perturbed(tokenizer, architecture, whiten=whiten)
    expected = joint_by_hand(model, RECORDS)
    for batch_size in (3, 16):
        model.edit(RECORDS, max_steps=1, force=True, batch_size=batch_size)
        assert len(model.edits) == len(RECORDS)
        for name, update in expected.items():
            found = torch.stack([dense(edit.updates[name]) for edit in model.edits]).sum(0)
            torch.testing.assert_close(found, update, rtol=1e-2, atol=1e-3 * float(update.abs().max()))
        model.undo_all()


def test_later_edits_spare_the_inputs_of_earlier_ones(tokenizer):
    """As zero shifts asked for there; an edit that was undone is not spared any more."""
    model = perturbed(tokenizer)
    model.edit(RECORDS[:3], max_steps=1, force=True)
    model.undo()
    earlier = model._active.preserved_keys.of([edit.id for edit in model.edits])
    x = {}
    for record in RECORDS[:2]:
        rows = model.encoder([Query(record.prompt, record.target)])
        with model.disable_edits():
            factors, _ = trace(model.split, model.targets, rows.inputs, rows.next_tokens)
        for name, pair in factors.items():
            x.setdefault(name, []).append(pair[0][0])
    for name, rows_of in x.items():
        torch.testing.assert_close(earlier[name], torch.cat(rows_of))
    model.edit(RECORDS[4:6], max_steps=1, force=True)
    new = {name: [torch.cat([edit.updates[name][side] for edit in model.edits[-2:]]) for side in (0, 1)] for name in x}
    inputs = model._active.preserved_keys.of([edit.id for edit in model.edits[-2:]])
    moments = {name: group.second_moment(i) for group in model.editor.groups for i, name in enumerate(group.names)}
    for i, name in enumerate(model.editor.shapes):
        every = torch.cat([earlier[name], inputs[name]]).double()
        shifts = torch.cat([torch.zeros(len(earlier[name]), new[name][1].shape[1]), new[name][1]]).double()
        penalty = float(model.editor.log_ridge[i].exp().detach()) * moments[name].matrix().double()
        expected = torch.linalg.solve(every.T @ every + penalty, every.T @ shifts).T.float()
        size = float(expected.abs().max())
        torch.testing.assert_close(new[name][1].T @ new[name][0], expected, rtol=1e-2, atol=1e-3 * size)


def test_the_inputs_of_many_edits_become_fewer_rows():
    keys = PreservedKeys()
    rows = {f"edit {i}": torch.randn(3, 4) for i in range(9)}
    for count, (edit_id, x) in enumerate(rows.items(), 1):
        keys.by_edit[edit_id] = {"a": x}
        kept = keys.of(list(rows)[:count])["a"]
        every = torch.cat(list(rows.values())[:count])
        assert len(kept) <= 6
        torch.testing.assert_close(kept.T @ kept, every.T @ every, rtol=1e-4, atol=1e-4)
    kept = keys.of(list(rows)[1:5])["a"]
    every = torch.cat(list(rows.values())[1:5])
    torch.testing.assert_close(kept.T @ kept, every.T @ every, rtol=1e-4, atol=1e-4)
    assert keys.of([]) == {}


def test_an_edit_made_with_others_is_undone_alone(tokenizer):
    model = perturbed(tokenizer)
    before = all_logits(model, tokenizer)
    results = model.edit(RECORDS[:4], max_steps=1, force=True)
    kept = [edit for edit in model.edits if edit.id != results[1].id]
    model.undo(results[1].id)
    assert model.edits == kept
    model.undo_all()
    assert torch.equal(all_logits(model, tokenizer), before)


@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_metrics_of_joined_edits(tokenizer, group_size):
    model = perturbed(tokenizer)
    measured = evaluate_records(
        model.split, model.targets, model.editor, model.encoder, RECORDS, batch_size=4, group_size=group_size,
        progress=False,
    )  # fmt: skip
    for start in range(0, len(RECORDS), group_size):
        group = RECORDS[start : start + group_size]
        updates = joint_by_hand(model, group)
        base = build_model("llama")
        changed = build_model("llama")
        with torch.no_grad():
            for target in model.targets:
                weight_matrix(changed.get_submodule(target.name)).add_(updates[target.name])
            for record, got in zip(group, measured[start:], strict=False):
                same = []
                for prompt in record.neighborhood:
                    rows = model.encoder([Query(prompt)])
                    said = [m(**rows.inputs).logits[rows.positions] for m in (base, changed)]
                    same.append(float(said[0].argmax() == said[1].argmax()))
                    divergence = (
                        said[0].log_softmax(-1).exp() * (said[0].log_softmax(-1) - said[1].log_softmax(-1))
                    ).sum()
                assert got.neighborhood == pytest.approx(sum(same) / len(same))
                if len(record.neighborhood) == 1:
                    assert got.neighborhood_kl == pytest.approx(float(divergence), rel=1e-2)


# ---- without training ----


def test_a_model_without_an_editor_is_edited(base, tokenizer):
    model = EditableModel(base, tokenizer=tokenizer)
    result = model.edit(RECORDS[0].prompt, RECORDS[0].target)
    assert result.probability_after > result.probability_before  # one layer of four, and a random one
    model = EditableModel(base, small_config(method="gradient", whiten_ridge=1.0), tokenizer)
    before = all_logits(model, tokenizer)
    assert model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=20).success
    model.undo_all()
    assert torch.equal(all_logits(model, tokenizer), before)


def test_several_edits_without_training_take_together(llama, tokenizer):
    model = EditableModel(llama, small_config(method="gradient", whiten_ridge=1.0), tokenizer)
    assert all(result.success for result in model.edit(RECORDS[:2], max_steps=20))
    alone = model.edit(RECORDS[:2], max_steps=1, force=True, check=False)
    assert all(result.after is None and result.steps == 1 for result in alone) and len(model.edits) == 4


def test_the_first_step_is_down_the_gradient_by_its_loss(llama, tokenizer):
    """`dW = -step * sum_t delta_t (M^-1 x_t)^T`, the step being the loss over the slope; M has all eigenvectors."""
    config = small_config(method="gradient", whiten_rank=48, whiten_ridge=1.0, ridge=1e-6, margin=1.5)
    model = EditableModel(llama, config, tokenizer)
    record = RECORDS[0]
    model.edit(record.prompt, record.target, max_steps=1)
    rows = model.encoder([Query(record.prompt, record.target)])
    moments = [model.editor.second_moment(i) for i in range(len(model.targets))]
    with model.disable_edits():
        factors, logits = trace(model.split, model.targets, rows.inputs, rows.next_tokens)
    labels = rows.next_tokens[rows.positions]
    loss = float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    steps = {
        t.name: factors[t.name][1][0].T @ factors[t.name][0][0] @ torch.linalg.inv(m.matrix())
        for t, m in zip(model.targets, moments, strict=True)
    }
    slope = sum(float((steps[n] * (d[0].T @ x[0])).sum()) for n, (x, d) in factors.items())
    for name, step in steps.items():
        expected = -1.5 * loss / slope * step
        torch.testing.assert_close(
            dense(model.edits[0].updates[name]), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())
        )


def test_ultraedit_is_its_formula_with_statistics_of_all_edits_so_far(llama, tokenizer):
    config = small_config(method="ultraedit", edit_lr=0.01, ridge=0.5)
    model = EditableModel(llama, config, tokenizer)
    seen: dict[str, list[torch.Tensor]] = {}
    for count, group in enumerate((RECORDS[:3], RECORDS[3:5])):
        factors = {}
        for record in group:
            rows = model.encoder([Query(record.prompt, record.target)])
            for name, pair in trace(model.split, model.targets, rows.inputs, rows.next_tokens)[0].items():
                factors.setdefault(name, []).append((pair[0][0], pair[1][0]))
        expected = {}
        for name, pairs in factors.items():
            x, delta = torch.cat([x for x, _ in pairs]), torch.cat([d for _, d in pairs])
            seen.setdefault(name, []).append((x, delta))
            means, spreads = zip(
                *((s.mean(0), s.std(0, unbiased=False)) for s in map(torch.cat, zip(*seen[name], strict=True))),
                strict=True,
            )
            x_hat, delta_hat = (x - means[0]) / spreads[0], (delta - means[1]) / spreads[1]
            v = -0.01 * x_hat.square().sum(-1, keepdim=True) * delta_hat
            expected[name] = torch.linalg.solve(x.T @ x + 0.5 * torch.eye(x.shape[1]), x.T @ v).T
        model.edit(group, max_steps=1, force=True, batch_size=2)
        for name, update in expected.items():
            found = torch.stack([dense(edit.updates[name]) for edit in model.edits[-len(group) :]]).sum(0)
            torch.testing.assert_close(found, update, rtol=1e-2, atol=1e-2 * float(update.abs().max()), msg=str(count))


def test_an_editor_without_training_is_saved_with_what_it_knows(llama, tokenizer, tmp_path):
    model = EditableModel(llama, tokenizer=tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    model.save_pretrained(tmp_path)
    again = EditableModel.from_pretrained(build_model("llama"), tmp_path, tokenizer)
    again.edit(RECORDS[0].prompt, RECORDS[0].target)
    for name, pair in model.edits[0].updates.items():
        torch.testing.assert_close(again.edits[0].updates[name], pair)


def test_a_method_without_parameters_is_not_trained(llama, tokenizer, tmp_path):
    model = get_editable_model(llama, EditorConfig(method="ultraedit"), tokenizer)
    with pytest.raises(ValueError, match="method 'ultraedit' has nothing to train"):
        EditorTrainer(model, arguments(tmp_path), RECORDS)


@pytest.mark.parametrize("method", ["gradient", "memit"])
def test_edits_from_a_store_are_spared_like_those_made_here(tokenizer, tmp_path, method):
    """Their inputs, as hooks on the plain modules see them under the stored edits: memit's at the subject's end."""
    records = [replace(record, subject="france") if "france" in record.prompt else record for record in RECORDS]
    model = EditableModel(build_model("llama"), EditorConfig(method, **fitting(method, num_steps=3)), tokenizer)
    model.open_store(tmp_path / "edits.store")
    model.edit(records[:3], force=True)
    again = EditableModel(build_model("llama"), EditorConfig(method, **fitting(method, num_steps=3)), tokenizer)
    stored = again.open_store(tmp_path / "edits.store")
    again.close_store()
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for edit, record in zip(stored, records, strict=False):
        query = Query(record.prompt, record.target, subject=record.subject if method == "memit" else None)
        rows = again.encoder([query])
        prompt, answer = again.encoder.tokens(query)
        last = len(prompt) + len(answer) - 1  # the last token of the answer leads to nothing that is asked for
        place = rows.subjects if rows.subjects is not None and rows.subjects >= 0 else torch.tensor([len(prompt) - 1])
        found: dict[str, torch.Tensor] = {}
        hooks = [
            target.module.register_forward_pre_hook(
                lambda module, args, name=target.name, found=found: found.update({name: args[0][0].detach()})
            )
            for target in again.targets
        ]
        with torch.no_grad():
            again.base_model(**rows.inputs)
        for hook in hooks:
            hook.remove()
        expected[edit.id] = {name: x[place] if method == "memit" else x[:last] for name, x in found.items()}
    again.edit(records[4], force=True)
    for edit in stored:
        for name, x in expected[edit.id].items():
            torch.testing.assert_close(again._active.preserved_keys.by_edit[edit.id][name], x, rtol=1e-4, atol=1e-5)


def test_what_a_model_carries_for_a_while_makes_it_forget_nothing(tokenizer):
    model = EditableModel(build_model("llama"), EditorConfig(method="gradient"), tokenizer)
    model.edit(RECORDS[:2], force=True)
    known = dict(model._active.preserved_keys.by_edit)
    assert set(known) == {edit.id for edit in model.edits}
    with model.carrying([]):
        model.edit(RECORDS[4], force=True)
    assert model._active.preserved_keys.by_edit == known
