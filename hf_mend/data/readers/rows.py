"""Rows of a data file that may be larger than memory, and reading a row's fields with errors that name them."""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


# A JSON string as a whole (brackets inside it mean nothing), or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class RowError(ValueError):
    """A row of a data set that cannot be read; the message names source, row and field."""


class Row:
    """
    One row, and where it stands.

    Args:
        values (`dict`): The row's fields.
        where (`str`): Source and number, for messages.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise RowError(f"{where} holds a {type(values).__name__}, expected an object with named fields")
        self.values = values
        self.where = where

    def get(self, path: str, default: Any = None) -> Any:
        """
        The field at a path of names joined by dots, or `default` where one is missing or null.

        Raises:
            RowError: What should hold the next name of the path is no object.
        """
        value: Any = self.values
        names = path.split(".")
        for depth, name in enumerate(names):
            if depth and value and not isinstance(value, dict):
                outer = ".".join(names[:depth])
                raise RowError(
                    f"{self.where}: the field {outer!r} holds a {type(value).__name__}, expected an object with named "
                    "fields"
                )
            value = value.get(name) if isinstance(value, dict) else None
            if value is None:
                return default
        return value

    def text(self, path: str, blank: bool = False) -> str:
        """
        The text at a path.

        Raises:
            RowError: It is missing, no text, or blank.
        """
        value = self.get(path)
        if value is None:
            raise RowError(f"{self.where}: the field {path!r} is missing")
        if not isinstance(value, str):
            raise RowError(f"{self.where}: the field {path!r} holds a {type(value).__name__}, expected text")
        if not value.strip() and not blank:
            raise RowError(f"{self.where}: the field {path!r} is blank ({value!r})")
        return value

    def text_or_none(self, path: str) -> str | None:
        """
        The text at a path, or `None` where it is missing or blank.

        Raises:
            RowError: It is no text.
        """
        value = self.get(path)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self.text(path)

    def label(self, path: str) -> str | None:
        """
        The text at a path, or the number there as text; `None` where it is missing or blank.

        Raises:
            RowError: It is neither.
        """
        value = self.get(path)
        return str(value) if type(value) in (int, float) else self.text_or_none(path)

    def first_text(self, path: str) -> str:
        """
        The text at a path, or the first one in the list, or list of lists, that is there.

        Raises:
            RowError: There is no text.
        """
        found = next(iter(_texts(self.get(path))), None)
        if found is None:
            raise RowError(f"{self.where}: the field {path!r} holds no text")
        return found

    def texts(self, path: str) -> list[str]:
        """
        All texts of the list at a path; none where it is missing.

        Raises:
            RowError: It is not a list of texts.
        """
        value = self.get(path, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise RowError(f"{self.where}: the field {path!r} holds {str(value)[:60]!r}, expected a list of texts")
        return [item for item in value if item.strip()]

    def items(self, path: str) -> Sequence[Any]:
        """
        The list at a path, whatever it holds; an empty one where it is missing.

        Raises:
            RowError: It is not a list.
        """
        value = self.get(path, [])
        if not isinstance(value, (list, tuple)):
            raise RowError(f"{self.where}: the field {path!r} holds a {type(value).__name__}, expected a list")
        return value

    def names(self, path: str) -> list[str]:
        """
        The names of the fields of the object at a path; none where it is missing.

        Raises:
            RowError: It is not an object.
        """
        value = self.get(path) or {}
        if not isinstance(value, dict):
            raise RowError(f"{self.where}: the field {path!r} holds a {type(value).__name__}, expected an object")
        return list(value)

    def rows(self, path: str) -> list[Row]:
        """
        The list of objects at a path; none where it is missing.

        Raises:
            RowError: It is not a list of objects.
        """
        return [Row(item, f"{self.where}: {path}[{i}]") for i, item in enumerate(self.items(path))]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


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
        if self.path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; expected a JSON list or JSON lines")
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.unit = "record"
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        first = re.search(rb"\S", self._bytes)
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
            return json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.where(index)} is not valid JSON: {error}") from error

    def where(self, index: int) -> str:
        """Source and number of a row, for messages: records of a list count from 0, lines from 1."""
        if self.unit == "record":
            return f"{self.path}, record {index}"
        return f"{self.path}, line {self._lines[index]}"

    def _find_lines(self) -> None:
        self.unit = "line"
        position = number = 0
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
                json.loads(self._bytes[:])
            except ValueError as error:
                raise ValueError(f"{self.path} is not valid JSON: {error}") from error
            self.unit = "record"
            self._starts, self._ends = array("Q", [0]), array("Q", [len(self._bytes)])

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
                raise ValueError(f"{self.where(i)} follows {between[:60]!r}, expected a list of objects")
            before = self._ends[i]
        rest = self._bytes[before : end - 1].strip()
        if rest:
            raise ValueError(f"{self.path} holds {rest[:60]!r} in its list, expected a list of objects")


class TableRows(Sequence[Any]):
    """
    The rows of a `datasets.Dataset`: memory-mapped Arrow, of which a row is read when it is asked for.

    Args:
        table (`datasets.Dataset`): The rows.
        source (`str`): What to call them in messages.
    """

    def __init__(self, table: Any, source: str):
        self.table = table
        self.source = source

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table[index]

    def where(self, index: int) -> str:
        """Source and number of a row, for messages."""
        return f"{self.source}, row {index}"


def open_rows(
    path: str | Path, split: str | None = None, name: str | None = None, revision: str | None = None
) -> JsonRows | TableRows:
    """
    The rows of a file, or of a data set on the Hub.

    Args:
        path (`str` or `Path`): JSON list, JSON lines, Parquet, CSV or Arrow; or a Hub id.
        split, name, revision: As `datasets.load_dataset` takes them, for a Hub id.

    Raises:
        FileNotFoundError: There is no such file, and it is no Hub id.
        ImportError: The package `datasets` is needed and not there.
        ValueError: The file cannot be read, or the Hub has no such data set.
    """
    file = Path(path).expanduser()
    kind = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}.get(file.suffix)
    if file.is_file() and kind is None:
        return JsonRows(file)
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
