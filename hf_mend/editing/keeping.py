"""How the updates that a search found are kept: in four bits, where their targets are then said as surely."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..bases.fused import fetched, of_one_shape, stacked
from ..data.places import on_device
from ..edits.four_bit import FourBitUpdates, bears_four_bits, in_four_bits
from ..edits.low_rank import Update
from .batch_state import BatchState, check_finite, per_row
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
        on_host = _fetched(found)
        check_finite("update", on_host)
        state.kept = [*in_four_bits(on_host, error)]
        state.on_host = _decoded(state.kept, on_host)
        _put(state, _moved(state.on_host, found))
        state.forget_answers(True)
        if not proposer.options.check:
            continue
        proposer.look_again([state])
        answers = state.current_answers
        unsure = [not value > _SURE for value in answers.min_log_probability]
        tried = [bool(steps) and one for steps, one in zip(state.steps, unsure, strict=True)]
        if any(tried):
            among = torch.tensor(tried)
            _keep_better(state, found, on_host, proposer.score(state, found, among), among)


def _fetched(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return updates in the host's memory, in one transfer, in float32 and those of one shape side by side."""
    groups = of_one_shape(updates)
    sides = fetched(stacked([updates[name][side] for name in names]) for names in groups for side in (0, 1))
    pairs = zip(sides[::2], sides[1::2], strict=True)
    found = {
        name: (u[i].float(), v[i].float())
        for names, (u, v) in zip(groups, pairs, strict=True)
        for i, name in enumerate(names)
    }
    return {name: found[name] for name in updates}


def _moved(updates: Mapping[str, Update], like: Mapping[str, Update]) -> dict[str, Update]:
    """Return updates of the host where others of their names are, in their dtypes; nothing waits until they are."""
    found: dict[str, Update] = {}
    for names in of_one_shape(like):
        u, v = (
            on_device(stacked([updates[name][side] for name in names]), like[names[0]][side].device).to(
                like[names[0]][side].dtype
            )
            for side in (0, 1)
        )
        found.update({name: (u[i], v[i]) for i, name in enumerate(names)})
    return {name: found[name] for name in like}


def _keep_better(
    state: BatchState, found: dict[str, Update], on_host: dict[str, Update], whole: Answers, tried: torch.Tensor
) -> None:
    """Give those rows that lose by it the update that was found."""
    answers = state.current_answers
    gained = torch.tensor(whole.log_probability) - torch.tensor(answers.log_probability)
    lost = tried & (whole.all_correct & ~answers.all_correct | ~(gained < _LOSS) & torch.tensor(whole.finite))
    if not lost.any():
        return
    state.kept = [None if one else kept for one, kept in zip(lost.tolist(), state.kept, strict=True)]
    _put(state, _chosen(lambda side: per_row(lost, side), found, state.updates))
    state.on_host = _chosen(lambda side: lost[:, None, None], on_host, state.on_host)
    state.set_answers(chosen_answers(lost, whole, answers))


def _decoded(kept: Sequence[FourBitUpdates | None], found: Mapping[str, Update]) -> dict[str, Update]:
    """Return what is kept of all rows' updates, in the shapes of those that were found, and side by side likewise."""
    decoded: dict[str, Update] = {}
    for names in of_one_shape(found):
        u, v = (torch.zeros(len(names), *side.shape, dtype=torch.float32) for side in found[names[0]])
        for row, one in enumerate(kept):
            if one is not None:
                for i, name in enumerate(names):
                    for side, own in zip((u, v), one[name], strict=True):
                        side[i, row, : len(own)] = own
        decoded.update({name: (u[i], v[i]) for i, name in enumerate(names)})
    return {name: decoded[name] for name in found}


def _put(state: BatchState, updates: dict[str, Update]) -> None:
    state.keys = {name: u for name, (u, _) in updates.items()}
    state.residuals = {name: v for name, (_, v) in updates.items()}
    state.seen = updates


def _chosen(
    first: Callable[[torch.Tensor], torch.Tensor], one: Mapping[str, Update], other: Mapping[str, Update]
) -> dict[str, Update]:
    """Return the rows of `one` where `first` is set, which is given for a side, and those of `other` elsewhere."""
    return {
        name: (torch.where(first(u), u, other[name][0]), torch.where(first(v), v, other[name][1]))
        for name, (u, v) in one.items()
    }
