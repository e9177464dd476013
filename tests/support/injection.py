"""Exceptions put in at any line of a call, as an interrupt or a lack of memory raises them."""

from __future__ import annotations

import ast
import contextlib
import dis
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import hf_mend


class InjectedError(BaseException):
    """Stands for a `KeyboardInterrupt` or `MemoryError`; no handler expects it."""


_LIBRARY = str(Path(hf_mend.__file__).parent)
# What the library calls to enter and leave contexts, and to hook modules.
_BESIDE = {contextlib.__file__, sys.modules[torch.nn.Module.__module__].__file__, torch.utils.hooks.__file__}


def _is_traced(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    if name in _BESIDE:
        return "contextlib" in name or "hook" in frame.f_code.co_name or frame.f_code.co_name == "remove"
    return name.startswith(_LIBRARY)


@cache
def _lines_of_with(file: str) -> frozenset[int]:
    """Return the lines of a source file in which `with` names its contexts."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            found.update(range(node.lineno, node.items[-1].context_expr.end_lineno + 1))
    return frozenset(found)


@cache
def _first_offsets(code: CodeType) -> dict[int, int]:
    return {line: offset for offset, line in reversed([*dis.findlinestarts(code)])}


def _is_between(frame: FrameType) -> bool:
    """
    Whether tracing tells of a line where no interrupt comes: of a `with` once more at its end, before `__exit__` is
    called, or of a bare `try:`. What is raised there passes by `__exit__`, and a lock would be held for ever. Python
    looks for signals behind calls, and at the beginning of functions and of a loop's next round.
    """
    line, code = frame.f_lineno, frame.f_code
    if dis.opname[code.co_code[frame.f_lasti]] == "NOP":
        return True
    return line in _lines_of_with(code.co_filename) and frame.f_lasti != _first_offsets(code)[line]


def _traced(call: Callable[[], object], at_line: Callable[[FrameType], None]) -> object:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not _is_traced(frame):
            return None
        if event == "line" and not _is_between(frame):
            at_line(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], object]) -> list[tuple[str, int]]:
    """Return the lines that a call runs, in their order: file and number."""
    lines: list[tuple[str, int]] = []
    _traced(call, lambda frame: lines.append((frame.f_code.co_filename, frame.f_lineno)))
    return lines


def interrupted(
    call: Callable[[], object], number: int, error: type[BaseException] = InjectedError, times: int = 1
) -> str | None:
    """
    Run a call until its line of a number, where an exception is raised, and return that line, if there is one. With
    `times`, further exceptions are raised at the next lines that run, those that handle the one before.
    """
    count, where = 0, None

    def at_line(frame: FrameType) -> None:
        nonlocal count, where
        count += 1
        if number <= count < number + times:
            where = where or f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            raise error

    with contextlib.suppress(error):
        _traced(call, at_line)
    return where


def some_of(lines: list[tuple[str, int]], most: int, seed: int = 0) -> list[int]:
    """Return numbers of a call's lines: each line of the source once, at a time of its own, but at most so many."""
    times: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(lines, start=1):
        times.setdefault(line, []).append(number)
    choose = random.Random(seed)
    chosen = [choose.choice(numbers) for numbers in times.values()]
    return sorted(choose.sample(chosen, min(most, len(chosen))))
