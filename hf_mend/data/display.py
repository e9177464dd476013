"""Texts in messages and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def shown(text: str, longest: int = 80) -> str:
    """
    A text in quotes, its middle left out where it is long.

    Args:
        text (`str`): The text.
        longest (`int`, defaults to 80): The most characters to show.

    Example:

    ```python
    shown("The guarantee covers material and manufacturing faults", 20)  # "'The guarantee...faults'"
    ```
    """
    if len(text) <= longest:
        return repr(text)
    end = longest // 3
    return repr(f"{text[: longest - end - 3]}...{text[-end:]}")


def html_table(title: str, rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """
    A table for a notebook. What it holds is escaped.

    Args:
        title (`str`): The line above it.
        rows (`Iterable[Sequence[Any]]`): The cells of its rows.
        head (`Sequence[str]`): The titles of its columns.
    """

    def line(cells: Sequence[Any], tag: str) -> str:
        found = (f'<{tag} style="text-align:left">{escape(str(cell))}</{tag}>' for cell in cells)
        return f"<tr>{''.join(found)}</tr>"

    lines = [*([line(head, "th")] if head else []), *(line(row, "td") for row in rows)]
    return f"<b>{escape(title)}</b><table>{''.join(lines)}</table>"
