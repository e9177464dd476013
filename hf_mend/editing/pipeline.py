"""The way of a request to an edit: encode, trace, transform, apply, check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from tqdm.auto import tqdm

from ..bases.fingerprint import editor_id
from ..data.encoding import Encoder, Query
from ..data.estimate import Estimate
from ..edits.active import ActiveEdits
from ..edits.edit import Edit, acting_ids
from ..edits.edit_scope import EditScope
from ..methods import EditMethod
from ..scope.gate import ScopeGate
from .afterwards import (
    keep_from_own_prompts,
    look_again,
    looks_at_all,
    lost_edits,
    put_back,
    report_scopes,
    take_back,
    take_back_failed,
)
from .batch_state import FoundUpdates
from .budget import Budget, estimated_cost, tried
from .calibration_text import observe_calibration_text
from .call import AfterEdits, Call
from .context import EditingContext
from .contrasts import named_in, subject_of, with_contrasts
from .edit_result import EditResult, LostEdit
from .look import BatchLook
from .proposals import SearchOptions
from .requests import EditRequest
from .results import absence_edit, as_edit, as_result, base_delta_edit, unchanged_result
from .scoping import FoundKeys, found_keys, scopes_of
from .search import find_updates
from .summary import in_bfloat16
from .together import processes_of_call


def make_edits(
    context: EditingContext,
    encoder: Encoder,
    active: ActiveEdits,
    requests: Sequence[EditRequest],
    options: SearchOptions,
    batch_size: int | None = None,
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
        ValueError: A gradient or an update is not finite, the model carries edits of another editor that changes the
            base itself, or several processes are to share edits out that the method finds together; the edits are as
            they were.
    """
    method, together = context.method, processes_of_call()
    if together.count > 1 and (_observes(method) or (method.joins and gate is None)):
        raise ValueError(
            f"the method {method.config.method!r} finds the edits of a call for one another, so that {together.count} "
            "processes cannot share them out; use one process"
        )
    made_by = editor_id(method, method.config.method)
    started = time.perf_counter()
    after = after or AfterEdits()
    budget = _budget(context, batch_size)
    call = Call(context, encoder, active, [*requests], options, budget, made_by, gate, after, together)
    delta = base_delta_edit(method, made_by, active.edits)
    if not method.trains and not method.is_calibrated:
        with active.disabled():
            observe_calibration_text(context, encoder)
    with active.draft(of_call=True):  # until all is made, nobody else sees any of it
        results = _made(call, delta)
        made = active.snapshot
    active.install(made)
    seconds = (time.perf_counter() - started) / len(requests)
    for result in results:
        result.seconds = seconds
    return results


def _observes(method: EditMethod) -> bool:
    """Whether a method keeps statistics of the edits that it makes, by which the next are made."""
    return type(method).observe_edits is not EditMethod.observe_edits


def _budget(context: EditingContext, batch_size: int | None) -> Budget:
    split = context.split
    cost = estimated_cost(split.model, len(split.blocks) - split.block)
    return Budget(split.device, cost, batch_size, fixed=_observes(context.method))


def _made(call: Call, delta: Edit | None) -> list[EditResult]:
    """Make the edits of a call in a draft."""
    requests, encoder, before = [*call.requests], call.encoder, call.active.snapshot
    first_of: dict[tuple[str, bool], int] = {}
    for i, request in enumerate(requests):
        first = first_of.setdefault(request.prompt_key, i)
        call.requests[first] = call.requests[first].with_probes_of(request)
    own = call.together.own([*first_of.values()])
    owned = {*own}
    asked = [i for i, request in enumerate(requests) if first_of[request.prompt_key] in owned]
    probed = {i: call.answers(requests[i].probes) for i in asked if requests[i].probes}
    _add_edits(call, own, delta)
    lost: list[LostEdit] = []
    if call.options.check:
        said = [i for i in own if call.results[i].success]
        look_again(call, own)
        keep_from_own_prompts(call, said)
        if not call.after.keep_failed:
            _end_words(call, own, delta)
        _in_paraphrases(call, own, delta)
        if not call.after.keep_failed:
            take_back_failed(call, own)
        lost = lost_edits(call, before)
    made = {i: replace(call.results[first_of[requests[i].prompt_key]], prompt=requests[i].prompt) for i in asked}
    for i, result in made.items():
        if i in probed:
            result.set_probes(requests[i], probed[i], call.answers(requests[i].probes), encoder)
    for part in call.together.every(made):
        made |= part
    for result in made.values():
        result.lost = lost
    return [made[i] for i in range(len(requests))]


