"""Regular expressions for names, against `re` as the oracle, and what no expression may cost."""

from __future__ import annotations

import random
import re
import time
import tracemalloc
import warnings

import pytest

from hf_mend.bases.patterns import expression, is_literal


NAMES = [
    f"model.layers.{index}.{module}"
    for index in range(30)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts.7.w1", "norm")
]


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(1[0-9]|2[0-3])\.mlp\..*",
        r".*\.(q|k|v|o)_proj",
        r"^(?!.*norm).*(?:mlp|attn)\.\w+_proj$",
        r"(?=.*\.[0-4]\.).*_proj",
        r"(?:.*?(?:vision|image).*?(?:attn|mlp).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj)))",
        r"(a)|.*norm",
        r"model.layers.\d+.mlp.(up|down)_proj",
        r".*\.1?\d\.mlp\.[^.]+",
        r"(?!.*norm)(?:model\.layers\.1\..*|.*down_proj)",
        ".*",
        r"model\.layers\.\d{2}\.[a-z_]+\.[^.]*",
    ],
)
def test_what_is_written_for_peft_matches_as_it_does(pattern):
    matches = expression(pattern)
    expected = [name for name in NAMES if re.fullmatch(pattern, name)]
    assert [name for name in NAMES if matches(name)] == expected
    assert 0 < len(expected) <= len(NAMES)


ATOMS = [
    "a",
    "b",
    "0",
    "_",
    ".",
    r"\.",
    r"\d",
    r"\w",
    r"\W",
    r"\b",
    "[ab]",
    "[^a]",
    "[a-c0-9]",
    r"[\d.]",
    "[]a]",
    "[a-]",
]
ATOMS += ["^", "$", "{", "{a}", "-", "]", "}", ","]
REPEATS = ["", "", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{0}"]


def random_pattern(chance: random.Random, depth: int = 0) -> str:
    pattern = ""
    for _ in range(chance.randint(0, 4)):
        group = depth < 3 and chance.random() < 0.25
        inner = (
            chance.choice(["(", "(?:"]) + random_pattern(chance, depth + 1) + ")" if group else chance.choice(ATOMS)
        )
        pattern += inner + chance.choice(REPEATS) + ("|" if chance.random() < 0.12 else "")
    return pattern


def test_random_expressions_match_as_in_re():
    chance, compared = random.Random(0), 0
    for _ in range(1500):
        pattern = random_pattern(chance)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                oracle = re.compile(pattern)
        except re.error:
            with pytest.raises(ValueError, match="is not a regular expression"):
                expression(pattern)
            continue
        matches, literal = expression(pattern), is_literal(pattern)
        for _ in range(8):
            name = "".join(chance.choice("aab0_.-c{}],") for _ in range(chance.randint(0, 6)))
            assert matches(name) == (oracle.fullmatch(name) is not None), (pattern, name)
            assert literal is None or (name == literal) == matches(name)
            compared += matches(name)
    assert compared > 500


def nested(quantifier: str, times: int, pattern: str = "a") -> str:
    for _ in range(times):
        pattern = f"(?:{pattern}){quantifier}"
    return pattern


@pytest.mark.parametrize(
    "pattern",
    [
        *(nested(*one) for one in (("{100}", 3), ("{1000}", 3), ("{9}", 7), ("{30}", 5), ("*", 39), ("+", 30))),
        nested("{1000}", 4, ""),
        "(a|aa|.)*" * 100,
        "(.{0,60}){70}",
        "(.*.*.*)" * 300,
        "(?:" + "|".join("." * k + ".*" for k in range(90)) + ")*x",
        "(a+)+$",
        "[" * 1999,
        "(" * 1999,
        "a{99999999999999999999}",
    ],
)
def test_no_expression_takes_much_time_or_memory(monkeypatch, pattern):
    monkeypatch.setattr("hf_mend.bases.patterns.MATCHING_SECONDS", 0.5)
    begin = time.process_time()
    tracemalloc.start()
    try:
        matches = expression(pattern)
        for name in [*NAMES, "a" * 500, "model." + "x" * 500]:
            matches(name)
    except ValueError as error:
        assert re.search("not a regular expression|takes longer than 0.5 seconds", str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begin < 5 and peak < 200 << 20


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", r"the kind that is matched \(\\1\)"),
        (r"(?<=a)b", r"the group \(\?<="),
        (r"a(?!b).*", r"the group \(\?!"),
        (r"(?i)a", r"the group \(\?i"),
        (r"(?!a)b|c", "a lookahead before one of several alternatives"),
        ("(a", r"a \) is missing"),
        ("a)", r"a \) without its \("),
        ("[a", "it ends too early"),
        ("*a", "nothing to repeat"),
        ("a**", "one repetition of another"),
        ("a{3,2}", "most is below its least"),
        ("[b-a]", "a range of characters"),
        ("(a{99}){99}", "more than 5000 parts"),
        ("(" * 50 + ")" * 50, "groups more than 40 deep"),
    ],
)
def test_what_is_not_matched_is_named(pattern, message):
    with pytest.raises(ValueError, match=f"target_modules=.*{message}.*go in a list"):
        expression(pattern)


def test_literals():
    assert is_literal(r"model\.layers\.0") == "model.layers.0" and is_literal("q_proj") == "q_proj"
    assert is_literal(re.escape("a.b-c[0]")) == "a.b-c[0]"
    assert [is_literal(one) for one in ("a.b", r"\d", "a\\", "a|b", "[a]")] == [None] * 5
