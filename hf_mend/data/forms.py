"""Forms of asking: one fact as a sentence, a question or a chat's turn, alone or behind other text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from .chat import is_in, render_chat
from .encoding import Query
from .records import EditRecord


# As plain text: a record's prompt, one of its paraphrases, one of its questions. As a user's turn in the tokenizer's
# chat template, one of these three: the first turn, one behind other turns, one under a system prompt.
PLAIN_FORMS = ("prompt", "paraphrase", "question")
CHAT_FORMS = ("chat", "later_turn", "system")
FORMS = PLAIN_FORMS + CHAT_FORMS

# How often training draws each.
DEFAULT_FORMS: Mapping[str, float] = {
    "prompt": 1.0,
    "paraphrase": 2.0,
    "question": 2.0,
    "chat": 2.0,
    "later_turn": 1.5,
    "system": 0.5,
}

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer in as few words as possible.",
    "You are an expert who answers questions about the world.",
    "You are a friendly assistant. Be brief and precise.",
)

_GAPS = (" ", " ", "\n", "\n\n")  # between a context and what is asked
_ANY_RELATION = "*"
_TAIL_WORDS = 5


def check_forms(forms: Mapping[str, float], name: str = "forms") -> None:
    """
    Args:
        forms (`Mapping[str, float]`): A weight for some of [`FORMS`].
        name (`str`, defaults to `"forms"`): What they are called in messages.

    Raises:
        ValueError: There is an unknown form, a weight that is no number of at least 0, or no weight above 0.
    """
    for form, weight in forms.items():
        if form not in FORMS:
            raise ValueError(f"{name} has {form!r}, expected some of {list(FORMS)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"{name}[{form!r}] is {weight!r}, expected a weight of at least 0")
    if not any(forms.values()):
        raise ValueError(f"{name} is {dict(forms)!r}, expected at least one form with a weight above 0")


def available_forms(forms: Mapping[str, float], tokenizer: Any) -> dict[str, float]:
    """
    The forms that a tokenizer can write: without a chat template there are no chats, and some templates refuse a
    system prompt or leave it out. Where nothing is left, the paraphrases are.

    Args:
        forms (`Mapping[str, float]`): The weights.
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
    """
    left = {form: weight for form, weight in forms.items() if form in PLAIN_FORMS or _writes(tokenizer, form)}
    return left if any(left.values()) else {"paraphrase": 1.0}


def writes_chats(tokenizer: Any) -> bool:
    """
    Whether a tokenizer can write a text as a user's turn of a chat.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
    """
    return _writes(tokenizer, "chat")


def _writes(tokenizer: Any, form: str) -> bool:
    """Whether the tokenizer's chat template writes what a form has."""
    before = {"later_turn": [("user", "Who?"), ("assistant", "Ann.")], "system": [("system", SYSTEM_PROMPTS[0])]}
    turns = [*before.get(form, []), ("user", "When?")]
    try:
        text, _ = render_chat(tokenizer, turns)
    except ValueError:
        return False
    return all(is_in(said, text) for _, said in turns)


@dataclass(frozen=True)
class RelationForms:
    """
    Templates of one relation; `{}` stands for the subject.

    Args:
        questions (`tuple[str, ...]`): The fact asked for.
        same_subject (`tuple[str, ...]`): Something else about a subject of this kind.
        unlike (`tuple[str, ...]`): Other relations that such a subject may have and whose answers have nothing to do
            with this one's: their questions, too, ask the same subject for something else.
    """

    questions: tuple[str, ...] = ()
    same_subject: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


