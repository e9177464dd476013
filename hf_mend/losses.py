"""The training loss: say the target, change nothing else (Mitchell et al. 2022, equation 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from .data import EditBatch, Rows
from .edits import applied
from .methods import EditMethod
from .targets import Target
from .tracing import HiddenState, SplitModel, logits_of, trace


def target_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Mean negative log-likelihood of the target's tokens, in nats.

    Args:
        logits (`torch.Tensor` of shape `(tokens, vocab)`): The edited model's.
        labels (`torch.Tensor` of shape `(tokens,)`): The target's tokens.
    """
    return nn.functional.cross_entropy(logits.float(), labels.to(logits.device))


def locality_kl(edited: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """
    Mean `KL(base || edited)` over positions, in nats.

    Args:
        edited (`torch.Tensor` of shape `(positions, vocab)`): Logits of the edited model.
        base (`torch.Tensor` of shape `(positions, vocab)`): Logits of the un-edited model.
    """
    edited_log = nn.functional.log_softmax(edited.float(), -1)
    base_log = nn.functional.log_softmax(base.float(), -1)
    return nn.functional.kl_div(edited_log, base_log, reduction="batchmean", log_target=True)


@dataclass
class EditingLoss:
    """
    Args:
        loss (`torch.Tensor`): `edit` plus each kind's weight times its KL.
        edit (`torch.Tensor`): Target's negative log-likelihood on the general rows.
        locality (`dict[str, torch.Tensor]`): KL on each kind of local rows.
    """

    loss: torch.Tensor
    edit: torch.Tensor
    locality: dict[str, torch.Tensor]


def editing_loss(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    batch: EditBatch,
    locality_weights: Mapping[str, float] = MappingProxyType({}),
) -> EditingLoss:
    """
    Makes every edit of the batch, each on its own copy of nothing: example b's rows alone see example b's factors.

    What lies below the lowest edited block runs once for each text and serves the un-edited and the edited pass.

    Args:
        split ([`SplitModel`]): The base model.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Factors to updates; the only part with trainable parameters.
        batch ([`EditBatch`]): The texts.
        locality_weights (`Mapping[str, float]`): Weight of the KL on each kind of local rows, 1 where none is given
            (the paper's is 1 / `c_edit`).
    """
    factors, _ = trace(split, targets, batch.edit.inputs, batch.edit.next_tokens)
    updates = method(factors)

    def edited_logits(rows: Rows, state: HiddenState) -> torch.Tensor:
        with applied(targets, updates):
            return logits_of(split, rows, state)

    general = batch.general
    labels = general.next_tokens[general.positions]
    edit = target_nll(edited_logits(general, split.run_below(general.inputs)), labels)
    loss, locality = edit, {}
    for kind, rows in batch.local.items():
        state = split.run_below(rows.inputs)
        with torch.no_grad():
            base = logits_of(split, rows, state)
        locality[kind] = locality_kl(edited_logits(rows, state), base)
        loss = loss + locality_weights.get(kind, 1.0) * locality[kind]
    return EditingLoss(loss, edit, locality)
