"""Reading a row's fields, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


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
        self.as_text: list[tuple[str, str]] = []  # fields whose number or boolean was read as text, and that text
        self.left_out: str | None = None  # why the row is no record

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

    def answer(self, path: str) -> str:
        """
        The text at a path, or the number or boolean there, as JSON writes it; the row notes that in `as_text`.

        Raises:
            RowError: It is missing, neither, or blank.
        """
        value = self.get(path)
        if not isinstance(value, (bool, int, float)):
            return self.text(path)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        self.as_text.append((path, text))
        return text

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
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return str(value) if number else self.text_or_none(path)

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
