"""What a loss reads of a pass, against autograd through the whole model with weights changed by hand."""

from __future__ import annotations

import pytest
import torch
from support.architectures import build
from support.models import RECORDS, editable
from support.training import QUESTIONS
from torch import nn
from torch.func import functional_call

from hf_mend.bases import projection
from hf_mend.bases.gradients import trace
from hf_mend.bases.readout import Readout, Slots, last_mlp
from hf_mend.edits.low_rank import dense
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditCollator, TrainingExamples
from hf_mend.training.losses import editing_loss


WEIGHTS = {"neighborhood": 0.7, "unrelated": 3.0}
COUNT = 6


def a_step(tokenizer, architecture: str, dtype: torch.dtype = torch.float32, **options):
    """A model whose last two blocks are edited, the last MLP among them, and a batch."""
    base = build(architecture).to(dtype)
    torch.manual_seed(1)
    model = editable(base, tokenizer, layers_to_transform=[2, 3], **options)
    examples = TrainingExamples(RECORDS, QUESTIONS, general_rows=2)
    calibrate(model, examples, 8, 4)
    with torch.no_grad():
        for parameter in model.editor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    draws = [examples[i] for i in range(COUNT)]
    return model, draws, EditCollator(model.encoder)(draws)


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, [*model.editor.parameters()], allow_unused=True)
    return torch.cat([one.flatten() for one in found if one is not None])


def loss_of_changed_weights(model, draws) -> torch.Tensor:
    """The loss of weights changed by hand, a whole pass an edit, its logits those of all positions."""
    collate, total = EditCollator(model.encoder), torch.zeros(())
    for draw in draws:
        one = collate([draw])
        factors, _ = trace(model.split, model.targets, one.edit.inputs, one.edit.next_tokens)
        weights = {}
        for name, (u, v) in model.editor(factors).items():
            stored = model.base_model.get_submodule(name).weight
            change = dense((u[0], v[0]))
            weights[f"{name}.weight"] = stored + (change if stored.shape == change.shape else change.T)
        rows = one.general
        logits = functional_call(model.base_model, weights, kwargs=dict(rows.inputs)).logits
        said = [
            nn.functional.cross_entropy(row[chosen], labels[chosen])
            for row, chosen, labels in zip(logits, rows.positions, rows.next_tokens, strict=True)
        ]
        total = total + torch.stack(said).mean() / len(draws)
        for kind, rows in one.local.items():
            old = model.base_model(**rows.inputs).logits.log_softmax(-1)
            new = functional_call(model.base_model, weights, kwargs=dict(rows.inputs)).logits.log_softmax(-1)
            divergence = (old.exp() * (old - new)).sum(-1)
            means = [values[chosen].mean() for values, chosen in zip(divergence, rows.positions, strict=True)]
            total = total + WEIGHTS[kind] * torch.stack(means).mean() / len(draws)
    return total


# GPT-2 stores weights the other way round, OPT and BART have no MLP of their own, Gemma 2 bends its logits, T5 scales
# what it projects, and Falcon runs its MLP beside the attention.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2", "falcon", "t5", "bart"])
def test_loss_and_gradient_are_those_of_the_whole_model(tokenizer, architecture):
    model, draws, batch = a_step(tokenizer, architecture)
    loss = editing_loss(model.context, batch, WEIGHTS).loss
    expected = loss_of_changed_weights(model, draws)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    whole, found = gradient(model, expected), gradient(model, loss)
    assert float((found - whole).norm() / whole.norm()) < 1e-3


@pytest.mark.parametrize(
    ("architecture", "head", "mlp"),
    [
        ("llama", True, True),
        ("gpt2", True, True),
        ("opt", True, False),
        ("gemma2", False, True),
        ("bart", True, False),
    ],
)
def test_only_shortcuts_that_give_the_models_logits_are_taken(tokenizer, architecture, head, mlp):
    model, _, batch = a_step(tokenizer, architecture)
    readout = Readout(model.split, batch.general, lambda rows: model.split.run_below(rows.inputs))
    assert (readout.head is not None, readout.mlp is not None) == (head, mlp)


def test_a_module_that_mixes_tokens_is_not_taken_for_an_mlp(tokenizer):
    """A block whose `mlp` looks at the token before: the two passes differ, and the whole one is kept."""
    model, _, batch = a_step(tokenizer, "llama")
    mlp = last_mlp(model.split)
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + 0.5 * x.roll(1, dims=1))
    readout = Readout(model.split, batch.general, lambda rows: model.split.run_below(rows.inputs))
    assert readout.mlp is None and readout.head is not None


def test_the_last_mlp_runs_at_the_answers_alone(tokenizer):
    model, _, batch = a_step(tokenizer, "llama")
    tokens: list[int] = []
    editing_loss(model.context, batch, WEIGHTS)
    handle = last_mlp(model.split).down_proj.register_forward_hook(
        lambda module, args, output: tokens.append(output.shape[0] * output.shape[1])
    )
    editing_loss(model.context, batch, WEIGHTS)
    handle.remove()
    kinds = [batch.edit, batch.general, *(rows for rows in batch.local.values() for _ in range(2))]
    assert tokens == [len(rows) * max(rows.places.counts) for rows in kinds]


