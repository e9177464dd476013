"""What an edit asks of a device, counted on a CPU: kernels beside a forward pass's, and waits of the host."""

from __future__ import annotations

import math

import pytest
import torch
from support.counting import Counting
from support.models import RECORDS, build_model, editable, probability
from support.scope import scoped

from hf_mend.bases.split import SplitModel
from hf_mend.bases.targets import block_lists, lowest_block
from hf_mend.data.encoding import Query
from hf_mend.data.joining import ends_word
from hf_mend.editing import keeping


RECORD = RECORDS[0]


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch):
    """A CPU looks at its own tokens for what texts begin with alike, which is no wait."""
    monkeypatch.setattr(SplitModel, "shares", lambda self, rows: False)


def counted(model, prompt, target, **options) -> Counting:
    scope = [] if model.scope is None else [model.scope]
    with Counting(model.base_model, model.editor, *scope) as counting:
        model.edit(prompt, target, max_steps=1, force=True, **options)
    model.undo_all()
    return counting


def a_forward_pass(model) -> tuple[Counting, float]:
    """What one asks, and the share of the blocks from the lowest edited one on."""
    rows = model.encoder([Query(RECORD.prompt, RECORD.target)])
    with Counting(model.base_model) as counting, torch.no_grad():
        model.base_model(**{name: value.to(model.device) for name, value in rows.inputs.items()}, use_cache=False)
    kind, lowest = lowest_block(model.targets)
    depth = len(next(one for one in block_lists(model.base_model) if one.kind == kind).blocks)
    return counting, (depth - lowest) / depth


@pytest.fixture
def model(llama, tokenizer):
    model = editable(llama, tokenizer, normalize=True, whiten=True, layers_to_transform=[1, 2, 3])
    model.edit(RECORD.prompt, RECORD.target, max_steps=1)  # the first edit looks at the model, and warns
    model.undo_all()
    return model


def test_the_count_is_that_of_what_runs():
    """Kernels and waits of operations whose number is known."""
    layer = torch.nn.Linear(4, 3)
    with Counting(layer) as counting:
        given = torch.ones(2, 4).to(layer.weight.device)
        out = layer(given)  # addmm
        out = out.relu()[:, :2].T  # relu, and two views
        mask = out > 0  # gt
        assert out[mask].numel() >= 0  # index, which waits for the mask
        assert out.sum() >= 0  # sum, ge, a wait
        out.tolist()  # a wait
        host = out.cpu()  # a wait
        assert host.sum() >= 0 and host[host > 0].tolist() is not None  # on the host
    assert counting.waits == 4
    assert counting.kernels == 6, counting.of_each


def test_an_edit_waits_once_for_each_thing_that_it_has_to_know(model):
    """Before the edit, of its update, and after it: three values, however many layers and tokens."""
    assert counted(model, RECORD.prompt, RECORD.target, check=False).waits == 2
    assert counted(model, RECORD.prompt, RECORD.target).waits == 3


@pytest.mark.parametrize("check", [False, True])
def test_edits_in_a_batch_wait_as_one_does(model, check):
    """Of several lengths: padding is no reason to look into a mask."""
    prompts, targets = [record.prompt for record in RECORDS], [record.target for record in RECORDS]
    assert len({len(sum(model.encoder.tokens(Query(*pair)), [])) for pair in zip(prompts, targets, strict=True)}) > 1
    several = counted(model, prompts, targets, check=check)
    assert several.waits <= 4, several.of_each
    one = counted(model, RECORD.prompt, RECORD.target, check=check)
    # Each edit gets memory of its own, of a shape's layers at once: a kernel a side.
    shapes = len({target.shape for target in model.targets})
    each = several.kernels - one.kernels - (100 if check else 40)
    assert each <= 2 * shapes * (len(RECORDS) - 1), (several.kernels, one.kernels)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5"])
