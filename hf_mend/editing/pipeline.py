"""A request's way to an edit: encode, trace, transform, apply, check."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch
from tqdm.auto import tqdm

from ..bases.fingerprint import editor_id
from ..bases.gradients import trace
from ..bases.split import SplitModel, logits_of
from ..bases.targets import Target
from ..data.encoding import Encoder, Query, length_batches
from ..edits.active import EditStack
from ..edits.edit import Edit, acting_ids
from ..edits.low_rank import Update
from ..methods import EditMethod
from .calibration_text import observe_calibration_text
from .joint import FoundUpdates, ask
from .requests import Answers, EditRequest, EditResult
from .search import _joint_finder, find_updates
from .searching import BatchLook


# Most tokens in one pass of edits, padding included: what bounds the memory of long requests.
_BATCH_TOKENS = 4096


def make_edits(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    stack: EditStack,
    requests: Sequence[EditRequest],
    max_steps: int = 3,
    batch_size: int = 16,
    force: bool = False,
    check: bool = True,
) -> list[EditResult]:
    """
    Makes the edits of one call and adds them to the stack. All see what the model carried before the call; what the
    results tell of after is of the model with all of them.

    An edit of a prompt that has one is found on the model without it, and takes its place. Requests for the same are
    made once.

    Raises:
        ValueError: A gradient or an update is not finite, or the model carries edits of another editor that changes
            the base itself; the stack is as it was.
    """
    made_by = editor_id(method, method.config.method)
    support = _support(method, made_by, stack)
    if not method.trains and not method.is_calibrated:
        with stack.disabled():
            observe_calibration_text(split, targets, method, encoder)
    earlier = stack.edits
    probed = {i: _answers(split, encoder, r.probes) for i, r in enumerate(requests) if r.probes}
    first_of: dict[tuple[str, bool], int] = {}
    for i, request in enumerate(requests):
        first_of.setdefault(request.asked, i)
    made_once = list(first_of.values())
    standing = {edit.asked: edit for edit in stack.active}
    again = [i for i in made_once if requests[i].asked in standing]
    now: dict[int, tuple[Answers, int]] = {}  # what the model says where an edit stands
    for chosen in _batches(requests, again, encoder, batch_size):
        asked = _answers(split, encoder, [requests[i].query for i in chosen])
        now.update({i: (asked, row) for row, i in enumerate(chosen)})
    known = {i for i, (asked, row) in now.items() if all(asked.right[row]) and not force}
    results = {i: _known_result(requests[i], *now[i], encoder, check) for i in known}
    edits: dict[int, Edit] = {}
    chunks = _batches(requests, [i for i in made_once if i not in known], encoder, batch_size)
    gone = {requests[i].asked for i in again if i not in known}
    try:
        stack.replace([edit for edit in earlier if edit.asked not in gone])
        acting = acting_ids(stack.edits)
        if method.joins:
            _trace_unknown(
                split, targets, method, encoder, [edit for edit in earlier if edit.id in acting], batch_size
            )
        kept = method.inputs_of(acting, waiting=[edit.id for edit in earlier])
        carried = {} if support is None or support.id in acting else support.updates
        started = time.perf_counter()
        found = _find_in_batches(
            split, targets, method, encoder, [[requests[i] for i in chosen] for chosen in chunks], max_steps, force,
            check, kept, carried,
        )  # fmt: skip
        seconds = (time.perf_counter() - started) / len(requests)
        for chosen, of_rows in zip(chunks, found, strict=True):
            for row, i in enumerate(chosen):
                results[i], edit = _as_result(requests[i], of_rows, row, encoder, seconds)
                if i in now:
                    edit = _in_place_of(standing[requests[i].asked], edit, results[i], of_rows, row)
                    results[i].set_before(*now[i], encoder)
                if edit is not None:
                    edits[i] = edit
                    if of_rows.inputs:
                        method.remember(edit.id, {name: x[row][x[row].any(-1)] for name, x in of_rows.inputs.items()})
        for edit in edits.values():
            edit.metadata["editor"] = made_by
            edit.needs = support.id if support is not None and edit.updates else None
        supports = [support] if support is not None and any(edit.needs for edit in edits.values()) else []
        stack.replace([*earlier, *supports, *(edits[i] for i in sorted(edits))])
        # Each was found without the others, unless they were joined: what does the model say with all of them?
        if check and (now or (len(requests) > 1 and not method.joins)):
            for chosen in _batches(requests, made_once, encoder, batch_size):
                asked = _answers(split, encoder, [requests[i].query for i in chosen])
                for row, i in enumerate(chosen):
                    results[i].set_after(asked, row, encoder)
        in_order = [replace(results[first_of[request.asked]], prompt=request.prompt) for request in requests]
        for i, before in probed.items():
            in_order[i].set_probes(requests[i], before, _answers(split, encoder, requests[i].probes), encoder)
    except BaseException:
        stack.replace(earlier)
        raise
    return in_order


def _trace_unknown(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    edits: Sequence[Edit],
    batch_size: int,
) -> None:
    """
    Has the method know the inputs of edits that came from a file or a store, to spare them as those that it made: as
    the model is now. An edit without a prompt has none.
    """
    edits = [edit for edit in edits if edit.prompt and edit.id not in method.known_inputs]
    if not edits:
        return
    requests = [_as_request(edit) for edit in edits]
    chunks = _batches(requests, range(len(requests)), encoder, batch_size)
    for chosen in tqdm(chunks, desc="Inputs of earlier edits", disable=len(chunks) == 1):
        rows = encoder([requests[i].query for i in chosen]).to(split.device)
        state = split.run_below(rows.inputs)
        factors, _ = trace(split, targets, rows.inputs, rows.next_tokens, state)
        look = BatchLook(split, targets, rows, state, torch.arange(len(rows)))
        for name, x in method.asked_at(factors, look.places).items():
            for row, i in enumerate(chosen):
                known = method.known_inputs.setdefault(edits[i].id, {})
                known[name] = x[row][x[row].any(-1)]


def _as_request(edit: Edit) -> EditRequest:
    chat = edit.metadata.get("chat") == "true"
    return EditRequest(edit.prompt, edit.target, chat, subject=edit.metadata.get("subject"))


def _support(method: EditMethod, made_by: str, stack: EditStack) -> Edit | None:
    """What the method's edits need beside them: the stack's own, if it is there."""
    carried = method.carried()
    if not carried:
        return None
    acting = acting_ids(stack.edits)
    for edit in stack.edits:
        if edit.support and edit.id != made_by and edit.id in acting:
            raise ValueError(
                f"the model carries edits that act with the change {edit.id!r}, and this editor's is {made_by!r}: "
                "with both it is a model that neither has learned to edit; undo those edits, or load the editor that "
                "made them"
            )
    known = [edit for edit in stack.edits if edit.support and edit.id == made_by]
    if known:
        return known[0]
    updates = {name: (u.detach().clone(), v.detach().clone()) for name, (u, v) in carried.items()}
    metadata = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "editor": made_by}
    return Edit(made_by, "", "", updates, metadata, support=True)


def _batches(
    requests: Sequence[EditRequest], indices: Sequence[int], encoder: Encoder, batch_size: int
) -> list[list[int]]:
    """Some of the requests, by index, in batches of like lengths."""
    lengths = [sum(map(len, encoder.tokens(requests[i].query))) for i in indices]
    return [[indices[k] for k in chosen] for chosen in length_batches(lengths, batch_size, _BATCH_TOKENS)]


def _find_in_batches(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    batches: Sequence[Sequence[EditRequest]],
    max_steps: int,
    force: bool,
    check: bool,
    kept: dict[str, torch.Tensor],
    carried: dict[str, Update],
) -> list[FoundUpdates]:
    """The updates of all requests, a batch of them at a time, or for one another where the method joins them."""
    if not batches:
        return []
    encoded = [encoder([request.query for request in batch]).to(split.device) for batch in batches]
    with tqdm(total=sum(map(len, batches)), desc="Editing", disable=len(batches) == 1) as bar:
        if method.joins:
            return _joint_finder(method)(
                split, targets, method, encoded, max_steps, force, check, kept=kept, progress=bar.update
            )
        found = []
        for rows in encoded:
            found.append(find_updates(split, targets, method, rows, max_steps, force, check, carried=carried))
            bar.update(len(rows))
        return found


def _as_result(
    request: EditRequest, found: FoundUpdates, row: int, encoder: Encoder, seconds: float
) -> tuple[EditResult, Edit | None]:
    updates = {name: (u[row], v[row]) for name, (u, v) in found.updates.items()}
    edit = _as_edit(request, updates) if found.steps[row] else None
    result = EditResult(
        id=edit.id if edit else None,
        prompt=request.prompt,
        target=request.target,
        before=encoder.decode(found.before.tokens[row]),
        after=None,
        probability_before=math.exp(found.before.log_probability[row]),
        probability_after=None,
        token_success=None,
        steps=found.steps[row],
        seconds=seconds,
        rank=edit.rank if edit else 0,
        update_norms=edit.norms() if edit else {},
    )
    if found.after is not None:
        result.set_after(found.after, row, encoder)
    return result, edit


def _known_result(request: EditRequest, said: Answers, row: int, encoder: Encoder, check: bool) -> EditResult:
    """Of a request whose target the model says already, thanks to an earlier edit."""
    result = EditResult(None, request.prompt, request.target, "", None, 0.0, None, None, steps=0, seconds=0.0)
    result.set_before(said, row, encoder)
    if check:
        result.set_after(said, row, encoder)
    return result


def _in_place_of(old: Edit, new: Edit | None, result: EditResult, found: FoundUpdates, row: int) -> Edit | None:
    """
    What takes an earlier edit's place; an edit without updates where its absence is enough. Nothing where no step was
    found: the earlier one stays then.
    """
    if new is None and all(found.before.right[row]):
        chat = old.metadata.get("chat") == "true"
        new = _as_edit(EditRequest(result.prompt, result.target, chat), {})
    if new is not None:
        result.id, result.superseded = new.id, old.id
    return new


def _as_edit(request: EditRequest, updates: dict[str, Update]) -> Edit:
    kept = {}
    for name, (u, v) in updates.items():
        used = (v != 0).any(-1) & (u != 0).any(-1)
        kept[name] = (u[used].contiguous(), v[used].contiguous())
    metadata = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "chat": str(request.chat).lower()}
    if request.subject:
        metadata["subject"] = request.subject
    return Edit(uuid.uuid4().hex[:12], request.prompt, request.target, kept, metadata)


@torch.no_grad()
def _answers(split: SplitModel, encoder: Encoder, queries: Sequence[Query]) -> Answers:
    """What the model says to each query, under the edits it carries."""
    rows = encoder(queries).to(split.device)
    return ask(rows, logits_of(split, rows, split.run_below(rows.inputs)))
