"""Inputs with a structure, as hypothesis makes them: calls of a store, expressions, configurations, data sets."""

from __future__ import annotations

import csv
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.append_to_store import small_edit
from support.edits import bits

from hf_mend import EditorConfig, EditRecord, EditStore, read_edits, write_edits
from hf_mend.bases.patterns import expression
from hf_mend.hub.files import read_json


# The same inputs each time, and no limit of time: a machine that does other things too is no fault of the code.
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
NAMES = st.sampled_from("abcdef")
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(NAMES, min_size=1, max_size=3, unique=True)),
        st.tuples(st.sampled_from(["undo", "off", "on"]), st.lists(NAMES, min_size=1, max_size=2, unique=True)),
        st.tuples(st.sampled_from(["compact", "again"]), st.just([])),
    ),
    max_size=12,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def _follow(path: Path, calls: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    """Carry out calls on a store and on a dictionary, and return the dictionary's states after those that count."""
    store, held, number = EditStore(path), {}, 0
    states = [{}]
    for what, names in calls:
        before = held
        if what == "append":
            edits = [small_edit(name, number := number + 1, layers=1) for name in names]
            store.append(edits)
            held = held | {one.id: (one, True) for one in edits}  # one that is there already in its place
        elif what == "compact":
            store.compact()
            states = states[:1]  # the file has no earlier state any more
        elif what == "again":
            store = EditStore(path)
        elif not set(names) <= held.keys():
            with pytest.raises(KeyError):
                {"undo": store.undo, "off": store.disable_edit, "on": store.enable_edit}[what](names)
        elif what == "undo":
            store.undo(names)
            held = {name: one for name, one in held.items() if name not in names}
        else:
            (store.disable_edit if what == "off" else store.enable_edit)(names)
            held = {name: (one, what == "on" if name in names else on) for name, (one, on) in held.items()}
        assert [(one.id, one.enabled) for one in store.edits] == [(name, on) for name, (_, on) in held.items()]
        if held is not before or what == "compact":
            states.append(held)
    return states


def _held(path: Path) -> list[Any]:
    return [(edit.id, edit.enabled, bits([edit])[0][1]) for edit in EditStore(path).edits]


def _expected(state: dict[str, Any]) -> list[Any]:
    return [(name, on, bits([one])[0][1]) for name, (one, on) in state.items()]


@QUICK
@given(CALLS)
def test_a_store_holds_what_a_dictionary_does(calls):
    with tempfile.TemporaryDirectory() as folder:
        states = _follow(Path(folder) / "store", calls)
        assert _held(Path(folder) / "store") == _expected(states[-1])


@QUICK
@given(CALLS, st.data())
def test_a_store_that_is_cut_or_altered_is_an_earlier_state_or_refused(calls, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        states = [_expected(state) for state in _follow(path, calls)]
        content = bytearray(path.read_bytes()) if path.exists() else bytearray()
        place = data.draw(st.integers(0, len(content)))
        what = data.draw(st.sampled_from(["cut", "flip", "delete", "insert"]))
        if what == "cut":
            del content[place:]
        elif what == "flip" and place < len(content):
            content[place] ^= data.draw(st.integers(1, 255))
        elif what == "delete":
            del content[place : place + data.draw(st.integers(1, 40))]
        elif what == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
        path.write_bytes(content)
        try:
            found = _held(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert found in states


ATOMS = st.sampled_from(["a", "b", "0", "_", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c0-9]", r"\b", "^", "$"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)
AHEAD = st.sampled_from(["", "(?=.*a)", "(?!.*b)", "(?!0).*"])  # at the beginning alone


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.tuples(AHEAD, EXPRESSIONS).map("".join), st.lists(st.text("ab0_.c", max_size=8), min_size=1, max_size=5))
def test_an_expression_matches_as_re_does(pattern, names):
    matches = expression(pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [matches(name) for name in names] == [bool(re.fullmatch(pattern, name)) for name in names]


FIELDS = sorted({*EditorConfig("mend").to_dict(), *EditorConfig("memit").to_dict()})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), VALUES | st.integers(0, 40), max_size=4))
def test_a_configuration_is_refused_or_comes_back(values):
    text = json.dumps({"method": "mend", **values})
    try:
        config = EditorConfig.from_dict(read_json(text, "the file"))
    except ValueError as error:
        assert 20 < len(str(error)) < 5000
    else:
        assert EditorConfig.from_dict(json.loads(config.to_json())) == config


# What is in a cell: text with a letter, which white space at its ends is no part of.
WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=15).map(
    lambda text: f"w{text}w"
)
ROWS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5)


@QUICK
@given(ROWS, st.sampled_from([",", ";", "\t"]))
def test_rows_come_back_from_every_kind_of_file(rows, separator):
    records = [EditRecord(prompt, target) for prompt, target in rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_edits(folder / "lines.jsonl", records)
        listed = [{"prompt": prompt, "target": target} for prompt, target in rows]
        (folder / "list.json").write_text(json.dumps(listed), encoding="utf-8")
        with open(folder / "table.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([("prompt", "target"), *rows])
        for path in sorted(folder.iterdir()):
            assert [(one.prompt, one.target) for one in read_edits(path)] == rows, path.name


@QUICK
@given(VALUES, st.lists(st.fixed_dictionaries({"prompt": VALUES, "target": VALUES}), max_size=3))
def test_any_json_is_read_or_refused_with_the_files_name(value, rows):
    with tempfile.TemporaryDirectory() as folder:
        for content in (json.dumps(value), json.dumps(rows), "\n".join(map(json.dumps, [*rows, value]))):
            path = Path(folder) / "rows.json"
            path.write_text(content, encoding="utf-8")
            try:
                records = list(read_edits(path))
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert records and all(isinstance(one.prompt, str) and one.target.strip() for one in records)