def test_no_logit_is_kept_for_the_backward_pass(tokenizer):
    model, _, batch = a_step(tokenizer, "llama")
    readout = Readout(model.split, batch.general, lambda rows: model.split.run_below(rows.inputs))
    read, kept = torch.randn(6, 32, requires_grad=True), []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        readout.nll([read], [torch.zeros(6, dtype=torch.long)])
        readout.kl([read], [torch.randn(6, 32)])
    assert kept == [(6, 32), (6, 32)]


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_losses_at_each_position_are_torchs(tokenizer, monkeypatch, chunk):
    monkeypatch.setattr("hf_mend.bases.readout._CHUNK", chunk)
    model, _, batch = a_step(tokenizer, "llama")
    readout = Readout(model.split, batch.general, lambda rows: model.split.run_below(rows.inputs))
    torch.manual_seed(0)
    weight = model.base_model.lm_head.weight
    one, other = (torch.randn(n, 32, requires_grad=True) for n in (5, 2))
    base = [torch.randn(5, 32), torch.randn(2, 32)]
    labels = [torch.randint(160, (5,)), torch.randint(160, (2,))]
    at = torch.randn(7)  # any gradient at each position
    logits = torch.cat([one, other]) @ weight.T
    old = torch.cat(base) @ weight.T
    plain = nn.functional.cross_entropy(logits, torch.cat(labels), reduction="none")
    divergence = (old.softmax(-1) * (old.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    for found, expected in (
        (readout.nll([one, other], labels), plain),
        (readout.kl([one, other], base), divergence),
    ):
        assert [len(part) for part in found] == [5, 2]
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)
        wanted = torch.autograd.grad((expected * at).sum(), [one, other], retain_graph=True)
        got = torch.autograd.grad((torch.cat(found) * at).sum(), [one, other])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_base_in_half_precision_reads_what_is_kept_in_single(tokenizer):
    model, _, batch = a_step(tokenizer, "llama", torch.bfloat16)
    readout = Readout(model.split, batch.general, lambda rows: model.split.run_below(rows.inputs))
    read = readout.at(batch.general, model.split.run_below(batch.general.inputs))
    assert read.dtype == torch.bfloat16
    (same,) = readout.kl([read], [read.float()])
    assert float(same.abs().max()) < 1e-6


def test_autocast_keeps_the_gradients_direction(tokenizer):
    model, _, batch = a_step(tokenizer, "llama")
    whole = gradient(model, editing_loss(model.context, batch, WEIGHTS).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = editing_loss(model.context, batch, WEIGHTS).loss
    half = gradient(model, loss)
    assert half.isfinite().all() and not torch.equal(half, whole)
    assert float(torch.cosine_similarity(half, whole, dim=0)) > 0.98


def test_slots_hold_each_rows_positions(tokenizer):
    _, _, batch = a_step(tokenizer, "llama")
    rows = batch.general
    slots = Slots(rows)
    x = torch.randn(*rows.positions.shape, 4)
    narrow = slots.narrow(x)
    assert narrow.shape == (len(rows), max(rows.places.counts), 4)
    assert torch.equal(slots.widen(narrow), torch.where(rows.positions[..., None], x, 0))


@pytest.mark.parametrize("rows", [1, 7, 160])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "gemma2"])
def test_factors_of_a_projection_that_is_read_once_are_autograds(tokenizer, monkeypatch, architecture, rows):
    model, _, batch = a_step(tokenizer, architecture)
    texts = batch.edit[:3]
    whole, logits = trace(model.split, model.targets, texts.inputs, texts.next_tokens)
    swept: list[int] = []
    monkeypatch.setattr("hf_mend.bases.projection._LARGE", 0)
    monkeypatch.setattr("hf_mend.bases.projection._ROWS", rows)
    monkeypatch.setattr("hf_mend.bases.gradients.swept", lambda *args: swept.append(1) or projection.swept(*args))
    found, others = trace(model.split, model.targets, texts.inputs, texts.next_tokens)
    assert bool(swept) == (architecture != "gemma2")  # whose logits are bent
    torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-5)
    for name, pair in whole.items():
        torch.testing.assert_close(found[name], pair, rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_answers_of_a_projection_that_is_read_in_parts_are_the_models(tokenizer, monkeypatch, count):
    model, _, batch = a_step(tokenizer, "llama")
    rows = batch.edit[:count]
    expected = model.base_model(**rows.inputs).logits[rows.positions]
    monkeypatch.setattr("hf_mend.bases.projection._LARGE", 0)
    monkeypatch.setattr("hf_mend.bases.projection._ROWS", 7)
    parts: list[int] = []
    real = projection.logits_in_parts
    monkeypatch.setattr("hf_mend.editing.context.logits_in_parts", lambda *args: parts.append(1) or real(*args))
    torch.testing.assert_close(model.context.logits(rows), expected, rtol=1e-4, atol=1e-5)
    assert parts
