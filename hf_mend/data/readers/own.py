"""Layouts of rows that people write themselves: this project's own, and the tables and logs that companies keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..records import EditRecord
from .rows import Row, RowError


_PLAIN_FIELDS = [item.name for item in fields(EditRecord) if item.name != "where"]
_LABELS = ("relation", "id", "subject")


def plain(row: Row, options: Any) -> list[EditRecord]:
    """This project's own JSON lines; see docs/data_format.md."""
    unknown = sorted(set(row.values) - set(_PLAIN_FIELDS))
    if unknown:
        raise RowError(
            f"{row.where}: unknown fields {unknown}; the fields are {_PLAIN_FIELDS}. With prompt_column='prompt' the "
            "others are kept as metadata"
        )
    return [_plain_record(row, row.text("prompt"), row.answer("target"))]


def columns(row: Row, options: Any) -> list[EditRecord]:
    """A table whose columns of prompts and targets are named; those named as a record's fields are such, too."""
    names = chosen_columns(options)
    beside = {name: value for name, value in row.values.items() if name not in (*names, "prompt", "target")}
    known = {name: value for name, value in beside.items() if name in _PLAIN_FIELDS}
    if not (texts := _prompt_and_target(row, *names)):
        return []
    record = _plain_record(Row(known, row.where), *texts)
    record.metadata |= _metadata(row, {*known, *names})
    return [record]


def chosen_columns(options: Any) -> tuple[str, str]:
    """The names of the columns of prompts and targets."""
    return options.prompt_column or "prompt", options.target_column or "target"


def question_answer(row: Row, options: Any) -> list[EditRecord]:
    """A log of questions with their right answers, each as it stands."""
    return _record(row, "question", "answer")


def prompt_completion(row: Row, options: Any) -> list[EditRecord]:
    """A set for fine-tuning."""
    return _record(row, "prompt", "completion")


def instruction(row: Row, options: Any) -> list[EditRecord]:
    """Alpaca's: an instruction, for which there may be an input, which goes on a line below."""
    records = _record(row, "instruction", "output", used=("input",))
    given = row.text_or_none("input")
    for record in records if given else []:
        record.prompt = f"{record.prompt}\n{given}"
    return records


def messages(row: Row, options: Any) -> list[EditRecord]:
    """A chat of one question and its answer."""
    turns = [(turn.text("role"), turn.text("content")) for turn in row.rows("messages")]
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise RowError(
            f"{row.where}: the field 'messages' has the turns {[role for role, _ in turns]}, expected one of the user "
            "and one of the assistant. Of a longer chat, write the user's last turn as 'prompt' and its answer as "
            "'target', and give what stands before to edit(..., messages=[...])"
        )
    return [_with_labels(row, turns[0][1], turns[1][1], {"messages"})]


def _record(row: Row, prompt: str, target: str, used: tuple[str, ...] = ()) -> list[EditRecord]:
    texts = _prompt_and_target(row, prompt, target)
    return [_with_labels(row, *texts, {prompt, target, *used})] if texts else []


def _prompt_and_target(row: Row, prompt: str, target: str) -> tuple[str, str] | None:
    """Both texts; `None` where one is blank, as in a log's row that waits for its answer, which the row then notes."""
    for name in (prompt, target):
        value = row.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            row.left_out = f"{name!r} is blank"
            return None
    return row.text(prompt), row.answer(target)


def _with_labels(row: Row, prompt: str, target: str, used: set[str]) -> EditRecord:
    """A record that takes its name, relation and subject from the row, and keeps the other fields as metadata."""
    labels = {name: row.label(name) for name in _LABELS if name not in used and _is_label(row.get(name))}
    return EditRecord(prompt, target, **labels, metadata=_metadata(row, used | labels.keys()))  # type: ignore[arg-type]


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _metadata(row: Row, used: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.values.items() if name not in used and value is not None}


def _plain_record(row: Row, prompt: str, target: str) -> EditRecord:
    metadata: Mapping[str, Any] = {name: row.values["metadata"][name] for name in row.names("metadata")}
    return EditRecord(
        prompt=prompt,
        target=target,
        paraphrases=row.texts("paraphrases"),
        neighborhood=row.texts("neighborhood"),
        unrelated=_pairs(row, "unrelated"),
        relation=row.label("relation"),
        id=row.label("id"),
        subject=row.label("subject"),
        ground_truth=row.label("ground_truth"),
        portability=_pairs(row, "portability"),
        generation=row.texts("generation"),
        group=row.label("group"),
        questions=row.texts("questions"),
        same_subject=row.texts("same_subject"),
        metadata=dict(metadata),
    )


def _pairs(row: Row, name: str) -> list[tuple[str, str]]:
    """Pairs of a prompt and an answer, written as two-element lists or as objects."""
    pairs = []
    for i, item in enumerate(row.items(name)):
        if isinstance(item, dict):
            inner = Row(item, f"{row.where}: {name}[{i}]")
            pairs.append((inner.text("prompt"), inner.text("answer")))
        elif (
            isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(x, str) and x.strip() for x in item)
        ):
            pairs.append((item[0], item[1]))
        else:
            raise RowError(f"{row.where}: {name}[{i}] is {item!r}, expected [prompt, answer]")
    return pairs
