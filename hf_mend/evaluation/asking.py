"""The texts on which an edit is measured in the wild: what must be said, and what must stay."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache

from ..bases.limits import longest_input
from ..data.encoding import Query
from ..data.forms import Surroundings, writes_chats
from ..data.kinds import FactKinds, with_subject
from ..data.records import EditRecord
from ..model import EditableModel


# What must stay, but for what is about the edit's own subject, does not count where it asks for what another kept edit
# is about.
_ALWAYS_COUNT = ("same subject", "another question", "before it asks")
# With these a prompt asks: without them the model should go on as it would have. Prompts of other languages have none.
_SMALL_WORDS = frozenset(
    re.findall(r"\w+", "a an are as at by for from in is it its of on that the to was were which who whose with")
)
# Tokens that a text leaves for its answer.
_ROOM = 16


@dataclass(frozen=True)
class Asked:
    """
    The texts on which one edit is measured.

    Args:
        said (`dict[str, Query]`): Form of asking -> a text to which the model should say the edit's target.
        stays (`dict[str, Query]`): Kind -> a text whose answer should stay.
    """

    said: dict[str, Query]
    stays: dict[str, Query]

    def counted(self, others: Collection[str]) -> list[str]:
        """
        Return the kinds of what must stay that count beside other edits.

        Args:
            others (`Collection[str]`): What the other edits are about.
        """
        return [
            kind
            for kind, query in self.stays.items()
            if kind.startswith(_ALWAYS_COUNT) or not any(subject in query.prompt for subject in others)
        ]


def ask_in_the_wild(
    record: EditRecord, around: Surroundings, unrelated: Sequence[str], number: int, chat: bool = True
) -> Asked:
    """
    Draw the texts on which an edit is measured; the draw depends on the record's number alone.

    Args:
        record ([`EditRecord`]): The record; forms that it has no texts for are left out.
        around ([`~hf_mend.data.forms.Surroundings`]): Gives what stands before a text.
        unrelated (`Sequence[str]`): Texts that have nothing to do with any edit.
        number (`int`): The record's number.
        chat (`bool`, defaults to `True`): Ask in chats too, which needs a tokenizer with a chat template.
    """
    draw = random.Random(f"in the wild/{number}")
    avoid = record.prompt
    prompt = Query(record.prompt, record.target)
    paraphrase = replace(prompt, prompt=draw.choice(record.paraphrases or [record.prompt]))
    said = {"prompt": prompt, "paraphrase": paraphrase}
    said["behind text"] = replace(paraphrase, context=around.context(draw, avoid))
    question = replace(prompt, prompt=draw.choice(record.questions)) if record.questions else None
    if question is not None:
        said |= {"question": question, "question in a chat": replace(question, chat=True)}
    said["chat"] = replace(paraphrase, chat=True)
    said["later turn"] = replace(question or paraphrase, chat=True, turns=around.turns(draw, avoid))
    stays: dict[str, Query] = {}
    begun = _begun(record)
    if begun:
        stays["before it asks"] = Query(begun)
    if record.neighborhood:
        neighbour = Query(draw.choice(record.neighborhood))
        stays["neighbours"] = neighbour
        stays["neighbours behind text"] = replace(neighbour, context=around.context(draw, avoid))
        stays["neighbours in a chat"] = replace(neighbour, chat=True)
    if record.same_subject:
        same = Query(draw.choice(record.same_subject))
        stays |= {"same subject": same, "same subject in a chat": replace(same, chat=True)}
    asked = _another_question(record, random.Random(f"another question/{number}"))
    if asked:
        stays |= {"another question": Query(asked), "another question in a chat": Query(asked, chat=True)}
    another = _about_another(record, around.records, random.Random(f"another subject/{number}"))
    if another:
        stays |= {"another subject": Query(another), "another subject in a chat": Query(another, chat=True)}
    if unrelated:
        other = Query(draw.choice(unrelated))
        stays |= {"unrelated": other, "unrelated in a chat": replace(other, chat=True)}
    return Asked(*({kind: query for kind, query in part.items() if chat or not query.chat} for part in (said, stays)))


def _about_another(record: EditRecord, others: Sequence[EditRecord], draw: random.Random) -> str:
    """Return a record's prompt about the subject of another one of its relation; nothing where there is none."""
    subject = record.subject or ""
    subjects = {one.subject for one in others if one.relation == record.relation and one.subject}
    left = sorted(one for one in subjects if one not in record.prompt and subject not in one)
    if record.relation is None or not subject or subject not in record.prompt or not left:
        return ""
    return record.prompt.replace(subject, draw.choice(left))


@cache
def _kinds() -> FactKinds:
    """What a training may leave for measuring."""
    return FactKinds.load().split()[1]


def _another_question(record: EditRecord, draw: random.Random) -> str:
    """
    Return a question or prompt that asks a record's subject for something else, by rule; nothing where its kind is
    unknown.
    """
    named = [*_kinds().of(record).values()]
    if not named or not record.subject:
        return ""
    kind = draw.choice(named)
    return with_subject(draw.choice(kind.statements + kind.questions), record.subject)


def _begun(record: EditRecord) -> str:
    """Return a prompt without the small words at its end, which has not asked yet; nothing where there are none."""
    words = record.prompt.split()
    end = len(words)
    while end and words[end - 1] in _SMALL_WORDS:
        end -= 1
    begun = " ".join(words[:end]).rstrip(",")
    return begun if 1 < end < len(words) and (record.subject or "") in begun else ""


def all_asked(
    model: EditableModel, records: Sequence[EditRecord], around: Surroundings, unrelated: Sequence[str]
) -> list[Asked]:
    """
    Draw the texts of all records; see [`ask_in_the_wild`]. Where the model does not take a text, what stands before it
    is left out.
    """
    encoder, longest = model.encoder, longest_input(model.config)
    chat = writes_chats(encoder.tokenizer)
    most = None if longest is None else max(1, longest - _ROOM)

    def fitting(texts: dict[str, Query]) -> dict[str, Query]:
        return {kind: encoder.shortened(query, most) for kind, query in texts.items()}

    drawn = [ask_in_the_wild(record, around, unrelated, number, chat) for number, record in enumerate(records)]
    return [Asked(fitting(texts.said), fitting(texts.stays)) for texts in drawn]


def subjects_of(record: EditRecord) -> set[str]:
    """Return what an edit is about."""
    return {record.subject} if record.subject else set()


def is_right(answer: str, query: Query) -> bool:
    """
    Whether an answer starts with the target, in a chat holds it, as whole words; case and marks do not count.

    Args:
        answer (`str`): What the model says.
        query ([`Query`]): What it was asked, with its target.
    """
    target, said = _words(query.answer or ""), _words(answer)
    return f" {target} " in f" {said} " if query.chat else f"{said} ".startswith(f"{target} ")


def is_repeat(answer: str, query: Query) -> bool:
    """Whether an answer says the target three times or more; the arguments are those of [`is_right`]."""
    return len(re.findall(rf"\b{re.escape(_words(query.answer or ''))}\b", _words(answer))) >= 3


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower().replace("_", " ")))
