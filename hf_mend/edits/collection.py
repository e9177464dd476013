"""The sequence of a model's edits that users see: to index, search and export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, overload

from ..data.display import html_table, shown
from ..hub.atomic import replaced_file
from .edit import Edit, active_edits, each_base_delta_once


_SHOWN_IN_NOTEBOOKS = 50


class Edits(Sequence[Edit]):
    """
    The edits of a model, oldest first; the value of [`EditableModel.edits`]. It does not change with the model.

    Args:
        edits (`Sequence[Edit]`): The edits.
    """

    def __init__(self, edits: Sequence[Edit] = ()):
        self._edits = list(edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Edit]: ...
    def __getitem__(self, index: int | slice) -> Edit | list[Edit]:
        return self._edits[index]

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (Edits, list, tuple)) else NotImplemented

    def __repr__(self) -> str:
        return f"Edits({len(self)}, {len(self.active)} of them active)"

    def _repr_html_(self) -> str:
        acting = {id(edit) for edit in self.active}
        shown_edits = self._edits[-_SHOWN_IN_NOTEBOOKS:]
        rows = [
            (edit.id, shown(edit.prompt), shown(edit.target), "yes" if id(edit) in acting else "no")
            for edit in shown_edits
        ]
        last = f", the last {len(rows)}" if len(rows) < len(self) else ""
        return html_table(f"{self!r}{last}", rows, ("id", "prompt", "target", "active"))

    @property
    def ids(self) -> list[str]:
        """The edits' ids."""
        return [edit.id for edit in self]

    @property
    def active(self) -> list[Edit]:
        """
        The edits that act: neither disabled, nor superseded by a later edit of the same prompt, nor part of a
        compressed one.
        """
        return active_edits(self._edits)

    def find(
        self,
        text: str | None = None,
        *,
        target: str | None = None,
        active: bool | None = None,
        since: date | str | None = None,
        until: date | str | None = None,
    ) -> list[Edit]:
        """
        Return the edits that meet all of these conditions, oldest first.

        Args:
            text (`str`, *optional*): The prompt contains it, in capitals or not.
            target (`str`, *optional*): The target contains it, in capitals or not.
            active (`bool`, *optional*): Whether the edit acts.
            since, until (`datetime`, `date` or `str`, *optional*): The edit was made at this time or later, or before
                it; a string is in ISO 8601, such as `"2026-05-01"`, times without a zone are UTC, and a date is its
                first moment. Edits without a time are left out.

        Raises:
            ValueError: A string is not a time.
        """
        acting = {id(edit) for edit in self.active}
        first, end = _time(since), _time(until)

        def fits(edit: Edit) -> bool:
            made = _time_of(edit)
            return (
                (text is None or text.casefold() in edit.prompt.casefold())
                and (target is None or target.casefold() in edit.target.casefold())
                and (active is None or active == (id(edit) in acting))
                and (first is None or (made is not None and made >= first))
                and (end is None or (made is not None and made < end))
            )

        return [edit for edit in self if fits(edit)]

    def describe(self) -> list[dict[str, Any]]:
        """
        Describe each edit in plain JSON values: `id`, `prompt`, `target`, `time`, `editor`, `chat`, `enabled`,
        `active`, `superseded_by` and `part_of` (the id of the edit in whose favour it does not act, or `None`),
        `rank`, and `norms`, the Frobenius norm of each layer's update.
        """
        enabled = [edit for edit in self if edit.enabled]
        last = {edit.prompt_key: edit.id for edit in enabled}
        part_of = {one: edit.id for edit in enabled for one in edit.replaces}
        acting = {id(edit) for edit in self.active}
        rows = []
        for edit in self:
            later = last.get(edit.prompt_key) if edit.enabled and edit.prompt_key else None
            rows.append(
                {
                    "id": edit.id,
                    "prompt": edit.prompt,
                    "target": edit.target,
                    "time": edit.metadata.get("time"),
                    "editor": edit.metadata.get("editor"),
                    "chat": edit.metadata.get("chat") == "true",
                    "enabled": edit.enabled,
                    "active": id(edit) in acting,
                    "superseded_by": None if later == edit.id else later,
                    "part_of": part_of.get(edit.id),
                    "rank": edit.rank,
                    "norms": edit.norms(),
                }
            )
        return rows

    def to_jsonl(self, path: str | Path) -> None:
        """
        Write the output of [`describe`] as JSON lines, one an edit, whole or not at all.

        Args:
            path (`str` or `Path`): The file.
        """
        with replaced_file(path) as work:
            work.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.describe()), encoding="utf-8"
            )


def with_enabled(edits: Sequence[Edit], ids: Sequence[str], enabled: bool) -> list[Edit]:
    """
    Return the edits with some enabled or disabled. Those that change are copies, with the same matrices.

    Raises:
        KeyError: An id is not among the edits.
        ValueError: An edit is part of a compressed one, which would not change with it.
    """
    chosen = set(ids)
    check_known(edits, ids)
    check_apart(edits, chosen)
    changed = [edit.id in chosen and edit.enabled != enabled for edit in edits]
    return [replace(edit, enabled=enabled) if new else edit for edit, new in zip(edits, changed, strict=True)]


def chosen(edits: Sequence[Edit], wanted: Sequence[Edit | str]) -> list[Edit]:
    """
    Return the wanted edits; those that are named by their ids come with the base deltas that they require.

    Args:
        edits (`Sequence[Edit]`): The edits that ids name.
        wanted (`Sequence[Edit | str]`): Edits, or ids.

    Raises:
        KeyError: An id is not among the edits.
        TypeError: The wanted are one text, which is no list of ids.
    """
    if isinstance(wanted, str):
        raise TypeError(f"edits is {wanted!r}, expected a list of edits or of their ids, such as [{wanted!r}]")
    ids = {one for one in wanted if isinstance(one, str)}
    check_known(edits, sorted(ids))
    named = [edit for edit in edits if edit.id in ids]
    required = {edit.requires for edit in named}
    deltas = [edit for edit in each_base_delta_once(edits) if edit.is_base_delta and edit.id in required - ids]
    return [*deltas, *named, *(one for one in wanted if not isinstance(one, str))]


def check_known(edits: Sequence[Edit], ids: Sequence[str]) -> None:
    """
    Raises:
        KeyError: An id is not among the edits.
    """
    known = {edit.id: None for edit in edits}
    for one in ids:
        if one not in known:
            listed = [*known] if len(known) <= 20 else [*[*known][:10], "...", *[*known][-10:]]
            raise KeyError(f"no edit has the id {one!r}; the model's edits are {listed}")


def check_apart(edits: Sequence[Edit], ids: set[str]) -> None:
    """
    Raises:
        ValueError: One of the ids is that of an edit that is part of a compressed one, or that others require, which
            are not among the ids.
    """
    for whole in edits:
        if whole.requires in ids and whole.id not in ids:
            raise ValueError(
                f"the edit {whole.id!r} acts with the change {whole.requires!r}, which stays with it; undo that edit, "
                "or disable it"
            )
        parts = ids.intersection(whole.replaces) if whole.id not in ids else ()
        for part in sorted(parts):
            raise ValueError(
                f"the edit {part!r} is part of the compressed edit {whole.id!r}, which would not change with it; undo "
                "that one first, which brings its parts back"
            )


def _time(value: date | str | None) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{value!r} is not a time; write it like 2026-05-01 or 2026-05-01T12:30:00") from error
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def _time_of(edit: Edit) -> datetime | None:
    try:
        return _time(edit.metadata.get("time"))
    except ValueError:
        return None
