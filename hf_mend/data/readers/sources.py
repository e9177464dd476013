"""Files and data sets of rows, which may be larger than memory: JSON, CSV, and tables."""

from __future__ import annotations

import csv
import io
import json
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


# A JSON string as a whole (brackets inside it mean nothing), or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


class WrittenNumber(float):
    """A number that keeps how its file writes it, such as 1.50."""

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def _as_utf8(path: Path, expected: str) -> tuple[Any, int]:
    """
    A file's bytes in UTF-8, mapped and not read where they are that already, and where they begin behind a byte order
    mark.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; expected {expected}")
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    first = content[:4]
    wide = "utf-16" if first[:2] in (b"\xff\xfe", b"\xfe\xff") else None
    if wide is None and len(first) > 1 and 0 in first[:2]:
        wide = "utf-16-le" if first[1] == 0 else "utf-16-be"
    if wide is None:
        return content, len(_BOM) if first.startswith(_BOM) else 0
    try:
        return content[:].decode(wide).encode(), 0
    except UnicodeError as error:
        raise ValueError(f"{path} is neither UTF-8 nor UTF-16 ({error}); save it as UTF-8") from error


class JsonRows(Sequence[Any]):
    """
    The rows of a JSON list or of JSON lines, or a single JSON object, each parsed when it is asked for. Only where
    they begin and end is kept, some bytes a row; the file is mapped, not read.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        ValueError: The file is empty, or neither of the three.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._bytes, self._begin = _as_utf8(self.path, "a JSON list or JSON lines")
        self.unit = "record"
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        first = re.compile(rb"\S").search(self._bytes, self._begin)
        if first is None:
            raise ValueError(f"{path} is empty; expected a JSON list or JSON lines")
        if first.group() == b"[":
            self._find_elements()
        elif first.group() == b"{":
            self._find_lines()
        else:
            raise ValueError(f"{path} is not valid JSON: it begins with {self._bytes[:20]!r}, expected '[' or '{{'")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        text = self._bytes[self._starts[index] : self._ends[index]]
        try:
            return json.loads(text, parse_float=WrittenNumber)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}, {self.place(index)} is not valid JSON: {error}") from error

    def place(self, index: int) -> str:
        """The number of a row, for messages: records of a list count from 0, lines from 1."""
        return f"record {index}" if self.unit == "record" else f"line {self._lines[index]}"

    def _find_lines(self) -> None:
        self.unit = "line"
        position, number = self._begin, 0
        while position < len(self._bytes):
            end = self._bytes.find(b"\n", position)
            end = len(self._bytes) if end < 0 else end
            number += 1
            if self._bytes[position:end].strip():
                self._starts.append(position)
                self._ends.append(end)
                self._lines.append(number)
            position = end + 1
        try:
            json.loads(self._bytes[self._starts[0] : self._ends[0]])
        except ValueError:
            # Not lines: one object over several lines, or nothing that JSON knows.
            try:
                json.loads(self._bytes[self._begin :])
            except ValueError as error:
                raise ValueError(f"{self.path} is not valid JSON: {error}") from error
            self.unit = "record"
            self._starts, self._ends = array("Q", [self._begin]), array("Q", [len(self._bytes)])

    def _find_elements(self) -> None:
        depth = start = end = 0
        for match in _TOKEN.finditer(self._bytes):
            kind = match.group()[:1]
            if kind in b"[{":
                depth += 1
                if depth == 2:
                    start = match.start()
            elif kind in b"]}":
                depth -= 1
                if depth == 1:
                    self._starts.append(start)
                    self._ends.append(match.end())
                elif depth == 0:
                    end = match.end()
                    break
        if not end or self._bytes[end:].strip():
            raise ValueError(f"{self.path} is not valid JSON: its list does not end with the file (is it cut off?)")
        before = self._bytes.find(b"[") + 1
        for i in range(len(self)):
            between = self._bytes[before : self._starts[i]].strip()
            if between != (b"," if i else b""):
                raise ValueError(f"{self.path}, {self.place(i)} follows {between[:60]!r}, expected a list of objects")
            before = self._ends[i]
        rest = self._bytes[before : end - 1].strip()
        if rest:
            raise ValueError(f"{self.path} holds {rest[:60]!r} in its list, expected a list of objects")