def _end_words(call: Call, numbers: Sequence[int], delta: Edit | None) -> None:
    """Make edits anew, with the token that ends the target, where the model says the target's last word as longer."""
    again = [i for i in numbers if call.results[i].longer_word is not None and not call.requests[i].ends]
    of_all = call.together.joined(again)
    if not of_all:
        return
    said = {i: call.results.pop(i).before for i in again}
    take_back(call, of_all)
    for i in again:
        call.requests[i] = replace(call.requests[i], ends=True)
    _add_edits(call, again, delta)
    for i, text in said.items():
        call.results[i].before = text
    look_again(call, numbers)


def _in_paraphrases(call: Call, numbers: Sequence[int], delta: Edit | None) -> None:
    """
    Make edits anew in their paraphrases too, where the model does not say the target to all of these. Where the search
    does not lead so far, the edit stays as it was.
    """
    if not call.ends:
        return
    again = [i for i in numbers if i in call.edits and call.results[i].success and not _said_to_all(call, i)]
    of_all = call.together.joined(again)
    if not of_all:
        return
    first = {i: (call.edits[i], call.results[i]) for i in again}
    take_back(call, of_all)
    for i in again:
        del call.results[i]
        call.requests[i] = replace(call.requests[i], in_paraphrases=True)
    _add_edits(call, again, delta)
    said = [i for i in again if call.results[i].success]
    look_again(call, again)
    keep_from_own_prompts(call, said)
    back = {i: edit for i, (edit, _) in first.items() if not call.results[i].success}
    call.results |= {i: result for i, (_, result) in first.items() if i in back}
    put_back(call, call.together.edits(back))


def _said_to_all(call: Call, number: int) -> bool:
    """Whether the model says a request's target behind all of its paraphrases."""
    request = call.requests[number]
    said = request.probes[: len(request.paraphrases)]
    return not said or bool(call.answers(said).all_correct.all())


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
    gone = {*call.together.joined([requests[i].prompt_key for i in call.now if i not in call.results])}
    before = active.snapshot
    if gone:
        active.replace([edit for edit in earlier if edit.prompt_key not in gone])
    if call.context.method.joins and call.gate is None:
        _trace_missing_keys(call, earlier)
    batches, found = _find_in_batches(call, [i for i in numbers if i not in call.results], earlier, delta)
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
    call.edits = call.together.edits(call.edits)
    deltas = [delta] if delta is not None and any(edit.requires for edit in call.edits.values()) else []
    active.replace([*call.others(earlier), *deltas, *call.in_order()])
    if call.gate is not None:
        report_scopes(call)


def _scopes(call: Call, batches: Sequence[Sequence[int]], found: Sequence[FoundUpdates]) -> dict[int, EditScope]:
    """Return the scopes of the edits of all batches' requests, by number, from the hidden states of the search."""
    gate, split, numbers = call.gate, call.context.split, [i for batch in batches for i in batch]
    if gate is None:
        return {}
    requests = [call.requests[i] for i in numbers]
    keys = [one for batch in found for one in found_keys(gate, split, batch.rows, batch.hidden)]
    call.before.update(zip(numbers, [one.before for one in keys], strict=True))
    forms = [call.forms(one, one.paraphrases) for one in requests]
    excluded = [one.probes[len(one.paraphrases) :] for one in requests]
    scopes = scopes_of(gate, split, call.encoder, forms, excluded, [one.forms for one in keys])
    subjects = [_subject(call, *of_one) for of_one in zip(requests, forms, keys, strict=True)]
    queries = [next(iter(one.values())) for one in forms]
    scopes = with_contrasts(gate, split, call.encoder, scopes, queries, subjects, call.longest)
    return dict(zip(numbers, scopes, strict=True))


def _subject(call: Call, request: EditRequest, forms: Mapping[str, Query], keys: FoundKeys) -> str | None:
    """Return what a request is about: what it says, or what the scope takes for it."""
    table = None if call.gate is None else call.gate.table
    if keys.subject_odds is None or table is None:
        return None
    if (given := named_in(request.prompt, request.subject)) is not None:
        return given
    made = [*forms.values()][: len(keys.forms)]
    row = next((row for row, form in enumerate(made) if form.chat), 0)
    return subject_of(made[row], keys.subject_odds[row].tolist(), call.encoder, table)


