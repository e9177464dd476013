"""
Regular expressions for layers' names, matched without a compiler: a stranger's file may hold any, and compilers take
all memory for some, such as `(?:(?:a{1000}){1000}){1000}`, and matchers years for others, such as `(a+)+$`.

What PEFT's users write is regular in the strict sense: characters, `.`, `\\d`, sets, groups, `|`, `*`, `+`, `?` and
`{m,n}`. That is parsed here into a machine of states whose number is bounded, and run with all its states at once, so
that the time grows with the length of a name alone. References, lookbehinds and flags are refused.
"""

from __future__ import annotations

import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ..hub.files import shortened


MATCHING_SECONDS = 2.0
_MOST_STATES = 5_000
_DEEPEST = 40
_MOST_KEPT = 500_000  # states in the steps that are remembered
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}
_ENDS = {"^": "start", "$": "end", "A": "start", "Z": "end", "b": "edge"}


def expression(pattern: str, field: str = "target_modules", until: float | None = None) -> Callable[[str], bool]:
    """
    Return a function that tells whether a whole name matches a regular expression, as `re.fullmatch` does.

    Args:
        pattern (`str`): The expression.
        field (`str`, defaults to `"target_modules"`): What it is, for messages.
        until (`float`, *optional*): The value of `time.monotonic` at which matching ends, for all names together; two
            seconds from now by default.

    Raises:
        ValueError: It is not of the kind that is matched; or, when it is called, the time is over.
    """
    deadline = time.monotonic() + MATCHING_SECONDS if until is None else until
    try:
        ahead, node = _Parser(pattern).whole()
        machine = _Machine(node)
        conditions = [(wanted, _Machine(inner)) for wanted, inner in ahead]
    except _Refused as error:
        raise ValueError(
            f"{field}={shortened(pattern)} is not a regular expression of the kind that is matched ({error}): "
            "characters, . \\d [a-z] ( ) | * + ? and {m,n}. Names in full or in part go in a list"
        ) from error

    end = _tail(node)[0]

    def matches(name: str) -> bool:
        if not name.endswith(end):  # most names, in no time
            return False
        try:
            return machine.accepts(name, deadline) and all(
                one.accepts(name, deadline, prefix=True) == wanted for wanted, one in conditions
            )
        except TimeoutError as error:
            raise ValueError(
                f"{field}={shortened(pattern)} takes longer than {MATCHING_SECONDS} seconds to match; list "
                "the layers' names instead"
            ) from error

    return matches


def is_literal(pattern: str) -> str | None:
    """Return the only name that an expression matches, if it consists of characters alone."""
    plain, escaped = [], False
    for char in pattern:
        if escaped and char in string.ascii_letters + string.digits or not escaped and char in "^$.|?*+()[]{}":
            return None
        escaped = not escaped and char == "\\"
        if not escaped:
            plain.append(char)
    return None if escaped else "".join(plain)


class _Refused(ValueError):
    """The expression is not one that is matched."""


@dataclass(frozen=True)
class _Chars:
    """A set of characters: those in it, in its ranges, or of its classes; or all others."""

    single: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, str], ...] = ()
    classes: tuple[tuple[str, bool], ...] = ()
    negated: bool = False

    def __contains__(self, char: str) -> bool:
        found = (
            char in self.single
            or any(first <= char <= last for first, last in self.ranges)
            or any(_CLASSES[kind](char) == wanted for kind, wanted in self.classes)
        )
        return found != self.negated


