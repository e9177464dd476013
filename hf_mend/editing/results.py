"""Edits and results from the updates that a search found."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone

from ..data.encoding import Encoder
from ..edits.edit import Edit, acting_ids
from ..edits.low_rank import Update
from ..methods import EditMethod
from .batch_state import FoundUpdates
from .requests import EditRequest, EditResult
from .scoring import Answers
from .summary import rows_updates


def as_edit(request: EditRequest, found: FoundUpdates, row: int) -> Edit | None:
    """Return the edit of a row, or `None` where no step was found."""
    if not found.steps[row]:
        return None
    return _new_edit(request, rows_updates(found.updates, found.used, row))


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
    request: EditRequest, edit: Edit | None, found: FoundUpdates, row: int, encoder: Encoder, seconds: float
) -> EditResult:
    """Return the result of a row of the updates found."""
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
        update_norms={name: norms[row] for name, norms in found.norms.items()} if edit else {},
    )
    if found.after is not None:
        result.set_after(found.after, row, encoder)
    return result


def unchanged_result(request: EditRequest, answers: Answers, row: int, encoder: Encoder, check: bool) -> EditResult:
    """Return the result of a request whose target the model says already, thanks to an earlier edit."""
    result = EditResult(None, request.prompt, request.target, "", None, 0.0, None, None, steps=0, seconds=0.0)
    result.set_before(answers, row, encoder)
    if check:
        result.set_after(answers, row, encoder)
    return result


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