def _find_in_batches(
    call: Call, numbers: Sequence[int], earlier: Sequence[Edit], delta: Edit | None
) -> tuple[list[list[int]], list[FoundUpdates]]:
    """
    Find the updates of some requests, in batches, each by itself, or all of them together where the method joins.

    Returns:
        `tuple[list[list[int]], list[FoundUpdates]]`: The numbers of each batch's requests, and what was found.
    """
    acting: list[str] = []
    preserved_keys: Mapping[str, torch.Tensor] = {}
    if delta is not None or call.context.method.joins:
        acting = acting_ids(call.active.edits)
    if call.context.method.joins and call.gate is None:
        preserved_keys = call.active.preserved_keys.of(acting, waiting=[edit.id for edit in earlier])
    base_delta = {} if delta is None or delta.id in acting else delta.updates
    options, alone = call.options, call.gate is not None  # with scopes, no token has two edits
    if call.gate is None and not call.context.method.joins and looks_at_all(call) and options.max_steps == 1:
        options = replace(options, check=False)  # what is made of a single step is seen then
    work = sum(call.lengths(numbers))  # long targets take longer
    estimate = Estimate("Editing", len(numbers), "edits", work=work)
    off = nullcontext() if call.gate is None else call.gate.suspended()
    with off, tqdm(total=len(numbers), desc="Editing", disable=call.budget.holds(call.lengths(numbers))) as bar:

        def search(batches: Sequence[Sequence[int]]) -> list[FoundUpdates]:
            made, sizes = 0, iter([sum(call.lengths(batch)) for batch in batches])
            worked = 0

            def progress(rows: int) -> None:
                nonlocal made, worked
                size = next(sizes, 0) if rows > 0 else -worked
                made, worked = made + rows, worked + size
                bar.update(rows)
                estimate.done(rows, size)

            encoded = [call.rows(batch).to(call.context.split.device) for batch in batches]
            size = 1 if alone else None
            try:
                with _undone_by_error(call.context.method):
                    return find_updates(call.context, encoded, options, size, preserved_keys, base_delta, progress)
            except torch.cuda.OutOfMemoryError:
                progress(-made)
                raise

        batches, found = _searched(call, numbers, search)
    if call.gate is None:
        call.kept = [(batch, one) for batch, one in zip(batches, found, strict=True)]
    return batches, found


def _searched(
    call: Call, numbers: Sequence[int], search: Callable[[Sequence[Sequence[int]]], list[FoundUpdates]]
) -> tuple[list[list[int]], list[FoundUpdates]]:
    """Search for the updates of some requests, with fewer in a pass where memory runs out."""
    batches: list[list[int]] = []
    found: list[FoundUpdates] = []
    if not call.context.method.joins or call.gate is not None:
        for group in call.in_as_many_forms(numbers):
            for batch, one in call.passes(group, lambda batch: search([batch])):
                batches.append(batch)
                found += one
        return batches, found
    while numbers and not found:
        requests = [call.requests[i] for i in numbers]
        batches = [[numbers[k] for k in places] for places in call.batches(requests)]
        tokens = max(sum(call.lengths(batch)) for batch in batches)
        for one in tried(call.budget, tokens, max(map(len, batches)) > 1, partial(search, batches)):
            found += one
    return batches, found


@contextmanager
def _undone_by_error(method: EditMethod) -> Iterator[None]:
    """Let a method that keeps statistics of its edits forget those of a search that ends in an error."""
    before = {name: value.clone() for name, value in method.state_dict().items()} if _observes(method) else {}
    try:
        yield
    except BaseException:
        if before:
            method.load_state_dict(before)
        raise


def _trace_missing_keys(call: Call, earlier: Sequence[Edit]) -> None:
    """
    Trace the inputs of acting edits that came from a file or a store, on the model as it is now, to preserve them as
    those of edits made here. An edit without a prompt has none.
    """
    context, keys = call.context, call.active.preserved_keys.by_edit
    acting = acting_ids(call.active.edits)
    edits = [edit for edit in earlier if edit.id in acting and edit.prompt and edit.id not in keys]
    requests = [EditRequest.of_edit(edit) for edit in edits]
    batches = call.batches(requests)
    for batch in tqdm(batches, desc="Inputs of earlier edits", disable=len(batches) <= 1):
        rows = call.encoder([requests[i].query for i in batch]).to(context.split.device)
        hidden = context.split.state_of(rows)
        factors, _ = context.trace(rows, hidden)
        look = BatchLook(context, rows, hidden, torch.arange(len(rows)))
        inputs = context.method.key_inputs(factors, look.places)
        for row, i in enumerate(batch):
            keys[edits[i].id] = _present(inputs, row)


def _present(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return a row's inputs at the tokens that have one, layer name -> `(tokens, d_in)`."""
    return {name: x[row][x[row].any(-1)] for name, x in inputs.items()}
