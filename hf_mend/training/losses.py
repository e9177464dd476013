"""The training loss: say the target, change nothing else (Mitchell et al. 2022, equation 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..bases.by_length import by_length
from ..bases.gradients import Factors, row_means
from ..bases.readout import readout_of
from ..bases.split import HiddenState
from ..data.encoding import EncodedBatch
from ..editing.context import EditingContext, alone
from ..edits.low_rank import Update, compacted, together
from .cache import HiddenStateCache
from .examples import EditBatch


def target_nll(logits: torch.Tensor, rows: EncodedBatch) -> torch.Tensor:
    """
    Mean negative log-likelihood of a target's tokens, in nats; the mean of the rows' means.

    Args:
        logits (`torch.Tensor` of shape `(tokens, vocab)`): The edited model's, at the rows' positions.
        rows ([`EncodedBatch`]): The texts; at all their positions there is a token to say.
    """
    labels = rows.places.labels.to(logits.device)  # at all positions there is one
    return row_means(nn.functional.cross_entropy(logits.float(), labels, reduction="none"), rows).mean()


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
    context: EditingContext,
    batch: EditBatch,
    locality_weights: Mapping[str, float] = MappingProxyType({}),
    run_below: Callable[[EncodedBatch], HiddenState] | None = None,
    group_size: int = 1,
    micro_batch_size: int | None = None,
    calls_per_batch: int = 1,
    decay: float = 0.9,
) -> EditingLoss:
    """
    Makes every edit of the batch: example b's rows see example b's factors alone, or those of its group's edits.

    What lies below the lowest edited block runs once for each text and serves the un-edited and the edited pass.

    Args:
        context ([`EditingContext`]): The base model and the method, the only part with trainable parameters.
        batch ([`EditBatch`]): The texts.
        locality_weights (`Mapping[str, float]`): Weight of the KL on each kind of local rows, 1 where none is given
            (the paper's is 1 / `c_edit`).
        run_below (`Callable`, *optional*): Gives the rows' hidden states at the lowest edited block, as a
            [`~hf_mend.HiddenStateCache`] does, and what the un-edited model says where it keeps that; they are
            computed when missing.
        group_size (`int`, defaults to 1): How many neighbouring edits are summed, so that the editor learns edits
            that leave one another alone. Where it does not divide the batch, their greatest common divisor is taken.
        micro_batch_size (`int`, *optional*): Most edits whose texts are in memory with their graph. The loss then has
            the same value and gradient, in two stages (Tan et al. 2024, "Massive Editing for Large Language Models via
            Meta Learning", section 4.2): that of the texts with respect to the updates, some texts after the others,
            and that of the updates with respect to the method's parameters.
        calls_per_batch (`int`, defaults to 1): Into how many calls the batch falls, each made on the model that
            those before it have left; see [`sequential_loss`]. The other two arguments about edits do not count then.
        decay (`float`, defaults to 0.9): Weight of a call's texts in the loss of the next call.
    """
    below = run_below or (lambda rows: context.split.state_of(rows))
    if calls_per_batch > 1:
        return sequential_loss(context, batch, locality_weights, below, calls_per_batch, decay)
    size = math.gcd(group_size, len(batch))
    if micro_batch_size is not None and micro_batch_size < len(batch):
        return _two_stage_loss(context, batch, locality_weights, below, size, micro_batch_size)
    method = context.method
    base_delta = method.base_delta()
    factors = _traced(context, batch, below, base_delta)
    updates = method.join(together(method(factors), size))
    return _loss_under(context, (base_delta, updates), batch, locality_weights, below)


def _traced(
    context: EditingContext,
    batch: EditBatch,
    below: Callable[[EncodedBatch], HiddenState],
    *updates: Mapping[str, Update],
) -> Factors:
    """The factors of the edits' gradients on the model with what it carries; none flows back through them."""
    fixed = [{name: (u.detach(), v.detach()) for name, (u, v) in one.items()} for one in updates]
    mlp = readout_of(context.split, batch.edit, below).mlp
    state, _ = context.at_answers_alone(batch.edit, below(batch.edit))
    factors, _ = context.trace(batch.edit, state, fixed, mlp)
    return factors


def _loss_under(
    context: EditingContext,
    updates: Sequence[Mapping[str, Update]],
    batch: EditBatch,
    locality_weights: Mapping[str, float],
    below: Callable[[EncodedBatch], HiddenState],
) -> EditingLoss:
    """The loss of a batch's texts under given updates, all of them at once; what stays is the un-edited base's."""
    readout = readout_of(context.split, batch.general, below)

    def read(rows: EncodedBatch, state: HiddenState, *seen: Mapping[str, Update]) -> torch.Tensor:
        rows, state, narrow = alone(rows, state, readout.mlp)
        with context.applied(rows, *seen, narrow=narrow):
            return readout.at(rows, state)

    said = [
        (rows, read(rows, state, *_of_rows(updates, index, len(batch.general))))
        for index, rows, state in _passes(context, batch.general, below)
    ]
    values = readout.nll([one for _, one in said], [rows.places.labels for rows, _ in said])
    edit = _mean_of_rows(values, [rows for rows, _ in said])
    stays: dict[str, list[EncodedBatch]] = {}
    edited: list[torch.Tensor] = []
    base: list[torch.Tensor] = []
    for kind, texts in batch.local.items():
        for index, rows, state in _passes(context, texts, below):
            kept = below.unedited(rows) if isinstance(below, HiddenStateCache) else None
            if kept is None:
                with torch.no_grad():
                    kept = read(rows, state)
            base.append(kept)
            edited.append(read(rows, state, *_of_rows(updates, index, len(texts))))
            stays.setdefault(kind, []).append(rows)
    divergences = iter(readout.kl(edited, base))
    loss, locality = edit, {}
    for kind, parts in stays.items():
        locality[kind] = _mean_of_rows([next(divergences) for _ in parts], parts)
        loss = loss + locality_weights.get(kind, 1.0) * locality[kind]
    return EditingLoss(loss, edit, locality)


def _passes(
    context: EditingContext, rows: EncodedBatch, below: Callable[[EncodedBatch], HiddenState]
) -> Iterator[tuple[torch.Tensor | None, EncodedBatch, HiddenState]]:
    """The rows and their states, in one pass where it runs the answers alone, by length where it runs whole texts."""
    if context.at_answers and context.split.goes_on is not False:
        state, _ = context.at_answers_alone(rows, below(rows))
        if state.answers is not None:
            yield None, rows, state
            return
    for index, part in by_length(rows):
        yield index, part, below(part)


def _mean_of_rows(values: Sequence[torch.Tensor], parts: Sequence[EncodedBatch]) -> torch.Tensor:
    return torch.cat([row_means(one, rows) for one, rows in zip(values, parts, strict=True)]).mean()


def _two_stage_loss(
    context: EditingContext,
    batch: EditBatch,
    locality_weights: Mapping[str, float],
    below: Callable[[EncodedBatch], HiddenState],
    size: int,
    micro_batch_size: int,
) -> EditingLoss:
    """`editing_loss` with the texts of `micro_batch_size` edits in memory at a time."""
    parts = [batch.edits(start, start + micro_batch_size) for start in range(0, len(batch), micro_batch_size)]
    method = context.method
    base_delta = method.base_delta()
    asked: dict[str, list[Update]] = {}
    for part in parts:
        factors = _traced(context, part, below, base_delta)
        # Checkpointed: of the networks, too, one part's graph is in memory at a time.
        for name, pair in checkpoint(method, factors, use_reentrant=False).items():
            asked.setdefault(name, []).append(pair)
    whole = {
        name: (torch.cat([u for u, _ in pairs]), torch.cat([v for _, v in pairs])) for name, pairs in asked.items()
    }
    updates = method.join(together(whole, size))
    # Each group's update in its smallest form: where the first stage's graph begins.
    groups = {name: [compacted(pair) for pair in zip(u, v, strict=True)] for name, (u, v) in updates.items()}
    leaves = {name: [(_leaf(u), _leaf(v)) for u, v in pairs] for name, pairs in groups.items()}
    beside = {name: (_leaf(u), _leaf(v)) for name, (u, v) in base_delta.items()}
    value = edit = torch.zeros((), dtype=torch.float32)
    locality: dict[str, torch.Tensor] = {}
    for number, part in enumerate(parts):
        owners = [(number * micro_batch_size + i) // size for i in range(len(part))]
        seen = {name: _seen_by(owners, pairs) for name, pairs in leaves.items()}
        loss = _loss_under(context, (beside, seen), part, locality_weights, below)
        share = len(part) / len(batch)
        if loss.loss.requires_grad:
            (loss.loss * share).backward()
        value, edit = value + loss.loss.detach() * share, edit + loss.edit.detach() * share
        for kind, divergence in loss.locality.items():
            locality[kind] = locality.get(kind, torch.zeros((), dtype=torch.float32)) + divergence.detach() * share
    ends = [pair for pairs in groups.values() for pair in pairs] + [*base_delta.values()]
    starts = [pair for pairs in leaves.values() for pair in pairs] + [*beside.values()]
    for pair, begun in zip(ends, starts, strict=True):
        for side, start in zip(pair, begun, strict=True):
            if start.grad is not None and side.requires_grad:
                # Adds nothing to the value, and the first stage's gradient to its own.
                value = value + ((side - side.detach()) * start.grad).sum()
    return EditingLoss(value, edit, locality)


def sequential_loss(
    context: EditingContext,
    batch: EditBatch,
    locality_weights: Mapping[str, float],
    below: Callable[[EncodedBatch], HiddenState],
    calls: int,
    decay: float,
) -> EditingLoss:
    """
    The loss of edits made one call after another: each call's gradient factors are those of the model that the calls
    before have left, and its loss looks back at their texts, a call further with `decay` times the weight (after
    Li et al. 2025, "Reinforced Lifelong Editing for Language Models", whose memory backtracking this is).

    Args:
        context, batch, locality_weights: As for [`editing_loss`].
        below (`Callable`): Gives the rows' hidden states at the lowest edited block.
        calls (`int`): How many; the batch is split evenly, and where it is too small a call has one edit.
        decay (`float`): From 0, each call for itself, to 1, all alike.
    """
    each = max(1, len(batch) // calls)
    parts = [batch.edits(start, min(start + each, len(batch))) for start in range(0, len(batch), each)]
    method = context.method
    base_delta = method.base_delta()
    made: dict[str, list[Update]] = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    losses: list[EditingLoss] = []
    shares: list[float] = []
    for number, part in enumerate(parts):
        earlier_edits = {name: _side_by_side(pairs) for name, pairs in made.items()}
        factors = _traced(context, part, below, base_delta, earlier_edits)
        asked = together(method(factors), len(part))
        preserved_keys = {name: torch.cat(x) for name, x in inputs.items()} if method.joins else {}
        for name, (u, v) in method.join(asked, preserved_keys).items():
            made.setdefault(name, []).append((u[0], v[0]))
            inputs.setdefault(name, []).append(asked[name][0][0].detach())
        seen = {name: _side_by_side(pairs) for name, pairs in made.items()}
        for earlier, texts in enumerate(parts[: number + 1]):
            weight = decay ** (number - earlier) * len(texts)
            if weight > 0:
                losses.append(_loss_under(context, (base_delta, seen), texts, locality_weights, below))
                shares.append(weight)
    return _mean_loss(losses, shares)


def _side_by_side(pairs: Sequence[Update]) -> Update:
    return torch.cat([u for u, _ in pairs]), torch.cat([v for _, v in pairs])


def _mean_loss(losses: Sequence[EditingLoss], weights: Sequence[float]) -> EditingLoss:
    def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([v * w for v, w in zip(values, weights, strict=True)]).sum() / sum(weights)

    locality = {kind: mean([loss.locality[kind] for loss in losses]) for kind in losses[0].locality}
    return EditingLoss(mean([loss.loss for loss in losses]), mean([loss.edit for loss in losses]), locality)


def _of_rows(
    updates: Sequence[Mapping[str, Update]], index: torch.Tensor | None, total: int
) -> Sequence[Mapping[str, Update]]:
    """The updates of some of `total` rows, of which equally many neighbouring ones belong to each group of edits."""
    if index is None:
        return updates
    chosen: list[dict[str, Update]] = []
    for one in updates:
        seen: dict[str, Update] = {}
        for name, (u, v) in one.items():
            group = (index * len(u) // total).to(u.device)
            seen[name] = (u, v) if u.dim() == 2 else (u[group], v[group])
        chosen.append(seen)
    return chosen


def _leaf(side: torch.Tensor) -> torch.Tensor:
    return side.detach().requires_grad_(torch.is_grad_enabled())


def _seen_by(owners: Sequence[int], pairs: Sequence[Update]) -> Update:
    """The updates of each edit's group, as `applied` takes them."""
    if len(set(owners)) == 1:
        return pairs[owners[0]]
    return torch.stack([pairs[i][0] for i in owners]), torch.stack([pairs[i][1] for i in owners])
