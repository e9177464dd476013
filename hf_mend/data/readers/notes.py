"""What a reader has to say of a file: its layout, and what it left out, changed, or kept besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..records import EditRecord
from .rows import Row, RowError
from .sources import Rows


if TYPE_CHECKING:
    from .formats import Format


class Notes:
    """
    Gathers, row by row, what is worth saying. A row that is read again is not counted again.

    Args:
        rows (`Sequence`): The file's rows.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self._seen = 0
        self._metadata: dict[str, None] = {}
        self._left_out: list[str] = []
        self._as_text: list[str] = []
        self.superseded: list[str] = []

    def add(self, number: int, row: Row, records: Sequence[EditRecord]) -> None:
        """Take up what a row's reading noted."""
        if number < self._seen:
            return
        self._seen = number + 1
        for record in records:
            self._metadata.update(dict.fromkeys(record.metadata))
        place = self.rows.place(number)
        if row.left_out:
            self._left_out.append(f"{place}: {row.left_out}")
        self._as_text += [f"{place}: {text}" for _, text in row.as_text]

    @property
    def why_none(self) -> str:
        """For an error: why the first row that was left out is no record."""
        return f"; {self._left_out[0]}" if self._left_out else ""

    def texts(self, count: int, chosen: Format) -> list[str]:
        """
        The notes, the first of which tells the layout.

        Args:
            count (`int`): How many records there are.
            chosen ([`Format`]): The layout.
        """
        besides = f"; kept as metadata: {', '.join(self._metadata)}" if self._metadata else ""
        notes = [f"{count} edits in the layout {chosen.name} ({chosen.source}){besides}"]
        for what, places in (
            ("left out", self._left_out),
            ("a number or a boolean as target, read as text", self._as_text),
            ("an earlier answer to the same question, left out", self.superseded),
        ):
            if places:
                shown = "; ".join(places[:5]) + ("; ..." if len(places) > 5 else "")
                notes.append(f"{len(places)} of {len(self.rows)} rows: {what} ({shown})")
        return notes


def later_wins(
    said: dict[str, list[tuple[int, EditRecord]]],
    records: Sequence[EditRecord],
    begin: int,
    on_conflict: str,
    notes: Notes,
) -> set[int]:
    """
    Which earlier records have the prompt of one of these and another target.

    Args:
        said (`dict[str, list[tuple[int, EditRecord]]]`): Prompt -> the numbers of the records with it so far, and the
            records; brought up to date.
        records (`Sequence[EditRecord]`): A row's records.
        begin (`int`): The number of the first of them.
        on_conflict (`str`): `"last"` or `"error"`.
        notes ([`Notes`]): Take up what is superseded.

    Raises:
        RowError: `on_conflict` is `"error"`, and there is such a record.
    """
    earlier = set()
    for number, record in enumerate(records, begin):
        same = said.setdefault(" ".join(record.prompt.split()), [])
        others = [(i, one) for i, one in same if one.target.split() != record.target.split()]
        if others and on_conflict == "error":
            first = others[0][1]
            raise RowError(
                f"{notes.rows.path}: {first.where} and {record.where} have two answers to {record.prompt[:60]!r}, "
                f"{first.target[:60]!r} and {record.target[:60]!r}; leave one of them out, or let the last one win"
            )
        earlier |= {i for i, _ in others}
        notes.superseded += [f"{one.where}, by {record.where}" for _, one in others]
        same[:] = [pair for pair in same if pair not in others]
        same.append((number, record))
    return earlier
