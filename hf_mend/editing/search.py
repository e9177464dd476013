"""The search for the updates of some requests: propose, combine, accept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from ..data.encoding import EncodedBatch
from ..edits.low_rank import Update
from ..methods import IterativeMethod
from .acceptance import AcceptAll, AcceptByGroup, AcceptByRow
from .batch_state import BatchState, FoundUpdates, check_finite_answers
from .combining import Combination
from .context import EditingContext
from .keeping import keep_in_four_bits
from .proposals import FromGradient, FromSearch, Proposer, SearchOptions
from .summary import summarised


@torch.no_grad()
def find_updates(
    context: EditingContext,
    batches: Sequence[EncodedBatch],
    options: SearchOptions | None = None,
    group_size: int | None = None,
    preserved_keys: Mapping[str, torch.Tensor] = MappingProxyType({}),
    base_delta: Mapping[str, Update] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[FoundUpdates]:
    """
    Find the updates that make rows say their targets: each row's by itself, or for a method that joins edits
    ([`~hf_mend.methods.EditMethod.join`]), those of a group for one another.

    Each round proposes a step for the rows that want one, on the model under the steps so far: from the factors of one
    gradient, or by the method's own search. A method that joins proposes value residuals at each row's own inputs, and
    the residuals of a group so far become one update. The proposals are then accepted, as a whole, in part, or not at
    all: see [`~hf_mend.editing.acceptance.AcceptByRow`] and [`~hf_mend.editing.acceptance.AcceptByGroup`].

    In the end the residuals of a method that `sizes_steps` are multiplied by the configuration's `margin`, so that
    other words lead to the target too.

    Args:
        context ([`EditingContext`]): The model and the method.
        batches (`Sequence[EncodedBatch]`): Prompts and targets, a row a request, in batches that run in one pass.
        options ([`SearchOptions`], *optional*): The options of the search.
        group_size (`int`, *optional*): For a method that joins, the number of neighbouring rows of a batch in one
            group; all rows of all batches when missing.
        preserved_keys (`Mapping[str, torch.Tensor]`): The argument of that name of the method's `join`.
        base_delta (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`, *optional*): The base delta, which acts beside
            an update from the first step on; the method's own when missing. Pass an empty one where it acts in the
            model already.
        progress (`Callable`, *optional*): Called with the number of rows whose first step is made.

    Raises:
        ValueError: A gradient or an update is not finite, or the method lacks its statistics of calibration text.
    """
    options = SearchOptions() if options is None else options
    base_delta = context.method.base_delta() if base_delta is None else base_delta
    kind = FromSearch if isinstance(context.method, IterativeMethod) else FromGradient
    proposer = kind(context, options, base_delta, progress)
    states = [proposer.begin(rows) for rows in batches]
    combine = Combination(states, context.method, group_size, preserved_keys)
    _search(states, proposer, combine, _acceptance(states, proposer, group_size))
    made = summarised([one.on_host or one.updates for one in states])
    for one in states:
        if options.check and one.answers is not None and all(one.before.finite):
            check_finite_answers(one.answers)
    return [
        FoundUpdates(
            one.updates if one.on_host else summary.updates,
            one.before,
            one.answers if options.check else None,
            one.steps,
            one.rows,
            one.hidden,
            one.inputs,
            summary.used,
            summary.norms,
            one.kept,
            one.further,
        )
        for one, summary in zip(states, made, strict=True)
    ]


def _acceptance(states: Sequence[BatchState], proposer: Proposer, group_size: int | None) -> AcceptAll:
    """
    Return the rule of acceptance. A single step is accepted as it is, and so is the result of a method's own search.
    """
    if proposer.rounds == 1 or isinstance(proposer, FromSearch):
        return AcceptAll(states, proposer)
    if proposer.context.method.joins:
        return AcceptByGroup(states, proposer, group_size)
    return AcceptByRow(states, proposer)


def _search(states: Sequence[BatchState], proposer: Proposer, combine: Combination, acceptance: AcceptAll) -> None:
    """Run the loop, whose results the batches then hold."""
    method = proposer.context.method
    for step in range(proposer.rounds):
        if step and acceptance.going_on:
            for state in states:
                proposer.look(state)
            acceptance.judge()
        if not acceptance.going_on:
            break
        for number, state in enumerate(states):
            if state.wanted.any():
                acceptance.accept(number, proposer.propose(state))
        combine()
    if method.sizes_steps:
        for state in states:
            state.residuals = {name: d * method.config.margin for name, d in state.residuals.items()}
            state.forget_answers(True)
    if method.sizes_steps or acceptance.reverted:
        combine()
    error = proposer.context.four_bit_error
    if error is not None and not acceptance.corrections:
        keep_in_four_bits(states, proposer, error)
    if proposer.options.check:
        proposer.look_again(states)
        for correct in acceptance.corrections:
            if correct():
                combine()
                proposer.look_again(states)
    if error is not None and acceptance.corrections:
        keep_in_four_bits(states, proposer, error)
