"""Reading a data set: recognise its layout, check every row, keep it in memory or on disk."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..checks import check_query
from ..display import shown
from ..encoding import Encoder, Query
from ..records import EditDataset, EditRecord
from .formats import FORMATS, Format, FormatOptions, named_columns, recognised
from .notes import Notes, later_wins
from .rows import Row, RowError
from .sources import Rows, open_rows


logger = logging.get_logger(__name__)


class EditsOnDisk(Dataset[EditRecord]):
    """
    Records that stay in their file: each is read when it is asked for.

    Args:
        rows (`Sequence`): The rows.
        convert (`Callable`): Row number -> its records.
        index (`tuple[Sequence[int], Sequence[int]]`): For each record its row, and its number among that row's
            records.
        notes (`Sequence[str]`): What their reader has to say: the layout, and what it left out or changed.
    """

    def __init__(
        self, rows: Rows, convert: Any, index: tuple[Sequence[int], Sequence[int]], notes: Sequence[str] = ()
    ):
        self.rows = rows
        self.notes = list(notes)
        self._convert = convert
        self._row, self._part = index

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> EditRecord:
        record: EditRecord = self._convert(self._row[index])[self._part[index]]
        return record

    def __iter__(self) -> Iterator[EditRecord]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class _Conversion:
    """From a row's number to its records; the fields are arguments of [`read_edits`] and what it found."""

    rows: Rows
    chosen: Format
    fixed: bool
    settings: FormatOptions
    encoder: Encoder | None
    questions: Sequence[tuple[str, str]]
    seed: int
    notes: Notes

    def __call__(self, number: int) -> list[EditRecord]:
        place = self.rows.place(number)
        row = Row(self.rows[number], f"{self.rows.path}, {place}")
        _check_layout(row, self.chosen, self.fixed)
        records = self.chosen.convert(row, self.settings)
        self.notes.add(number, row, records)
        for part, record in enumerate(records):
            record = replace(record, id=str(number) if record.id is None else record.id, where=place)
            if self.questions and not record.unrelated:
                draw = random.Random(f"{self.seed}/{number}/{part}")
                record = replace(record, unrelated=[draw.choice(self.questions)])
            if self.encoder is not None and not self.encoder.tokens(Query(record.prompt, record.target))[1]:
                raise RowError(f"{row.where}: the target {record.target!r} tokenises to nothing")
            records[part] = record
        return records


def read_edits(  # its ten parameters are public
    path: str | Path,
    format: str | None = None,
    *,
    questions: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    keep_in_memory: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    on_conflict: str = "keep",
    **options: Any,
) -> EditDataset | EditsOnDisk:
    """
    Reads a data set of edits in any of the field's layouts, which its first row tells; a log message and the result's
    `notes` say which, and what was left out or changed.

    The layouts: `counterfact` (MultiCounterFact too), `zsre` (MEND's JSON), `zsre_kilt` and `fever_kilt`
    (KnowledgeEditor's and MEND's JSON lines), `fever`, `wikitext` (MEND's generation task), `mquake`, `knowedit`,
    `wikibigedit`, `nq_open`, and `plain`, which is easily written by hand (docs/data_format.md); and rows of one's own
    with `question` and `answer`, `prompt` and `completion`, `instruction` and `output`, `messages`, or any columns.

    Args:
        path (`str` or `Path`): A JSON list, JSON lines, CSV or Parquet; or the id of a data set on the Hub. These last
            two need the package `datasets`.
        format (`str`, *optional*): The layout, if it should not be recognised.
        questions (`Sequence[tuple[str, str]]`): Unrelated questions and answers; each record without its own gets one.
        seed (`int`, defaults to 0): Seed of that draw.
        keep_in_memory (`bool`, defaults to `True`): `False` checks all rows once and reads each again when it is used:
            for sets larger than memory.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Targets of which it makes no token are an error.
        split, name, revision: Which part of a data set on the Hub, as in `datasets.load_dataset`.
        on_conflict (`str`, defaults to `"keep"`): What becomes of two rows with one prompt and different targets: all
            are kept, the `"last"` wins, or they are an `"error"`.
        options: See [`~hf_mend.data.readers.formats.FormatOptions`]; among them `prompt_column` and `target_column`,
            which name the columns of a table of one's own.

    Returns:
        [`EditDataset`] or [`EditsOnDisk`].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, has no row, or mixes layouts; or a row lacks a field, or holds another
            kind of value there. The message names file, row and field.
    """
    if on_conflict not in ("keep", "last", "error"):
        raise ValueError(f"on_conflict is {on_conflict!r}, expected 'keep', 'last' or 'error'")
    rows = open_rows(path, split, name, revision)
    if not len(rows):
        raise ValueError(f"{path} holds no record")
    settings = FormatOptions(tokenizer=tokenizer, **options)
    chosen = _format(rows, format, settings)
    encoder = None if tokenizer is None else Encoder(tokenizer)
    notes = Notes(rows)
    convert = _Conversion(rows, chosen, format is not None, settings, encoder, questions, seed, notes)
    kept: list[EditRecord] = []
    index = (array("Q"), array("Q"))
    said: dict[str, list[tuple[int, EditRecord]]] = {}
    superseded: set[int] = set()
    for number in tqdm(range(len(rows)), desc=f"Reading {path}", disable=len(rows) < 20000):
        records = convert(number)
        if on_conflict != "keep":
            superseded |= later_wins(said, records, len(index[0]), on_conflict, notes)
        index[0].extend([number] * len(records))
        index[1].extend(range(len(records)))
        if keep_in_memory:
            kept += records
    if superseded:
        kept = [record for i, record in enumerate(kept) if i not in superseded]
        for part in index:
            part[:] = array("Q", [n for i, n in enumerate(part) if i not in superseded])
    if not len(index[0]):
        raise ValueError(f"{path} holds no record that is an edit ({chosen.name}: {chosen.source}){notes.why_none}")
    texts = notes.texts(len(index[0]), chosen)
    logger.info(f"{path}: {texts[0]}")
    for text in texts[1:]:
        logger.warning(f"{path}: {text}")
    return EditDataset(kept, texts) if keep_in_memory else EditsOnDisk(rows, convert, index, texts)


