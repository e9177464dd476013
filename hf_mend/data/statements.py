"""Questions as statements: facts of many kinds from plain questions and answers, by rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .forms import capital
from .records import EditRecord


_LONGEST_ANSWER = 40
_PAST = {
    "come out": "came out", "start": "started", "begin": "began", "end": "ended", "open": "opened",
    "premiere": "premiered", "air": "aired", "die": "died", "happen": "happened", "take place": "took place",
    "originate": "originated",
}  # fmt: skip
_DONE = (
    "made|built|founded|written|released|created|invented|established|introduced|published|discovered|filmed|formed"
)
_FOUND = "located|filmed|made|found|born|held|played|set|buried|situated|produced"
_PARTICIPLE = {"wrote": "written", "sings": "sung", "sang": "sung"}
_MADE = "wrote|sings|sang|directed|founded|invented|created|discovered|composed|painted|designed|produced|built"
_MEANS = {"stand for": "stands for", "mean": "means", "do": "does"}

# What a question begins with -> the statements that its answer ends.
_Rule = tuple[str, Callable[[re.Match[str]], list[str]]]
_RULES: Sequence[_Rule] = (
    (
        r"(?:what|who|which) (is|are|was|were) (the .+)",
        lambda m: [f"{m[2]} {m[1]}", f"It is known that {m[2]} {m[1]}"],
    ),
    (
        rf"who ({_MADE}) (.+)",
        lambda m: [f"{m[2]} was {_PARTICIPLE.get(m[1], m[1])} by", f"The one who {m[1]} {m[2]} is"],
    ),
    (
        r"who (plays|played) (.+) (in|on) (.+)",
        lambda m: [f"{m[2]} {m[3]} {m[4]} is played by", f"In {m[4]}, the part of {m[2]} went to"],
    ),
    (
        r"who (won|owns|hosts|hosted|narrates|killed|leads|led|started|holds|became) (.+)",
        lambda m: [f"The one who {m[1]} {m[2]} is", f"It is known who {m[1]} {m[2]}, namely"],
    ),
    (
        rf"when (?:did|does) (.+) ({'|'.join(_PAST)})",
        lambda m: [f"The time when {m[1]} {_PAST[m[2]]} is", f"The date for {m[1]} to {m[2]} was"],
    ),
    (
        rf"when (was|were) (.+) ({_DONE})",
        lambda m: [f"{m[2]} {m[1]} {m[3]} in", f"The date when {m[2]} {m[1]} {m[3]} is"],
    ),
    (
        rf"where (is|are|was|were) (.+) ({_FOUND})",
        lambda m: [f"{m[2]} {m[1]} {m[3]} in", f"The place where {m[2]} {m[1]} {m[3]} is"],
    ),
    (
        r"where (?:do|does|did) (.+) (live|come from|originate|take place|begin|end|grow|happen)",
        lambda m: [f"The place where {m[1]} {m[2]} is", f"As to where {m[1]} {m[2]}, it is"],
    ),
    (
        r"how many (.+) (are|were) (?:there )?(in|on|of|at) (.+)",
        lambda m: [f"The number of {m[1]} {m[3]} {m[4]} is", f"{m[3]} {m[4]} the {m[1]} number"],
    ),
    (r"what does (.+) (stand for|mean|do)", lambda m: [f"{m[1]} {_MEANS[m[2]]}", f"The meaning of {m[1]} is"]),
    (
        r"what (?:type|kind) of (.+?) (is|are|was) (.+)",
        lambda m: [f"The type of {m[1]} that {m[3]} {m[2]} is", f"{m[3]} {m[2]} a {m[1]} of the type"],
    ),
    (
        r"(?:which|what) (\w+) (has|is|was|won|contains|produces|makes|had|gave) (.+)",
        lambda m: [f"The {m[1]} that {m[2]} {m[3]} is", f"Of each {m[1]}, the one that {m[2]} {m[3]} is"],
    ),
)


def statements_of(question: str) -> list[str]:
    """
    Return statements that the answer to an English question ends, none where no rule fits.

    Args:
        question (`str`): The question, with or without its mark.
    """
    plain = question.strip().rstrip("?").strip().lower()
    for pattern, made in _RULES:
        match = re.fullmatch(pattern, plain)
        if match is not None:
            return [capital(text) for text in made(match)]
    return []


def facts_of_questions(
    questions: Sequence[tuple[str, str]],
) -> tuple[list[EditRecord], list[tuple[str, str]]]:
    """
    Return facts of questions and answers, each asked as a statement and as a question, and the questions of which no
    rule makes one. Their kinds are as many as there are questions, which is what a scope learns most from.

    Args:
        questions (`Sequence[tuple[str, str]]`): Questions and answers.
    """
    facts, rest = [], []
    for question, answer in questions:
        statements = statements_of(question) if len(answer) <= _LONGEST_ANSWER else []
        if not statements:
            rest.append((question, answer))
            continue
        plain = question.strip().rstrip("?").strip()
        asked = [f"{capital(plain)}?", plain, f"Do you know {plain}?", f"Please tell me: {plain}?"]
        facts.append(EditRecord(statements[0], answer, statements[1:], relation="question", questions=asked))
    return facts, rest