def test_what_follows_a_target_is_seen_in_the_same_passes(tokenizer, monkeypatch, family):
    """An edit that says its target runs what lies below the edited layers once: no pass asks what ends its word."""
    model = editable(build_model(family), tokenizer)
    model.edit(RECORD.prompt, RECORD.target, max_steps=1)
    model.undo_all()
    calls, run_below = [], SplitModel.run_below
    monkeypatch.setattr(SplitModel, "run_below", lambda self, *args: calls.append(1) or run_below(self, *args))
    result = model.edit(RECORD.prompt, RECORD.target, max_steps=40, keep_failed=True)
    assert all(result.token_success) and len(calls) == 1
    query = Query(RECORD.prompt, RECORD.target)
    with torch.no_grad():
        said = model.base_model(**model.encoder.with_further([query]).further.inputs).logits[0, -1].argmax()
    text, more = (model.encoder.decode([*model.encoder.tokens(query)[1], *ids]) for ids in ([], [int(said)]))
    assert (result.longer_word is None) == ends_word(text, more[len(text) :])


@pytest.mark.parametrize("max_steps", [1, 3])
def test_edits_made_together_are_checked_from_where_they_were_found(model, monkeypatch, max_steps):
    """What lies below the edited layers runs once, and the results are what the model with all edits says."""
    calls, run_below = [], SplitModel.run_below
    monkeypatch.setattr(SplitModel, "run_below", lambda self, *args: calls.append(1) or run_below(self, *args))
    chosen = RECORDS[:4]
    results = model.edit([r.prompt for r in chosen], [r.target for r in chosen], max_steps=max_steps, force=True)
    assert len(calls) == 1
    for record, result in zip(chosen, results, strict=True):
        expected = probability(model, record.prompt, record.target)
        assert result.probability_after == pytest.approx(expected, rel=1e-4)


def test_steps_that_are_tried_again_wait_once_each(model):
    model.editor.scale_steps(20.0)  # overshoots: the whole step, its half, quarter and eighth
    with Counting(model.base_model, model.editor) as counting:
        model.edit(RECORD.prompt, "rome paris lima", max_steps=2)
    # The editor's weights, which have changed; before; two rounds of four tries, and a look between them; the update.
    assert counting.waits <= 1 + 1 + 4 + 1 + 4 + 1


def test_a_model_with_a_scope_waits_for_codes_and_keys_too(llama, tokenizer, monkeypatch):
    model = scoped(llama, tokenizer)
    model.edit(RECORD.prompt, RECORD.target, max_steps=1)
    model.undo_all()
    assert counted(model, RECORD.prompt, RECORD.target, check=False).waits == 3
    # A target that is said for sure; one that is not is asked of the update as it was found too.
    with monkeypatch.context() as sure:
        sure.setattr(keeping, "_SURE", -math.inf)
        assert counted(model, RECORD.prompt, RECORD.target).waits == 4
        prompts, targets = [record.prompt for record in RECORDS], [record.target for record in RECORDS]
        assert counted(model, prompts, targets).waits == 4
    assert counted(model, RECORD.prompt, RECORD.target).waits == 5
    assert counted(model, prompts, targets).waits == 5


def test_what_edits_are_told_apart_from_is_waited_for_once(llama, tokenizer):
    """Texts that only name what edits are about are of many lengths: however many edits, one wait more."""
    model = scoped(llama, tokenizer)
    with torch.no_grad():
        model.scope.subject.weight.normal_()
        model.scope.subject.bias.fill_(0.5)
    model.set_scope(model.scope)
    about = [r.scope.about for r in model.edit([r.prompt for r in RECORDS], [r.target for r in RECORDS], max_steps=1)]
    assert sum(one is not None for one in about) >= 4
    model.undo_all()
    prompts, targets = [record.prompt for record in RECORDS], [record.target for record in RECORDS]
    assert counted(model, RECORD.prompt, RECORD.target, check=False).waits == 4
    assert counted(model, prompts, targets, check=False).waits == 4


def test_what_is_beside_the_passes_is_few_kernels(model):
    """
    A forward pass, a backward pass from the edited layers up, and with the check a pass from there up again; the
    rest, which does not grow with the model, is what the editor and the results take.
    """
    forward, f = a_forward_pass(model)
    assert forward.waits == 1, "the model itself looks into the mask"
    edit = counted(model, RECORD.prompt, RECORD.target, check=False)
    check = counted(model, RECORD.prompt, RECORD.target)
    assert edit.kernels <= (1 + 2 * f) * forward.kernels + 165, edit.of_each
    assert check.kernels - edit.kernels <= f * forward.kernels + 45, check.of_each