def _format(rows: Rows, name: str | None, options: FormatOptions) -> Format:
    names = list(dict.fromkeys(candidate.name for candidate in FORMATS))
    first = Row(rows[0], f"{rows.path}, {rows.place(0)}")
    if options.prompt_column or options.target_column:
        if name is not None:
            raise ValueError(f"format is {name!r} and the columns are named; give one of the two")
        chosen = named_columns(options)
        for column in chosen.marks:
            if column not in first.values:
                raise RowError(f"{first.where} has no column {column!r}; its columns are {sorted(first.values)}")
        return chosen
    found = recognised(first)
    if name is None:
        if found is None:
            raise RowError(
                f"{first.where} has the fields {sorted(first.values)}, which are no known layout's; name those of "
                "prompt and target (prompt_column=..., target_column=..., on the command line --prompt-column, "
                f"--target-column). The layouts are {names}, and docs/data_format.md has them"
            )
        return found
    if name not in names:
        raise ValueError(f"format is {name!r}, expected one of {names}")
    if found is not None and found.name == name:
        return found
    return next(candidate for candidate in FORMATS if candidate.name == name)


def _check_layout(row: Row, chosen: Format, fixed: bool) -> None:
    missing = [mark for mark in chosen.marks if mark not in row.values]
    if not missing:
        return
    other = recognised(row)
    if other is not None and other.name == chosen.name:
        return  # KnowEdit's two namings
    mixed = "" if other is None or fixed else f"; it looks like {other.name}, and one file holds one layout"
    raise RowError(f"{row.where}: the field {missing[0]!r} of the layout {chosen.name} is missing{mixed}")


def read_counterfact(path: str | Path, questions: Sequence[tuple[str, str]] = (), seed: int = 0) -> EditDataset:
    """
    Reads a JSON list in CounterFact's layout (Meng et al. 2022, "Locating and Editing Factual Associations in GPT").

    Args:
        path (`str` or `Path`): The file.
        questions (`Sequence[tuple[str, str]]`): Unrelated questions and answers; each record gets one at random.
        seed (`int`, defaults to 0): Seed of that draw.

    Raises:
        ValueError: The file is not such a list; the message names file, row and field.
    """
    data = read_edits(path, "counterfact")
    draw = random.Random(seed)
    return EditDataset(
        replace(record, unrelated=[draw.choice(questions)]) if questions else record
        for record in (data[i] for i in range(len(data)))
    )


def read_questions(path: str | Path) -> list[tuple[str, str]]:
    """
    Reads questions and answers in NQ-open's layout (Lee et al. 2019): `question`, and `answer`, a list of which the
    first is taken.

    Raises:
        ValueError: A row is not such an object; the message names file, row and field.
    """
    return [(record.prompt, record.target) for record in read_edits(path, "nq_open")]


def write_edits(path: str | Path, records: Iterable[EditRecord]) -> None:
    """
    Writes records as this project's own JSON lines, which [`read_edits`] reads again; fields at their default are left
    out.

    Args:
        path (`str` or `Path`): The file.
        records (`Iterable[EditRecord]`): The records.
    """
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            values = {name: value for name, value in asdict(record).items() if value not in (None, [], {})}
            values.pop("where", None)
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def check_targets(records: Sequence[EditRecord], encoder: Encoder, longest: int | None = None) -> None:
    """
    Args:
        records (`Sequence[EditRecord]`): The records.
        encoder ([`Encoder`]): Tokenises.
        longest (`int`, *optional*): Most tokens that the model takes.

    Raises:
        ValueError: There is no record, or a prompt or target is blank, tokenises to nothing, or is too long; the
            message names it.
    """
    if not len(records):
        raise ValueError("the data set is empty; there is nothing to edit")
    for number, record in enumerate(records):
        if not isinstance(record, EditRecord):
            raise TypeError(
                f"item {number} of the data is {shown(str(record))}, of type {type(record).__name__}; expected an "
                "EditRecord: read files with read_edits, or make EditRecord(prompt=..., target=...)"
            )
        check_query(Query(record.prompt, record.target), encoder, longest, record.name(number))