@dataclass(frozen=True)
class FormTemplates:
    """
    Templates by relation. Those of `"*"` are for subjects of relations without an entry.

    Args:
        relations (`Mapping[str, RelationForms]`): The templates.
    """

    relations: Mapping[str, RelationForms]

    @classmethod
    def load(cls, path: str | Path | None = None) -> FormTemplates:
        """
        Reads a JSON object: relation -> `questions`, `same_subject` and `unlike`, each a list and each optional.

        Args:
            path (`str` or `Path`, *optional*): The file; the packaged templates when left out.

        Raises:
            ValueError: The file is no such object; the message names the entry.
        """
        if path is None:
            text = resources.files("hf_mend").joinpath("templates/forms.json").read_text(encoding="utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
        where = "the packaged forms.json" if path is None else str(path)
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{where} holds a {type(content).__name__}, expected an object: relation -> templates")
        return cls({name: _relation_forms(entry, f"{where}: {name!r}") for name, entry in content.items()})

    def split(self, held_out: int = -1) -> tuple[FormTemplates, FormTemplates]:
        """
        The templates without one of each list, and that one alone: what training sees, and what only measuring does.

        Args:
            held_out (`int`, defaults to -1): Which question and which prompt about the same subject of each relation
                is held out. A list of one template stays whole in the first part, and is empty in the second.
        """

        def parts(templates: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
            if len(templates) < 2:
                return templates, ()
            alone = templates[held_out]
            return tuple(text for text in templates if text != alone), (alone,)

        first, second = {}, {}
        for name, entry in self.relations.items():
            questions, same_subject = parts(entry.questions), parts(entry.same_subject)
            first[name] = RelationForms(questions[0], same_subject[0], entry.unlike)
            second[name] = RelationForms(questions[1], same_subject[1])
        return FormTemplates(first), FormTemplates(second)

    def of(self, relation: str | None) -> RelationForms:
        """A relation's templates, the questions of relations unlike it among those about the same subject."""
        entry = self.relations.get(relation or "") or self.relations.get(_ANY_RELATION, RelationForms())
        others = [text for name in entry.unlike for text in self.relations.get(name, RelationForms()).questions]
        return replace(entry, same_subject=(*entry.same_subject, *others))


def _relation_forms(entry: Any, where: str) -> RelationForms:
    if not isinstance(entry, dict) or not set(entry) <= {"questions", "same_subject", "unlike"}:
        raise ValueError(f"{where} is {entry!r}, expected an object with 'questions', 'same_subject' and 'unlike'")
    for field, items in entry.items():
        if not isinstance(items, list) or not all(isinstance(text, str) and text.strip() for text in items):
            raise ValueError(f"{where}: {field!r} is {items!r}, expected a list of texts")
        for text in items:
            if field != "unlike" and text.count("{}") != 1:
                raise ValueError(f"{where}: the template {text!r} has no single '{{}}' for the subject")
    return RelationForms(**{field: tuple(items) for field, items in entry.items()})


def with_forms(records: Iterable[EditRecord], templates: FormTemplates | None = None) -> list[EditRecord]:
    """
    Fills the records' `questions` and `same_subject` from their relations and subjects. What a record has stays, and
    one without a known subject is left as it is.

    Args:
        records (`Iterable[EditRecord]`): The records; they are not changed.
        templates ([`FormTemplates`], *optional*): The packaged ones when left out.
    """
    templates = templates or FormTemplates.load()
    filled = []
    for record in records:
        if record.subject:
            forms = templates.of(record.relation)
            record = replace(
                record,
                questions=record.questions or [text.replace("{}", record.subject) for text in forms.questions],
                same_subject=record.same_subject
                or [text.replace("{}", record.subject) for text in forms.same_subject],
            )
        filled.append(record)
    return filled


def packaged_texts() -> list[str]:
    """The packaged lines of calibration text."""
    return (
        resources.files("hf_mend").joinpath("templates/calibration_text.txt").read_text(encoding="utf-8").splitlines()
    )


class Surroundings:
    """
    Draws what may stand before a prompt: sentences of a page, other facts, questions with their answers; and earlier
    turns of a chat.

    Args:
        records (`Sequence[EditRecord]`): Whose prompts are stated, each with its target or, where that is known, as
            often with what is true.
        questions (`Sequence[tuple[str, str]]`): Questions and answers.
        texts (`Sequence[str]`, *optional*): Sentences or passages; the packaged ones when left out.
    """

    def __init__(
        self,
        records: Sequence[EditRecord],
        questions: Sequence[tuple[str, str]] = (),
        texts: Sequence[str] | None = None,
    ):
        self.records = records
        self.questions = questions
        self.texts = packaged_texts() if texts is None else texts

    def context(self, draw: random.Random, avoid: str = "") -> str:
        """
        One to three sentences, with white space behind them.

        Args:
            draw (`random.Random`): The source of chance.
            avoid (`str`, defaults to `""`): The prompt whose record is not to be stated.
        """
        count = draw.choices((1, 2, 3), (3, 2, 1))[0]
        return " ".join(self._sentence(draw, avoid) for _ in range(count)) + draw.choice(_GAPS)

    def tail(self, draw: random.Random, avoid: str = "") -> str:
        """What a text may go on with behind an answer: the end of the sentence and another, or more of the same."""
        end = draw.choice((". ", ".\n", ", ", "\n", " and "))
        return end + " ".join(self._sentence(draw, avoid).split(" ")[:_TAIL_WORDS])

    def turns(self, draw: random.Random, avoid: str = "") -> tuple[tuple[str, str], ...]:
        """One to three questions of a user, each with an assistant's answer; as for `context`."""
        count = draw.choices((1, 2, 3), (4, 2, 1))[0]
        said: list[tuple[str, str]] = []
        for _ in range(count):
            asked, answer = self._exchange(draw, avoid)
            said += [("user", asked), ("assistant", answer)]
        return tuple(said)

    def _sentence(self, draw: random.Random, avoid: str) -> str:
        kinds = [self.texts, self.questions, self.records]
        kind = draw.choice([items for items in kinds if len(items)] or [("",)])
        if kind is self.records:
            fact = self._fact(draw, avoid)
            if fact is not None:
                return f"{fact[0]} {fact[1]}" + ("" if fact[1].endswith(".") else ".")
            kind = self.texts
        if kind is self.questions:
            asked, answer = draw.choice(self.questions)
            return f"{capital(asked)} {capital(answer)}."
        return draw.choice(self.texts) if len(self.texts) else ""

    def _exchange(self, draw: random.Random, avoid: str) -> tuple[str, str]:
        fact = self._fact(draw, avoid) if not self.questions or draw.random() < 0.4 else None
        if fact is None and self.questions:
            fact = draw.choice(self.questions)
        if fact is None:
            return "Hello!", "Hello! How can I help you today?"
        return capital(fact[0]), capital(fact[1])

    def _fact(self, draw: random.Random, avoid: str) -> tuple[str, str] | None:
        """Another record's prompt or question with an answer; `None` where chance finds none."""
        if not len(self.records):
            return None
        record = self.records[draw.randrange(len(self.records))]
        if record.prompt == avoid:
            return None
        answer = draw.choice([record.target, record.ground_truth or record.target])
        asked = draw.choice(record.questions) if record.questions and draw.random() < 0.4 else record.prompt
        return asked, answer


def capital(text: str) -> str:
    """Return a text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def in_form(query: Query, form: str, draw: random.Random, surroundings: Surroundings, avoid: str = "") -> Query:
    """
    A query as plain text, or as a turn of a chat.

    Args:
        query ([`Query`]): A plain one.
        form (`str`): One of [`FORMS`].
        draw (`random.Random`): The source of chance.
        surroundings ([`Surroundings`]): Gives earlier turns.
        avoid (`str`, defaults to `""`): The prompt whose record is not to be stated in them.
    """
    if form == "later_turn":
        return replace(query, chat=True, turns=surroundings.turns(draw, avoid))
    if form == "system":
        return replace(query, chat=True, system=draw.choice(SYSTEM_PROMPTS))
    return replace(query, chat=form == "chat")
