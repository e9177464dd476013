"""How the updates that a search found are kept: in four bits, where their targets are then said as surely."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..edits.four_bit import bears_four_bits, in_four_bits
from ..edits.low_rank import Update
from .batch_state import BatchState
from .proposals import Proposer
from .scoring import Answers, chosen_answers


# From this probability of a target's least likely token on, an update in four bits is not compared with the one found.
_SURE = math.log(0.8)
# Nats that an update in four bits may lose of a target's log-probability.
_LOSS = 0.1


def keep_in_four_bits(states: Sequence[BatchState], proposer: Proposer, error: float) -> None:
    """
    Put in the place of each row's update what is left of it in four bits, so that the last look is at that. Where a
    target is then said less surely than by the update that was found, the row keeps that one.

    Args:
        states (`Sequence[BatchState]`): The batches; their `kept` is set.
        proposer ([`Proposer`]): Scores them.
        error (`float`): What may be left out: see [`~hf_mend.edits.four_bit.in_four_bits`].
    """
    for state in states:
        found = state.updates
        if not found or not bears_four_bits(found):
            continue
        state.kept = [*in_four_bits(found, error)]
        _put(state, {name: _decoded(state, name, pair) for name, pair in found.items()})
        state.answers = None
        if not proposer.options.check:
            continue
        proposer.look_again([state])
        answers = state.current_answers
        unsure = [not value > _SURE for value in answers.min_log_probability]
        tried = [bool(steps) and one for steps, one in zip(state.steps, unsure, strict=True)]
        if any(tried):
            _keep_better(state, found, proposer.score(state, found), torch.tensor(tried))


def _keep_better(state: BatchState, found: dict[str, Update], whole: Answers, tried: torch.Tensor) -> None:
    """Give those rows that lose by it the update that was found."""
    answers = state.current_answers
    gained = torch.tensor(whole.log_probability) - torch.tensor(answers.log_probability)
    lost = tried & (whole.all_correct & ~answers.all_correct | ~(gained < _LOSS) & torch.tensor(whole.finite))
    if not lost.any():
        return
    state.kept = [None if one else kept for one, kept in zip(lost.tolist(), state.kept, strict=True)]
    now = state.updates
    _put(state, {name: (_rows(lost, u, now[name][0]), _rows(lost, v, now[name][1])) for name, (u, v) in found.items()})
    state.answers = chosen_answers(lost, whole, answers)


def _decoded(state: BatchState, name: str, found: Update) -> Update:
    """Return what is kept of a layer's updates, in the shapes of those that were found."""
    u, v = (torch.zeros(side.shape) for side in found)
    for row, kept in enumerate(state.kept):
        if kept is not None:
            for side, own in zip((u, v), kept[name], strict=True):
                side[row, : len(own)] = own
    return u.to(found[0]), v.to(found[1])  # all rows at once


def _put(state: BatchState, updates: dict[str, Update]) -> None:
    state.keys = {name: u for name, (u, _) in updates.items()}
    state.residuals = {name: v for name, (_, v) in updates.items()}
    state.seen = updates


def _rows(first: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(first.to(one.device)[:, None, None], one, other)