@dataclass(frozen=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _Either:
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    item: _Node
    least: int
    most: int | None


@dataclass(frozen=True)
class _At:
    where: str


_Node = _Chars | _Sequence | _Either | _Repeat | _At


@lru_cache(maxsize=1000)
def _one(char: str) -> _Chars:
    return _Chars(frozenset(char))


class _Parser:
    """Reads an expression; the syntax and its corner cases are those of `re`."""

    def __init__(self, pattern: str):
        self.text, self.place, self.depth = pattern, 0, 0

    def whole(self) -> tuple[list[tuple[bool, _Node]], _Node]:
        """Return the lookaheads at the beginning, each with whether it is wanted, and the expression."""
        ahead = []
        if self.text.startswith("^(?"):  # says nothing: the whole name is to match
            self.place += 1
        while self.text.startswith(("(?=", "(?!"), self.place):
            wanted = self.text[self.place + 2] == "="
            self.place += 3
            ahead.append((wanted, self.either()))
            self.expect(")")
        node = self.either()
        if self.place < len(self.text):
            raise _Refused("a ) without its (")
        if ahead and isinstance(node, _Either):
            raise _Refused("a lookahead before one of several alternatives")
        return ahead, node

    def peek(self) -> str:
        return self.text[self.place : self.place + 1]

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise _Refused("it ends too early")
        self.place += 1
        return char

    def expect(self, char: str) -> None:
        if self.peek() != char:
            raise _Refused(f"a {char} is missing")
        self.place += 1

    def either(self) -> _Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _Refused(f"groups more than {_DEEPEST} deep")
        items = [self.sequence()]
        while self.peek() == "|":
            self.place += 1
            items.append(self.sequence())
        self.depth -= 1
        return items[0] if len(items) == 1 else _Either(tuple(items))

    def sequence(self) -> _Node:
        items: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            items.append(self.repeated(self.atom()))
        return items[0] if len(items) == 1 else _Sequence(tuple(items))

    def repeated(self, item: _Node) -> _Node:
        bounds = self.bounds()
        if bounds is None:
            return item
        if isinstance(item, _At):
            raise _Refused("nothing to repeat")
        if self.peek() == "?":  # fewest first: the same names match
            self.place += 1
        if self.peek() == "+" or self.bounds() is not None:
            raise _Refused("one repetition of another")
        return _Repeat(item, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        char = self.peek()
        if char and char in "*+?":
            self.place += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        end = self.text.find("}", self.place)
        if char != "{" or end < 0:
            return None
        low, comma, high = self.text[self.place + 1 : end].partition(",")
        if not (low or comma) or not all(one == "" or (one.isascii() and one.isdecimal()) for one in (low, high)):
            return None  # characters, as in re
        if max(len(low), len(high)) > 6:
            raise _Refused(f"more than {_MOST_STATES} parts")
        self.place = end + 1
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if most is not None and most < least:
            raise _Refused("a repetition whose most is below its least")
        return least, most

    def atom(self) -> _Node:
        char = self.peek()
        if char == "{" and self.bounds() is not None or char in "*+?":
            raise _Refused("nothing to repeat")
        self.place += 1
        if char == "(":
            return self.group()
        if char == "[":
            return self.chars()
        if char == "\\":
            return self.escaped()
        if char == ".":
            return _Chars(frozenset("\n"), negated=True)
        return _At(_ENDS[char]) if char in "^$" else _one(char)

    def group(self) -> _Node:
        if self.peek() == "?":
            if not self.text.startswith("?:", self.place):
                raise _Refused(f"the group ({self.text[self.place : self.place + 3]}")
            self.place += 2
        node = self.either()
        self.expect(")")
        # A group of one assertion can be repeated, and an assertion cannot; one of alternatives stands for them all.
        return _Sequence((node,)) if isinstance(node, (_At, _Either)) else node

    def escaped(self) -> _Chars | _At:
        char = self.take()
        if char.lower() in _CLASSES:
            return _Chars(classes=((char.lower(), char.islower()),))
        if char in "AZb":
            return _At(_ENDS[char])
        if char.isascii() and char.isalnum():
            raise _Refused(f"\\{char}")
        return _one(char)

    def chars(self) -> _Chars:
        negated = self.peek() == "^"
        self.place += negated
        single: set[str] = set()
        ranges: list[tuple[str, str]] = []
        classes: list[tuple[str, bool]] = []
        start = self.place
        while self.peek() != "]" or self.place == start:
            first = self.member()
            if self.peek() != "-" or self.text[self.place + 1 : self.place + 2] in ("]", ""):
                single |= first.single
                classes += first.classes
                continue
            self.place += 1
            last = self.member()
            bounds = [*first.single, *last.single]
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise _Refused("a range of characters without a first and a last one")
            ranges.append((bounds[0], bounds[1]))
        self.place += 1
        return _Chars(frozenset(single), tuple(ranges), tuple(classes), negated)

    def member(self) -> _Chars:
        char = self.take()
        found = self.escaped() if char == "\\" else _one(char)
        if isinstance(found, _At):
            raise _Refused("an assertion in a set")
        return found


class _Machine:
    """The states of an expression, and the steps between them."""

    def __init__(self, node: _Node):
        # A state reads a character of a set and leads on, or leads on at once where its assertion holds.
        self.states: list[tuple[_Chars | str | None, list[int]]] = [(None, [])]  # the first accepts
        self._made = 0
        self._start = frozenset([self._add(node, 0)])
        self._steps: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}
        self._kept = 0

    def accepts(self, name: str, deadline: float, prefix: bool = False) -> bool:
        """Whether a name matches, or with `prefix` a beginning of it."""
        states, before = self._start, ""
        for char in name:
            if prefix and 0 in self._reached(states, before, char):
                return True
            key = (states, before, char)
            after = self._steps.get(key)
            if after is None:
                if time.monotonic() > deadline:
                    raise TimeoutError
                reached = [self.states[one] for one in self._reached(states, before, char)]
                after = frozenset(
                    to for test, led in reached if isinstance(test, _Chars) and char in test for to in led
                )
                self._keep(key, after)
            if not after:
                return False
            states, before = after, char
        return 0 in self._reached(states, before, "")

    def _keep(self, key: tuple[frozenset[int], str, str], after: frozenset[int]) -> None:
        self._kept += len(key[0]) + len(after) + 10
        if self._kept > _MOST_KEPT:
            self._steps, self._kept = {}, 0
        self._steps[key] = after

    def _reached(self, states: frozenset[int], before: str, after: str) -> set[int]:
        """Return the states that are reached between two characters without reading one."""
        seen, left = set(states), list(states)
        while left:
            test, led = self.states[left.pop()]
            if not isinstance(test, _Chars) and (test is None or _holds(test, before, after)):
                new = [one for one in led if one not in seen]
                seen.update(new)
                left += new
        return seen

    def _add(self, node: _Node, after: int) -> int:
        """Add the states of a node, which lead on to a state, and return the one where it begins."""
        self._made += 1
        if self._made > _MOST_STATES:
            raise _Refused(f"more than {_MOST_STATES} parts")
        if isinstance(node, (_Chars, _At)):
            return self._state(node if isinstance(node, _Chars) else node.where, [after])
        if isinstance(node, _Sequence):
            for item in reversed(node.items):
                after = self._add(item, after)
            return after
        if isinstance(node, _Either):
            return self._state(None, [self._add(item, after) for item in node.items])
        here = after
        if node.most is None:
            here = self._state(None, [after])
            self.states[here][1].append(self._add(node.item, here))
        for _ in range(0 if node.most is None else node.most - node.least):
            here = self._state(None, [self._add(node.item, here), after])
        for _ in range(node.least):
            here = self._add(node.item, here)
        return here

    def _state(self, test: _Chars | str | None, led: list[int]) -> int:
        self.states.append((test, led))
        return len(self.states) - 1


def _tail(node: _Node) -> tuple[str, bool]:
    """Return characters in which all names end that a node matches, and whether these are the only name."""
    if isinstance(node, _Chars):
        fixed = len(node.single) == 1 and not (node.ranges or node.classes or node.negated)
        return "".join(node.single) if fixed else "", fixed
    end = ""
    for item in reversed(node.items) if isinstance(node, _Sequence) else ():
        more, fixed = _tail(item)
        end = more + end
        if not fixed:
            return end, False
    return end, isinstance(node, _Sequence)


def _holds(where: str, before: str, after: str) -> bool:
    if where in ("start", "end"):
        return not (before if where == "start" else after)
    is_word = _CLASSES["w"]
    return bool(before and is_word(before)) != bool(after and is_word(after))
