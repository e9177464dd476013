"""Edits and results from the updates that a search found."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone

from ..data.encoding import Encoder
from ..edits.edit import Edit, acting_ids
from ..edits.low_rank import Update
from ..methods import EditMethod
from .batch_state import FoundUpdates
from .edit_result import EditResult
from .requests import EditRequest
from .scoring import Answers
from .summary import rows_updates


def as_edit(request: EditRequest, found: FoundUpdates, row: int) -> Edit | None:
    """Return the edit of a row, or `None` where no step was found."""
    if not found.steps[row]:
        return None
    kept = found.kept[row] if found.kept else None
    edit = _new_edit(request, {} if kept else rows_updates(found.updates, found.used, row))
    if kept:
        edit.updates = kept
    return edit


def absence_edit(request: EditRequest, found: FoundUpdates, row: int) -> Edit | None:
    """Return an edit without updates, which supersedes an earlier one where its absence is enough, or `None`."""
    if not all(found.before.correct[row]):
        return None
    return _new_edit(replace(request, subject=None), {})


def _new_edit(request: EditRequest, updates: dict[str, Update]) -> Edit:
    metadata = {"time": _now(), **request.metadata}
    return Edit(uuid.uuid4().hex[:12], request.prompt, request.target, updates, metadata)


def base_delta_edit(method: EditMethod, made_by: str, edits: Sequence[Edit]) -> Edit | None:
    """
    Return the method's base delta as an edit, or `None` without one. An equal one among the model's edits is reused.

    Raises:
        ValueError: The model carries edits that act with another editor's change.
    """
    base_delta = method.base_delta()
    if not base_delta:
        return None
    acting = acting_ids(edits)
    for edit in edits:
        if edit.is_base_delta and edit.id != made_by and edit.id in acting:
            raise ValueError(
                f"the model carries edits that act with the change {edit.id!r}, and this editor's is {made_by!r}: "
                "with both it is a model that neither has learned to edit; undo those edits, or load the editor that "
                "made them"
            )
    for edit in edits:
        if edit.is_base_delta and edit.id == made_by:
            return edit
    updates = {name: (u.detach().clone(), v.detach().clone()) for name, (u, v) in base_delta.items()}
    return Edit(made_by, "", "", updates, {"time": _now(), "editor": made_by}, is_base_delta=True)


def as_result(
    request: EditRequest, edit: Edit | None, found: FoundUpdates, row: int, encoder: Encoder, length: int
) -> EditResult:
    """Return the result of a row of the updates found, for a target of so many tokens."""
    result = EditResult(
        id=edit.id if edit else None,
        prompt=request.prompt,
        target=request.target,
        before="",
        after=None,
        probability_before=0.0,
        probability_after=None,
        token_success=None,
        steps=found.steps[row],
        seconds=0.0,
        rank=edit.rank if edit else 0,
        nbytes=edit.nbytes if edit else 0,
        update_norms={name: norms[row] for name, norms in found.norms.items()} if edit else {},
    )
    result.set_before(found.before, row, encoder, length)
    if found.after is not None:
        result.set_after(found.after, row, encoder, length)
    return result


def unchanged_result(
    request: EditRequest, answers: Answers, row: int, encoder: Encoder, length: int, check: bool
) -> EditResult:
    """Return the result of a request whose target the model says already, thanks to an earlier edit."""
    result = EditResult(None, request.prompt, request.target, "", None, 0.0, None, None, steps=0, seconds=0.0)
    result.set_before(answers, row, encoder, length)
    if check:
        result.set_after(answers, row, encoder, length)
    return result


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
