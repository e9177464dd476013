"""Calibration of an editor before its first training step: its statistics, and the scale of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ..bases.gradients import record_inputs
from ..bases.limits import longest_input
from ..data.encoding import EncodedBatch, batches
from ..model import EditableModel
from .examples import EditCollator, TrainingExamples
from .losses import target_nll


# Of a batch from which the size of the first step is chosen.
_TOKENS = 4096


def calibrate(model: EditableModel, examples: TrainingExamples, edits: int = 128, batch_size: int = 8) -> None:
    """
    Set an untrained editor's statistics from training examples, and scale its steps by half of the power of two that
    lowers the targets' negative log-likelihood most.

    Args:
        model ([`EditableModel`]): The model.
        examples ([`TrainingExamples`]): The examples, of which evenly spread ones are used.
        edits (`int`, defaults to 128): Number of examples.
        batch_size (`int`, defaults to 8): Examples per batch; it changes only the rounding.
    """
    collate = EditCollator(model.encoder, longest_input(model.config), scoped=model.scope is not None)
    wanted = min(len(examples), edits)
    order = [i * len(examples) // wanted for i in range(wanted)]
    editor = model.editor
    for chunk in tqdm(list(batches(order, batch_size)), desc="Statistics of the factors"):
        batch = collate([examples[i] for i in chunk]).to(model.device)
        factors, _ = model.context.trace(batch.edit, None, (editor.base_delta(),))
        editor.observe_factors(factors)
        for rows in (batch.edit, *batch.local.values()):
            editor.observe_inputs(record_inputs(model.split, model.targets, rows))
    editor.finish_observing()
    first = [collate([examples[i] for i in chunk]).edit for chunk in batches(order[:16], batch_size)]
    editor.scale_steps(_best_first_step(model, _of_ordinary_length(first)))


def _of_ordinary_length(edits: Sequence[EncodedBatch]) -> list[EncodedBatch]:
    """Return the batches without those of very many tokens, as each is run two dozen times; the least, if all are."""
    sizes = [rows.inputs["input_ids"].numel() for rows in edits]
    return [rows for rows, size in zip(edits, sizes, strict=True) if size <= max(_TOKENS, min(sizes))]


def _best_first_step(model: EditableModel, edits: Sequence[EncodedBatch]) -> float:
    losses = dict.fromkeys((2.0**power for power in range(-14, 9)), 0.0)
    bar = tqdm(total=len(edits) * len(losses), desc="Size of the first step")
    for rows in edits:
        rows = rows.to(model.device)
        state = model.split.state_of(rows)
        base_delta = model.editor.base_delta()
        factors, _ = model.context.trace(rows, state, (base_delta,))
        with torch.no_grad():
            updates = model.editor.join(model.editor(factors))
            for factor in losses:
                scaled = {name: (u, v * factor) for name, (u, v) in updates.items()}
                logits = model.context.logits(rows, state, (base_delta, scaled))
                losses[factor] += float(target_nll(logits, rows)) * len(rows)
                bar.update()
    bar.close()
    finite = {factor: loss for factor, loss in losses.items() if loss == loss}
    return min(finite, key=lambda factor: finite[factor]) / 2 if finite else 1.0
