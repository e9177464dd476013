"""The edits that are measured: made in calls, kept in a store from which an interrupted run goes on, or each alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..bases.fingerprint import check_same_base, editor_id, fingerprint_of
from ..data.encoding import batches
from ..data.records import EditRecord
from ..edits.edit import Edit, stacked, without_scopes
from ..edits.hook import applied
from ..edits.low_rank import Update
from ..edits.store import EditStore
from ..model import EditableModel


# What a record's edit is made of: the edit, behind the base delta that it requires, if any. Nothing where the model
# said the target already.
Made = list[Edit]


def make_in_calls(
    model: EditableModel,
    records: Sequence[EditRecord],
    edits_per_call: int,
    store: str | Path | None = None,
    checked: int | None = None,
) -> list[Made]:
    """
    Make the edits of records by a model with a scope, whose edits do not depend on one another.

    Args:
        model ([`EditableModel`]): The model, whose own edits are as they were afterwards.
        records (`Sequence[EditRecord]`): The records.
        edits_per_call (`int`): Edits of a call.
        store (`str` or `Path`, *optional*): A store of edits ([`~hf_mend.EditableModel.open_store`]): those that it
            has are not made again, and those that are made go into it.
        checked (`int`, *optional*): How many of the records have edits that are checked; all by default.

    Raises:
        ValueError: The store holds edits of another editor or base model.
    """
    kept = None if store is None else _opened(model, store)
    before = [] if kept is None else list(kept.edits)
    own = editor_id(model.editor, model.editor_config.method)
    if {edit.metadata.get("editor") for edit in before} - {own}:
        raise ValueError(f"{store}: it holds edits of another editor than this one, {own}; give another store")
    known = {_asked(edit) for edit in before}
    checked = len(records) if checked is None else checked
    # They are nobody's when this ends, however often it is interrupted.
    with model.carrying(before):
        for part, check in ((records[:checked], True), (records[checked:], False)):
            missing = list({_wanted(record): record for record in part if _wanted(record) not in known}.values())
            for call in tqdm(
                [*batches(missing, edits_per_call)], desc="Edits", disable=len(missing) <= edits_per_call
            ):
                for one in _apart(call):
                    model.edit([bare(record) for record in one], check=check, keep_failed=True, check_earlier=0)
                    if kept is not None:
                        kept.follow(before, before := list(model.edits))
        made = {_asked(edit): edit for edit in model.edits}
    return [[made[_wanted(record)]] if _wanted(record) in made else [] for record in records]


def _opened(model: EditableModel, path: str | Path) -> EditStore:
    def check(fingerprint: Any) -> None:
        check_same_base(model.base_model, fingerprint, str(path))

    store = EditStore(path, fingerprint_of(model.base_model, model.targets), check)
    check(store.base_fingerprint)
    return store


def make_alone(model: EditableModel, records: Sequence[EditRecord]) -> list[Made]:
    """Make each record's edit on the model without others."""
    made: list[Made] = []
    for record in records:
        with model.edited(bare(record)):
            made.append([*model.edits])
    return made


def joined(made: Sequence[Made], scope: bool = True) -> list[Edit]:
    """
    Return the edits of some records as a model may carry them, each base delta once.

    Args:
        made (`Sequence[Made]`): The edits of each record.
        scope (`bool`, defaults to `True`): Whether they keep their scopes.
    """
    found = [*{edit.id: edit for edits in made for edit in edits}.values()]
    return found if scope else without_scopes(found)


def _apart(records: Sequence[EditRecord]) -> list[list[EditRecord]]:
    """Return the records of a call in as many as it takes for each prompt to have one target."""
    calls: list[dict[str, EditRecord]] = []
    for record in records:
        prompt = " ".join(record.prompt.split())
        call = next((call for call in calls if prompt not in call), None)
        if call is None:
            calls.append(call := {})
        call[prompt] = record
    return [list(call.values()) for call in calls]


def bare(record: EditRecord) -> EditRecord:
    """Return a record without the probes that an edit of it would check."""
    return replace(record, paraphrases=[], neighborhood=[])


def _wanted(record: EditRecord) -> tuple[str, str]:
    return " ".join(record.prompt.split()), record.target.strip()


def _asked(edit: Edit) -> tuple[str, str]:
    return " ".join(edit.prompt.split()), edit.target.strip()


@contextmanager
def each_row_under(model: EditableModel, rows: Sequence[Sequence[Edit]]) -> Iterator[None]:
    """
    Let each row of a batch be under its own edits within the context, which act at all its tokens.

    Args:
        model ([`EditableModel`]): The model.
        rows (`Sequence[Sequence[Edit]]`): The edits of each row.
    """
    with applied(model.targets, _side_by_side([stacked(edits) for edits in rows])):
        yield


def _side_by_side(rows: Sequence[dict[str, Update]]) -> dict[str, Update]:
    """Return the rows' updates as one a layer, `(rows, rank, width)`, the ranks filled up with zeros."""
    found = {}
    for name in {name for updates in rows for name in updates}:
        pairs = [updates.get(name) for updates in rows]
        some = next(pair for pair in pairs if pair is not None)
        rank = max(len(pair[0]) for pair in pairs if pair is not None)
        sides = [torch.zeros(len(rows), rank, some[side].shape[1], device=some[side].device) for side in (0, 1)]
        for row, pair in enumerate(pairs):
            for side, matrix in zip(sides, pair or (), strict=False):
                side[row, : len(matrix)] = matrix
        found[name] = (sides[0], sides[1])
    return found
