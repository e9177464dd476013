"""The edits of a file: which rows took, and what is kept of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.display import shown
from .common import Report, plural


if TYPE_CHECKING:
    from ..data.records import EditRecord
    from ..editing.edit_result import EditResult
    from ..model import EditableModel

# In the folder of the saved edits: the rows that are not among them, as `--facts` takes them again.
REST_NAME = "did_not_take.jsonl"

# Tokens of an answer, in plain text and in a chat together, that is no fact any more.
_LONG = 200

_TOOK, _SAID, _MISSED, _REFUSED = "took", "already said", "DID NOT TAKE", "REFUSED"


@dataclass
class Row:
    """A row of the file with its result, or the reason why it was not tried."""

    record: EditRecord
    result: EditResult | None = None
    refused: str = ""

    @property
    def state(self) -> str:
        """One of the four words of the table."""
        if self.result is None:
            return _REFUSED
        if not self.result.success:
            return _MISSED
        return _SAID if self.result.already_known else _TOOK

    @property
    def why(self) -> str:
        """Why the row did not take; empty where it did."""
        result = self.result
        if result is None:
            return self.refused
        if result.success:
            return ""
        if result.longer_word is not None:
            return f"says the longer word {shown(result.longer_word, 40)}"
        correct = result.token_success or []
        if not result.steps:
            return f"says {shown(result.before, 40)}, and no step led nearer to the target"
        return (
            f"says {shown(result.after or '', 40)}, {sum(correct)} of {plural(len(correct), 'token')} right after "
            f"{plural(result.steps, 'step')}"
        )

    def line(self, width: int) -> str:
        """The row's line of the table."""
        record, why = self.record, f"  ({self.why})" if self.why else ""
        return (
            f"{record.where:{width}}  {self.state:12}  {shown(record.prompt, 60)} -> {shown(record.target, 40)}{why}"
        )


def edit_records(model: EditableModel, records: Sequence[EditRecord], **options: Any) -> list[Row]:
    """
    Make the edits of all records that can be tried, in one call. Those that do not take are taken back.

    Args:
        model ([`EditableModel`]): The model.
        records (`Sequence[EditRecord]`): The records.
        options: As for [`~EditableModel.edit`].

    Raises:
        ValueError: None of the records can be tried; the message is the first one's.
    """
    rows = [Row(record, refused=_refusal(model, record, options.get("chat", False))) for record in records]
    tried = [row for row in rows if not row.refused]
    if not tried:
        raise ValueError(rows[0].refused)
    results: Any = model.edit([row.record for row in tried], **{"keep_failed": False, **options})
    for row, result in zip(tried, results, strict=True):
        row.result = result
    return rows


def _refusal(model: EditableModel, record: EditRecord, chat: bool) -> str:
    from ..editing.requests import as_requests, check_requests

    try:
        check_requests(as_requests(record, None, chat, (), ()), model.encoder, model.config)
    except ValueError as error:
        return str(error).removeprefix(f"{record.where} ").removeprefix(f"{record.where}: ")
    return ""


def report_of_file(rows: Sequence[Row], notes: Sequence[str]) -> Report:
    """
    Report each row and whether it took; probes are only counted, since neighbours may change without an error.

    Args:
        rows (`Sequence[Row]`): The rows.
        notes (`Sequence[str]`): What the file's reader has to say.
    """
    width = max(len(str(row.record.where)) for row in rows)
    lines = [row.line(width) for row in rows]
    counts = {state: sum(row.state == state for row in rows) for state in (_TOOK, _SAID, _MISSED, _REFUSED)}
    document: dict[str, Any] = {
        "edits": len(rows),
        "took": counts[_TOOK],
        "already_said": counts[_SAID],
        "did_not_take": counts[_MISSED],
        "refused": counts[_REFUSED],
        "notes": list(notes),
    }
    results = [row.result for row in rows if row.result is not None]
    for name, title in (("paraphrases", "paraphrases that say the target"), ("locality", "neighbours that stay")):
        probes = [probe for result in results for probe in getattr(result, name)]
        if probes:
            document[name] = sum(probe.ok for probe in probes) / len(probes)
            lines.append(f"{title}: {document[name]:.3f} of {len(probes)}")
    document["results"] = [_as_values(row) for row in rows]
    others = {"already said": _SAID, "did not take": _MISSED, "refused": _REFUSED}
    ends = [f"{counts[state]} {name}" for name, state in others.items() if counts[state]]
    missed = [row.result for row in rows if row.state == _MISSED and row.result is not None]
    advice = [_advice(missed)] if missed else []
    summary = ", ".join([f"{counts[_TOOK]} of {plural(len(rows), 'edit')} took", *ends])
    return Report(document, "\n".join([*lines, *notes, *advice, summary]), not counts[_MISSED] + counts[_REFUSED])


def _advice(missed: Sequence[EditResult]) -> str:
    """What may help rows that did not take."""
    longest = max(len(result.token_success or []) for result in missed)
    steps = max(40, 2 * max(result.steps for result in missed))
    shorter = ", and those of more than a hundred tokens in short" if longest > _LONG else ""
    return f"What did not take may with more steps (--max-steps {steps}) or with answers in other words{shorter}."


def _as_values(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"where": row.record.where, "state": row.state.lower(), "why": row.why or None}
    if row.result is None:
        return values | {"prompt": row.record.prompt, "target": row.record.target}
    result = row.result
    return values | {**asdict(result), "success": result.success, "already_known": result.already_known}


def save_what_took(model: EditableModel, rows: Sequence[Row], folder: Path) -> str:
    """
    Save the model's edits but those that did not take, which are taken back, and write the rest's rows beside them.

    Args:
        model ([`EditableModel`]): The model with the rows' edits.
        rows (`Sequence[Row]`): The rows.
        folder (`Path`): The folder.

    Returns:
        `str`: What was saved, for the report.
    """
    from ..data.readers import write_edits

    for row in rows:
        if row.state == _MISSED and row.result is not None and row.result.id is not None:
            model.undo(row.result.id)
    model.save_edits(folder)
    rest = [row for row in rows if row.state in (_MISSED, _REFUSED)]
    # What an earlier file left there stays, until it is asked for again.
    asked = {row.record.prompt for row in rows}
    left = [record for record in _rest_of(folder) if record.prompt not in asked]
    text = f"{sum(row.state == _TOOK for row in rows)} of {plural(len(rows), 'edit')} saved in {folder}"
    made = {row.result.id for row in rows if row.result is not None}
    earlier = sum(edit.id not in made and not edit.is_base_delta for edit in model.edits)
    if earlier:
        text += f", beside {earlier} made earlier"
    if left:
        text += f"; {len(left)} of earlier files are still in {folder / REST_NAME}"
    if rest:
        notes = [{**row.record.metadata, "where": row.record.where, "why": row.why} for row in rest]
        kept = (replace(row.record, metadata=note) for row, note in zip(rest, notes, strict=True))
        write_edits(folder / REST_NAME, [*left, *kept])
        return f"{text}; the {len(rest)} that did not take are in {folder / REST_NAME}"
    if left:
        write_edits(folder / REST_NAME, left)
    else:
        (folder / REST_NAME).unlink(missing_ok=True)
    return text


def _rest_of(folder: Path) -> list[EditRecord]:
    from ..data.readers import read_edits

    file = folder / REST_NAME
    return list(read_edits(file)) if file.is_file() and file.stat().st_size else []