class CsvRows(Sequence[Any]):
    """
    The rows of a CSV file under its header, each cell the text that it is. Commas, semicolons, tabs or vertical bars
    separate the cells, whichever the header has most of. Only where rows begin and end is kept; the file is mapped.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        ValueError: The file is empty, is no text, or has a row that does not fit its header.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._bytes, position = _as_utf8(self.path, "a header and rows")
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        end = self._bytes.find(b"\n", position)
        first = self._bytes[position : len(self._bytes) if end < 0 else end].decode(errors="replace")
        named = re.fullmatch(r'"?sep=(.)"?\s*', first)  # a line by which spreadsheets name the separator
        self._separator = named[1] if named else max(",;\t|", key=lambda one: len(_cells([first], one)))
        self._next, self._line = position, 0
        rows = self._indexed_rows()
        if named:
            next(rows, None)
        self.columns = [name.strip() for name in next(rows, (0, 0, [""]))[2]]
        twice = next((name for name in self.columns if name and self.columns.count(name) > 1), None)
        if twice is not None or not any(self.columns):
            what = f"names the column {twice!r} twice" if twice else "names no column"
            raise ValueError(f"{self.path}: the header {what}; expected a name for each")
        for start, line, cells in rows:
            if any(cell.strip() for cell in cells[len(self.columns) :]):
                raise ValueError(
                    f"{self.path}, line {line} has {len(cells)} cells and the header {len(self.columns)}; a cell that "
                    f"holds {self._separator!r} stands in double quotes"
                )
            if any(cell.strip() for cell in cells):
                self._starts.append(start)
                self._ends.append(self._next)
                self._lines.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        text = self._bytes[self._starts[index] : self._ends[index]].decode()
        # A line break within a cell is one, whichever system wrote it.
        cells = [re.sub("\r+\n?", "\n", cell) for cell in _cells(io.StringIO(text, newline=""), self._separator)]
        return {name: cell if cell.strip() else None for name, cell in zip(self.columns, cells, strict=False) if name}

    def place(self, index: int) -> str:
        """The line on which a row begins, for messages."""
        return f"line {self._lines[index]}"

    def _indexed_rows(self) -> Iterator[tuple[int, int, list[str]]]:
        """Where each row begins, on which line, and its cells."""
        reader = csv.reader(self._texts(), delimiter=self._separator, strict=True)
        while True:
            start, line = self._next, self._line + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{self.path}, line {line} is not valid CSV: {error}") from error
            if cells is None:
                return
            yield start, line, cells

    def _texts(self) -> Iterator[str]:
        while self._next < len(self._bytes):
            end = self._bytes.find(b"\n", self._next) + 1
            raw = self._bytes[self._next : end or len(self._bytes)]
            self._next, self._line = end or len(self._bytes), self._line + 1
            try:
                text: str = raw.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}, line {self._line} is not UTF-8 ({error}); save the file as UTF-8"
                ) from error
            yield text


def _cells(lines: Any, separator: str) -> list[str]:
    return next(csv.reader(lines, delimiter=separator), [])


class TableRows(Sequence[Any]):
    """
    The rows of a `datasets.Dataset`: memory-mapped Arrow, of which a row is read when it is asked for.

    Args:
        table (`datasets.Dataset`): The rows.
        source (`str`): What to call them in messages.
    """

    def __init__(self, table: Any, source: str):
        self.table = table
        self.path = source

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table[index]

    def place(self, index: int) -> str:
        """The number of a row, for messages."""
        return f"row {index}"


Rows = JsonRows | CsvRows | TableRows


def open_rows(
    path: str | Path, split: str | None = None, name: str | None = None, revision: str | None = None
) -> Rows:
    """
    The rows of a file, or of a data set on the Hub.

    Args:
        path (`str` or `Path`): JSON list, JSON lines, CSV, Parquet or Arrow; or a Hub id.
        split, name, revision: As `datasets.load_dataset` takes them, for a Hub id.

    Raises:
        TypeError: It is neither.
        FileNotFoundError: There is no such file, and it is no Hub id.
        ImportError: The package `datasets` is needed and not there.
        ValueError: The file cannot be read, or the Hub has no such data set.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(
            f"path is a {type(path).__name__}, expected a file or a data set's id; records that are in memory need no "
            "reader: EditRecord(prompt=..., target=...)"
        )
    file = Path(path).expanduser()
    kind = {".parquet": "parquet", ".arrow": "arrow"}.get(file.suffix.lower())
    if file.is_file() and kind is None:
        return CsvRows(file) if file.suffix.lower() in (".csv", ".tsv") else JsonRows(file)
    if file.is_dir():
        raise ValueError(f"{path} is a folder; name the file in it that holds the rows")
    if not file.exists() and (str(path).count("/") != 1 or file.suffix or str(path).startswith((".", "/", "~"))):
        raise FileNotFoundError(f"there is no file {path}, and it is no id of a data set on the Hub (owner/name)")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package datasets: pip install 'hf_mend[data]'") from error
    try:
        if kind is not None:
            table = datasets.load_dataset(kind, data_files=str(file), split="train")
        else:
            table = datasets.load_dataset(str(path), name, split=split or "train", revision=revision)
    except Exception as error:
        raise ValueError(f"{path} could not be loaded with datasets: {type(error).__name__}: {error}") from error
    return TableRows(table, str(path))
