"""The way of a request to an edit: encode, trace, transform, apply, check."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from ..bases.fingerprint import editor_id
from ..data.encoding import Encoder
from ..data.estimate import Estimate
from ..edits.active import ActiveEdits
from ..edits.edit import Edit, acting_ids
from ..edits.edit_scope import EditScope
from ..scope.gate import ScopeGate
from .afterwards import look_again, looks_at_all, lost_edits, take_back, take_back_failed
from .batch_state import FoundUpdates
from .calibration_text import observe_calibration_text
from .call import AfterEdits, Call
from .context import EditingContext
from .edit_result import EditResult, LostEdit
from .look import BatchLook
from .proposals import SearchOptions
from .requests import EditRequest
from .results import absence_edit, as_edit, as_result, base_delta_edit, unchanged_result
from .scoping import found_keys, own_queries, report, scopes_of
from .search import find_updates
from .summary import in_bfloat16


def make_edits(
    context: EditingContext,
    encoder: Encoder,
    active: ActiveEdits,
    requests: Sequence[EditRequest],
    options: SearchOptions,
    batch_size: int = 16,
    gate: ScopeGate | None = None,
    after: AfterEdits | None = None,
) -> list[EditResult]:
    """
    Make the edits of one call and add them to the model. All are found on the model as it was before the call; what
    the results say of after is measured on the model with all of them.

    An edit of a prompt that has one already is found on the model without the earlier one, and supersedes it. Equal
    requests are made once. An edit that says the target's last word as a longer one is made once more, with the token
    that ends it, on the model with the others.

    Raises:
        ValueError: A gradient or an update is not finite, or the model carries edits of another editor that changes
            the base itself; the edits are as they were.
    """
    method = context.method
    made_by = editor_id(method, method.config.method)
    started = time.perf_counter()
    call = Call(context, encoder, active, [*requests], options, batch_size, made_by, gate, after or AfterEdits())
    delta = base_delta_edit(method, made_by, active.edits)
    if not method.trains and not method.is_calibrated:
        with active.disabled():
            observe_calibration_text(context, encoder)
    with active.draft():  # until all is made, nobody else sees any of it
        results = _made(call, delta)
        made = active.snapshot
    active.install(made)
    seconds = (time.perf_counter() - started) / len(requests)
    for result in results:
        result.seconds = seconds
    return results


def _made(call: Call, delta: Edit | None) -> list[EditResult]:
    """Make the edits of a call in a draft."""
    requests, encoder, before = [*call.requests], call.encoder, call.active.snapshot
    probed = {i: call.answers(request.probes) for i, request in enumerate(requests) if request.probes}
    first_of: dict[tuple[str, bool], int] = {}
    for i, request in enumerate(requests):
        first_of.setdefault(request.prompt_key, i)
    made_once = list(first_of.values())
    _add_edits(call, made_once, delta)
    lost: list[LostEdit] = []
    if call.options.check:
        look_again(call, made_once)
        if not call.after.keep_failed:
            _end_words(call, made_once, delta)
            take_back_failed(call, made_once)
        lost = lost_edits(call, before)
    in_order = [replace(call.results[first_of[request.prompt_key]], prompt=request.prompt) for request in requests]
    for i, result in enumerate(in_order):
        result.lost = lost
        if i in probed:
            result.set_probes(requests[i], probed[i], call.answers(requests[i].probes), encoder)
    return in_order


def _end_words(call: Call, numbers: Sequence[int], delta: Edit | None) -> None:
    """Make edits anew, with the token that ends the target, where the model says the target's last word as longer."""
    again = [i for i in numbers if call.results[i].longer_word is not None and not call.requests[i].ends]
    if not again:
        return
    said = {i: call.results.pop(i).before for i in again}
    take_back(call, again)
    for i in again:
        call.requests[i] = replace(call.requests[i], ends=True)
    _add_edits(call, again, delta)
    for i, text in said.items():
        call.results[i].before = text
    look_again(call, numbers)


def _add_edits(call: Call, numbers: Sequence[int], delta: Edit | None) -> None:
    """Find edits for some of the requests, on the model without those that they supersede, and add them to it."""
    active, requests = call.active, call.requests
    earlier, standing = active.edits, active.snapshot.standing
    call.now = call.answers_to([i for i in numbers if requests[i].prompt_key in standing])
    for i, (answers, row) in call.now.items():
        if all(answers.correct[row]) and not call.options.force:
            length = call.target_length(i)
            call.results[i] = unchanged_result(requests[i], answers, row, call.encoder, length, call.options.check)
            call.said[i] = answers, row
    gone = {requests[i].prompt_key for i in call.now if i not in call.results}
    before = active.snapshot
    if gone:
        active.replace([edit for edit in earlier if edit.prompt_key not in gone])
    if call.context.method.joins and call.gate is None:
        _trace_missing_keys(call, earlier)
    batches = call.batches([i for i in numbers if i not in call.results])
    found = _find_in_batches(call, batches, earlier, delta)
    scopes = _scopes(call, batches, found)
    for batch, of_rows in zip(batches, found, strict=True):
        coarse = call.context.method.config.factor_dtype != "float32"
        if scopes and coarse and not (of_rows.kept and all(of_rows.kept)):
            # Acting at few tokens, an edit bears half the precision, and thousands take half the room.
            of_rows.updates = in_bfloat16(of_rows.updates)
        for row, i in enumerate(batch):
            length = call.target_length(i)
            edit = as_edit(requests[i], of_rows, row)
            result = call.results[i] = as_result(requests[i], edit, of_rows, row, call.encoder, length)
            if of_rows.after is not None:
                call.said[i] = of_rows.after, row
            if i in call.now:
                result.set_before(*call.now[i], call.encoder, length)
                old = standing[requests[i].prompt_key]
                edit = edit or absence_edit(requests[i], of_rows, row)
                if edit is not None:
                    result.id, result.superseded = edit.id, old.id
            if edit is not None:
                call.edits[i] = edit
                if i in scopes and edit.updates:
                    edit.scope = scopes[i]
                    result.nbytes = edit.nbytes
                edit.metadata["editor"] = call.made_by
                edit.requires = delta.id if delta is not None and edit.updates else None
                if of_rows.inputs:
                    active.preserved_keys.by_edit[edit.id] = _present(of_rows.inputs, row)
    if gone:
        active.install(before)
    deltas = [delta] if delta is not None and any(edit.requires for edit in call.edits.values()) else []
    active.replace([*earlier, *deltas, *(call.edits[i] for i in sorted(call.edits))])
    if call.gate is not None:
        for i, edit in call.edits.items():
            if edit.scope is not None:
                call.results[i].scope = report(edit, active.snapshot.bank, call.gate.strictness)


