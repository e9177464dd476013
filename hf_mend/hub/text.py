"""Texts that came from a stranger's file, made fit to be shown."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """Return a text that a terminal can show: control characters, other than the end of a line, as their escapes."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def on_one_line(value: Any, length: int = 300) -> str:
    """Return a value's text as one line of visible characters, cut at `length`."""
    text = " ".join(printable(str(value)).split())
    return text if len(text) <= length else f"{text[:length]}..."
