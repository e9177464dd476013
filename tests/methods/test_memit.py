"""MEMIT against shifts and a ridge regression computed by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.methods import NEVER, nll
from support.models import RECORDS as PLAIN_RECORDS
from support.models import EditableModel, all_logits, small_config

from hf_mend.bases.weights import weight_matrix
from hf_mend.data.encoding import Query
from hf_mend.editing.calibration_text import observe_calibration_text
from hf_mend.editing.proposals import SearchOptions
from hf_mend.editing.search import find_updates
from hf_mend.edits.low_rank import dense


# One word to say: a random model has no way from a subject to an answer that could carry more.
RECORDS = [replace(record, target=record.target.split()[0]) for record in PLAIN_RECORDS]
LAYERS = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "t5": ["wo"]}


def memit(base, tokenizer, **options) -> EditableModel:
    values = {
        "edit_lr": 0.1,
        "num_steps": 10,
        "stop_loss": NEVER,
        "whiten_rank": 100,
        "ridge": 0.01,
        "margin": 1.0,
        **options,
    }
    values["target_modules"] = LAYERS[base.config.model_type]
    return EditableModel(base, small_config(method="memit", **values), tokenizer)


def subject_inputs(model, plain, records) -> dict[str, torch.Tensor]:
    """Layer name -> the layer's input at each subject's last token, seen by a hook on the plain model."""
    found: dict[str, list[torch.Tensor]] = {target.name: [] for target in model.targets}
    for record in records:
        row = model.encoder([Query(record.prompt, record.target, subject=record.subject)])
        place = int(row.subjects[0])
        assert place >= 0
        hooks = [
            plain.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, place=place: found[name].append(args[0][0, place])
            )
            for name in found
        ]
        with torch.no_grad():
            plain(**row.inputs)
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(x) for name, x in found.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_step_asks_for_adams_step_and_merges_by_ridge_regression(base, tokenizer):
    """The shift is down the sign of autograd's own gradient; all edits' are merged as the normal equations say."""
    plain = copy.deepcopy(base)
    model = memit(base, tokenizer, num_steps=1, edit_lr=0.3, ridge=3.0, margin=2.0)
    records = [replace(record, subject=record.prompt.split()[3]) for record in RECORDS[:3]]  # the country
    results = model.edit(records, force=True, max_steps=1, check=False)
    assert [result.steps for result in results] == [1, 1, 1]
    inputs = subject_inputs(model, plain, records)
    wanted: dict[str, list[torch.Tensor]] = {name: [] for name in inputs}
    for i, record in enumerate(records):
        copied = copy.deepcopy(plain)
        shifts = {}
        for index, name in enumerate(inputs):
            moment = model.editor.second_moment(index).matrix()
            direction = torch.linalg.solve(moment, inputs[name][i])
            direction = direction / (direction @ inputs[name][i])
            shift = torch.zeros(model.editor.shapes[name][0], requires_grad=True)
            copied.get_submodule(name).register_forward_hook(
                lambda module, args, output, u=direction, d=shift: output + (args[0] @ u)[..., None] * d
            )
            shifts[name] = shift
        nll(copied, model.encoder([Query(record.prompt, record.target)])).backward()
        for name, shift in shifts.items():
            assert shift.grad.abs().max() > 0
            wanted[name].append(2.0 * -0.3 * shift.grad / (shift.grad.abs() + 1e-8))
    for index, (name, x) in enumerate(inputs.items()):
        moment = model.editor.second_moment(index).matrix().double()
        gram = x.double().T @ x.double() + 3.0 * moment
        by_hand = torch.stack(wanted[name]).double().T @ x.double() @ torch.linalg.inv(gram)
        made = sum(dense(edit.updates[name]) for edit in model.edits)
        torch.testing.assert_close(made.double(), by_hand, rtol=2e-3, atol=2e-4)


def log_probabilities(results) -> torch.Tensor:
    return torch.tensor([result.probability_after for result in results]).log()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_edits_made_together_lead_to_their_targets_and_are_undone_to_the_bit(base, tokenizer):
    """All of them: the answers of a random model are nearly even, and a shift can only do so much."""
    before = all_logits(base, tokenizer)
    weights = [weight_matrix(m).clone() for m in base.modules() if isinstance(m, torch.nn.Linear)]
    model = memit(base, tokenizer)
    results = model.edit(RECORDS[:4])
    before_them = torch.tensor([result.probability_before for result in results]).log()
    assert (log_probabilities(results) - before_them).mean() > 0.4
    assert all(edit.rank == 1 for edit in model.edits)
    model.undo_all()
    assert torch.equal(all_logits(model, tokenizer), before)
    after = [weight_matrix(m) for m in base.modules() if isinstance(m, torch.nn.Linear)]
    assert all(torch.equal(one, other) for one, other in zip(weights, after, strict=True))


def test_edits_that_do_not_take_beside_the_others_ask_for_more(llama, tokenizer, monkeypatch):
    """A strong ridge gives them half of what they ask for at first."""
    said = []
    for rounds in (3, 1):  # three unless told otherwise
        if rounds == 1:
            monkeypatch.setattr("hf_mend.editing.proposals._ROUNDS", 1)
        model = memit(copy.deepcopy(llama), tokenizer, ridge=100.0)
        results = model.edit(RECORDS[:4])
        said.append(log_probabilities(results).mean())
        assert max(result.steps for result in results) == 10 * rounds
    assert said[0] > said[1] + 0.5


def test_a_later_call_spares_the_inputs_of_an_earlier_one(llama, tokenizer):
    changes = []
    for earlier in (False, True):
        model = memit(copy.deepcopy(llama), tokenizer)
        if earlier:
            model.edit(RECORDS[0], force=True)
            x = model._active.preserved_keys.of([model.edits[0].id])[model.targets[0].name][0]
        model.edit(RECORDS[1], force=True)
        changes.append(dense(model.edits[-1].updates[model.targets[0].name]))
    assert (changes[1] @ x).norm() < 0.1 * (changes[0] @ x).norm()


def test_groups_are_joined_each_for_itself(llama, tokenizer):
    """Groups of two in one batch come to what calls of two come to."""
    model = memit(llama, tokenizer)
    queries = [Query(record.prompt, record.target) for record in RECORDS[:4]]
    observe_calibration_text(model.context, model.encoder)
    found = find_updates(model.context, [model.encoder(queries)], SearchOptions(check=False), group_size=2)[0]
    for start in (0, 2):
        model.edit(RECORDS[start : start + 2], force=True, check=False)
        for row, edit in enumerate(model.edits):
            for name, (u, v) in found.updates.items():
                torch.testing.assert_close(
                    dense((u[start + row], v[start + row])), dense(edit.updates[name]), rtol=1e-2, atol=1e-3
                )
        model.undo_all()


def test_a_place_without_influence_is_refused(llama, tokenizer):
    model = memit(llama, tokenizer, layers_to_transform=[3])
    with pytest.raises(ValueError, match="no influence on the answer through any of the layers .* name lower blocks"):
        model.edit(replace(RECORDS[0], subject="france"))
    assert not model.edits