def _scopes(call: Call, batches: Sequence[Sequence[int]], found: Sequence[FoundUpdates]) -> dict[int, EditScope]:
    """Return the scopes of the edits of all batches' requests, by number, from the hidden states of the search."""
    gate, split, numbers = call.gate, call.context.split, [i for batch in batches for i in batch]
    if gate is None:
        return {}
    requests = [call.requests[i] for i in numbers]
    known = [keys for one in found for keys in found_keys(gate, split, one.rows, one.hidden)]
    forms = [own_queries(one.query, call.encoder, one.paraphrases) for one in requests]
    excluded = [one.probes[len(one.paraphrases) :] for one in requests]
    return dict(zip(numbers, scopes_of(gate, split, call.encoder, forms, excluded, known), strict=True))


def _find_in_batches(
    call: Call, batches: Sequence[Sequence[int]], earlier: Sequence[Edit], delta: Edit | None
) -> list[FoundUpdates]:
    """
    Find the updates of all batches' requests, each batch by itself, or all of them together where the method joins.
    """
    acting: list[str] = []
    preserved_keys: Mapping[str, torch.Tensor] = {}
    if delta is not None or call.context.method.joins:
        acting = acting_ids(call.active.edits)
    if call.context.method.joins and call.gate is None:
        preserved_keys = call.active.preserved_keys.of(acting, waiting=[edit.id for edit in earlier])
    base_delta = {} if delta is None or delta.id in acting else delta.updates
    options, device = call.options, call.context.split.device
    if call.gate is None and not call.context.method.joins and looks_at_all(call) and options.max_steps == 1:
        options = replace(options, check=False)  # what is made of a single step is seen then
    encoded = [call.rows(batch).to(device) for batch in batches]
    alone = call.gate is not None  # with scopes, no token has two edits
    calls = [encoded] if call.context.method.joins and not alone else [[rows] for rows in encoded]
    found: list[FoundUpdates] = []
    off = nullcontext() if call.gate is None else call.gate.suspended()
    count = sum(map(len, batches))
    sizes = [sum(side.numel() for side in rows.inputs.values()) for rows in encoded]  # long targets take longer
    estimate, left = Estimate("Editing", count, "edits", work=sum(sizes)), iter(sizes)
    with off, tqdm(total=count, desc="Editing", disable=len(batches) <= 1) as bar:

        def progress(rows: int) -> None:
            bar.update(rows)
            estimate.done(rows, next(left, 0))

        for rows in calls:
            size = 1 if alone else None
            found += find_updates(call.context, rows, options, size, preserved_keys, base_delta, progress)
    if call.gate is None:
        call.kept = [(list(batch), one) for batch, one in zip(batches, found, strict=True)]
    return found


def _trace_missing_keys(call: Call, earlier: Sequence[Edit]) -> None:
    """
    Trace the inputs of acting edits that came from a file or a store, on the model as it is now, to preserve them as
    those of edits made here. An edit without a prompt has none.
    """
    context, keys = call.context, call.active.preserved_keys.by_edit
    acting = acting_ids(call.active.edits)
    edits = [edit for edit in earlier if edit.id in acting and edit.prompt and edit.id not in keys]
    requests = [EditRequest.of_edit(edit) for edit in edits]
    batches = call.batches(range(len(requests)), requests)
    for batch in tqdm(batches, desc="Inputs of earlier edits", disable=len(batches) <= 1):
        rows = call.encoder([requests[i].query for i in batch]).to(context.split.device)
        hidden = context.split.run_below(context.split.inputs_of(rows))
        factors, _ = context.trace(rows, hidden)
        look = BatchLook(context, rows, hidden, torch.arange(len(rows)))
        inputs = context.method.key_inputs(factors, look.places)
        for row, i in enumerate(batch):
            keys[edits[i].id] = _present(inputs, row)


def _present(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return a row's inputs at the tokens that have one, layer name -> `(tokens, d_in)`."""
    return {name: x[row][x[row].any(-1)] for name, x in inputs.items()}
