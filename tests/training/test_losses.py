"""The training loss, against weights changed by hand and autograd through the whole."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import RECORDS, build_model
from support.slow import slow_but
from support.training import QUESTIONS, fresh, perturbed
from torch import nn

from hf_mend import EditableModel
from hf_mend.bases.gradients import kl_divergence, trace
from hf_mend.bases.weights import weight_matrix
from hf_mend.data.encoding import EncodedBatch
from hf_mend.edits.low_rank import dense
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditCollator, TrainingExamples
from hf_mend.training.losses import editing_loss, target_nll
from hf_mend.training.objective import EditingObjective


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("architecture", slow_but(["llama", "t5", "gpt2"], ["llama", "t5", "opt", "gpt2"]))
def test_the_training_loss_is_that_of_weights_changed_by_hand(tokenizer, architecture, group_size):
    model = fresh(tokenizer, architecture)
    examples = TrainingExamples(RECORDS, QUESTIONS, general_rows=2, neighborhood_rows=2, unrelated_rows=1)
    calibrate(model, examples, 8, 4)
    with torch.no_grad():
        for parameter in model.editor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    collate = EditCollator(model.encoder)
    count = 4 if group_size > 1 else 3
    batch = collate([examples[i] for i in range(count)])
    weights = {"neighborhood": 0.7, "unrelated": 3.0}
    together = editing_loss(model.context, batch, weights, group_size=group_size)
    updates = []
    for i in range(count):
        one = collate([examples[i]])
        factors, _ = trace(model.split, model.targets, one.edit.inputs, one.edit.next_tokens)
        updates.append({n: dense((u[0].detach(), v[0].detach())) for n, (u, v) in model.editor(factors).items()})
    edit: list[float] = []
    local: dict[str, list[float]] = {"neighborhood": [], "unrelated": []}
    for i in range(count):
        one = collate([examples[i]])
        changed = copy.deepcopy(model.base_model)
        with torch.no_grad():
            for target in model.targets:
                for j in range(i - i % group_size, i - i % group_size + group_size):
                    weight_matrix(changed.get_submodule(target.name)).add_(updates[j][target.name])
            logits = changed(**one.general.inputs).logits
            for row, (labels, chosen) in enumerate(zip(one.general.next_tokens, one.general.positions, strict=True)):
                edit.append(float(nn.functional.cross_entropy(logits[row][chosen], labels[chosen])))
            for kind, rows in one.local.items():
                new, old = (m(**rows.inputs).logits.log_softmax(-1) for m in (changed, model.base_model))
                divergence = (old.exp() * (old - new)).sum(-1)
                local[kind] += [
                    float(values[chosen].mean()) for values, chosen in zip(divergence, rows.positions, strict=True)
                ]
    nll = sum(edit) / len(edit)
    locality = {kind: sum(values) / len(values) for kind, values in local.items()}
    assert float(together.edit.detach()) == pytest.approx(nll, rel=1e-3)
    for kind, value in locality.items():
        assert float(together.locality[kind].detach()) == pytest.approx(value, rel=1e-2, abs=1e-6)
    whole = nll + 0.7 * locality["neighborhood"] + 3.0 * locality["unrelated"]
    assert float(together.loss.detach()) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "method", "group_size", "micro_batch_size"),
    [
        *(("llama", method, *sizes) for method in ("mend", "malmen") for sizes in [(8, 3), (8, 1), (2, 4), (1, 3)]),
        ("t5", "mend", 4, 2),
        ("t5", "malmen", 8, 3),
    ],
)
def test_two_stage_gradients_are_those_of_the_whole(tokenizer, architecture, method, group_size, micro_batch_size):
    model = perturbed(tokenizer, architecture, method)
    examples = TrainingExamples(RECORDS, QUESTIONS, general_rows=2, neighborhood_rows=1)
    batch = EditCollator(model.encoder)([examples[i] for i in range(len(RECORDS))])
    weights = {"neighborhood": 0.7, "unrelated": 3.0}
    found = []
    for at_once in (None, micro_batch_size):
        model.editor.zero_grad()
        loss = editing_loss(model.context, batch, weights, None, group_size, micro_batch_size=at_once)
        loss.loss.backward()
        found.append((loss, [parameter.grad.clone() for parameter in model.editor.parameters()]))
    (whole, gradients), (staged, others) = found
    assert float(staged.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-4)
    assert float(staged.edit) == pytest.approx(float(whole.edit.detach()), rel=1e-4)
    assert {k: pytest.approx(float(v.detach()), rel=1e-2) for k, v in whole.locality.items()} == staged.locality
    size = max(float(g.abs().max()) for g in gradients)
    assert size > 0
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-4 * size)


def test_a_step_without_gradients_is_only_a_value(tokenizer):
    model = perturbed(tokenizer)
    batch = EditCollator(model.encoder)([TrainingExamples(RECORDS, QUESTIONS)[i] for i in range(4)])
    with torch.no_grad():
        loss = EditingObjective(model)(batch, group_size=4, micro_batch_size=2)
    assert not loss.loss.requires_grad


@pytest.mark.parametrize(("method", "calls"), [("mend", 4), ("malmen", 2)])
def test_the_loss_of_calls_in_a_row_is_that_of_weights_changed_call_by_call(tokenizer, method, calls):
    model = perturbed(tokenizer, method=method)
    model.editor.scale_steps(3.0)
    collate = EditCollator(model.encoder)
    examples = TrainingExamples(RECORDS, QUESTIONS)
    records = [examples[i] for i in range(4)]
    found = EditingObjective(model)(
        collate(records), locality_weights={"neighborhood": 2.0}, calls_per_batch=calls, decay=0.5
    )
    changed = build_model("llama")
    spared: dict[str, list[torch.Tensor]] = {}
    total = weights = 0.0
    parts = [records[start : start + 4 // calls] for start in range(0, 4, 4 // calls)]
    for number, part in enumerate(parts):
        edits = EditableModel(changed, model.editor_config, tokenizer)
        rows = collate(part).edit
        factors, _ = trace(edits.split, edits.targets, rows.inputs, rows.next_tokens)
        with torch.no_grad():
            asked = {name: tuple(side.flatten(0, 1)[None] for side in p) for name, p in model.editor(factors).items()}
            kept = {name: torch.cat(x) for name, x in spared.items()} if method == "malmen" else {}
            for name, (u, v) in model.editor.join(asked, kept).items():
                spared.setdefault(name, []).append(asked[name][0][0])
                weight_matrix(changed.get_submodule(name)).add_(dense((u[0], v[0])))
            for earlier, texts in enumerate(parts[: number + 1]):
                loss = 0.0
                for example in texts:
                    one = collate([example])
                    row = one.general
                    logits = changed(**row.inputs).logits[row.positions]
                    loss += float(torch.nn.functional.cross_entropy(logits, row.next_tokens[row.positions]))
                    for kind, local in one.local.items():
                        new, old = (m(**local.inputs).logits[local.positions] for m in (changed, model.base_model))
                        weight = 2.0 if kind == "neighborhood" else 1.0
                        loss += weight * float(kl_divergence(new, old).mean())
                weight = 0.5 ** (number - earlier)
                total, weights = total + weight * loss, weights + weight * len(texts)
    assert float(found.loss.detach()) == pytest.approx(total / weights, rel=1e-3)


def test_a_row_weighs_the_same_however_long_its_target_is():
    """The mean of the rows' means, worked out token by token; three tokens here and one there."""
    tokens = torch.tensor([[-100, 3, 1, 2], [2, -100, -100, -100]])
    rows = EncodedBatch({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, tokens, tokens != -100)
    torch.manual_seed(0)
    logits = torch.randn(4, 5).bfloat16()
    each = [-float(logits[i].float().softmax(-1)[label].log()) for i, label in enumerate([3, 1, 2, 2])]
    assert float(target_nll(logits, rows)) == pytest.approx((sum(each[:3]) / 3 + each[3]) / 2, rel=1e-5)


def test_groups_that_do_not_divide_the_batch_are_made_smaller(tokenizer):
    """Of six edits, groups of four are groups of two; what has no weight of its own counts once."""
    model = perturbed(tokenizer, method="mend")
    batch = EditCollator(model.encoder)([TrainingExamples(RECORDS, QUESTIONS)[i] for i in range(6)])
    with torch.no_grad():
        four, two, three = (editing_loss(model.context, batch, {"unrelated": 3.0}, group_size=n) for n in (4, 2, 3))
    assert torch.equal(four.loss, two.loss) and float(three.loss) != pytest.approx(float(two.loss), rel=1e-4)
    whole = float(two.edit) + float(two.locality["neighborhood"]) + 3 * float(two.locality["unrelated"])
    assert float(two.loss) == pytest.approx(whole, rel=1e-5)
