"""Further kinds of facts, made by rule: what else a subject may be asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources

from .forms import capital
from .records import EditRecord


@dataclass(frozen=True)
class FactKind:
    """
    One thing that subjects of a kind may be asked for; `{}` stands for the subject.

    Args:
        answers (`tuple[str, ...]`): Possible answers.
        statements (`tuple[str, ...]`): Sentences that end right before the answer.
        questions (`tuple[str, ...]`): The same as questions.
    """

    answers: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class FactKinds:
    """
    What subjects may be asked for, by their kind.

    Args:
        kinds (`Mapping[str, Mapping[str, FactKind]]`): Kind of subject, such as `"person"` -> name -> the templates.
        relations (`Mapping[str, str]`): A record's relation -> the kind of its subject.
        subjects (`Mapping[str, Sequence[str]]`): Subjects of each kind, for facts without records.
        held_out (`Mapping[str, Sequence[str]]`): Kind of subject -> names that training may leave for measuring; see
            [`split`].
    """

    kinds: Mapping[str, Mapping[str, FactKind]]
    relations: Mapping[str, str]
    subjects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    held_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, common: bool = False) -> FactKinds:
        """
        Read the packaged templates.

        Args:
            common (`bool`, defaults to `False`): With what subjects are most often asked for, too, such as a person's
                birthplace or a country's capital. Records ask for these themselves, under names of their own.
        """
        content = json.loads(resources.files("hf_mend").joinpath("templates/kinds.json").read_text(encoding="utf-8"))
        kinds: dict[str, dict[str, FactKind]] = {}
        for part in ("kinds", "common") if common else ("kinds",):
            for kind, named in content[part].items():
                for name, one in named.items():
                    kinds.setdefault(kind, {})[name] = FactKind(
                        tuple(content["answers"][one["answers"]]), tuple(one["statements"]), tuple(one["questions"])
                    )
        return cls(kinds, content["relations"], content["subjects"], content["held_out"])

    def split(self) -> tuple[FactKinds, FactKinds]:
        """
        The kinds without those that are held out, and these alone: what training sees, and what only measuring does.
        None that is held out asks for nearly the same as a relation of the records does.
        """

        def only(held_out: bool) -> FactKinds:
            kinds = {
                kind: {name: one for name, one in named.items() if (name in self.held_out.get(kind, ())) is held_out}
                for kind, named in self.kinds.items()
            }
            return replace(self, kinds=kinds)

        return only(False), only(True)

    def of(self, record: EditRecord) -> Mapping[str, FactKind]:
        """
        Return what the record's subject may be asked for beside the record's own relation, by relation; nothing if its
        kind is unknown. Such a relation is `kind/name`, and is understood in a record too.
        """
        if not record.subject or record.relation is None:
            return {}
        kind = self.relations.get(record.relation) or record.relation.partition("/")[0]
        named = {f"{kind}/{name}": one for name, one in self.kinds.get(kind, {}).items()}
        return {name: one for name, one in named.items() if name != record.relation}


def more_facts(
    records: Sequence[EditRecord], count: int, seed: int = 0, kinds: FactKinds | None = None
) -> list[EditRecord]:
    """
    Return facts of further kinds about the records' subjects, with answers that are drawn: what a scope can learn the
    meaning of questions from, where the records themselves ask for a few things alone.

    Args:
        records (`Sequence[EditRecord]`): The records. Subjects whose kind is unknown give none.
        count (`int`): The most facts.
        seed (`int`, defaults to 0): Seed of the draws.
        kinds ([`FactKinds`], *optional*): The packaged ones when left out.
    """
    kinds, draw = kinds or FactKinds.load(), random.Random(f"{seed}/more facts")
    about = [(record.subject or "", kinds.of(record)) for record in records]
    about = [one for one in about if one[1]]
    chosen = draw.sample(about, min(count, len(about)))
    return [_fact(subject, *draw.choice([*named.items()]), draw) for subject, named in chosen]


def packaged_facts(count: int, seed: int = 0, kinds: FactKinds | None = None) -> list[EditRecord]:
    """
    Return facts about packaged subjects, with answers that are drawn: for a scope that is trained without records.

    Args:
        count (`int`): The most facts.
        seed (`int`, defaults to 0): Seed of the draws.
        kinds ([`FactKinds`], *optional*): The packaged ones when left out.
    """
    kinds, draw = kinds or FactKinds.load(), random.Random(f"{seed}/packaged facts")
    every = [
        (subject, f"{kind}/{name}", one)
        for kind, subjects in kinds.subjects.items()
        for subject in subjects
        for name, one in kinds.kinds[kind].items()
    ]
    return [_fact(*one, draw) for one in draw.sample(every, min(count, len(every)))]


def _fact(subject: str, relation: str, kind: FactKind, draw: random.Random) -> EditRecord:
    prompt, *others = [with_subject(text, subject) for text in draw.sample(kind.statements, len(kind.statements))]
    questions = [with_subject(text, subject) for text in kind.questions]
    answer = draw.choice(kind.answers)
    return EditRecord(prompt, answer, others, relation=relation, subject=subject, questions=questions)


def with_more_asked(
    records: Sequence[EditRecord], count: int = 6, seed: int = 0, kinds: FactKinds | None = None
) -> list[EditRecord]:
    """
    Return the records with further prompts and questions that ask their subjects for something else.

    Args:
        records (`Sequence[EditRecord]`): The records; they are not changed.
        count (`int`, defaults to 6): The most texts for each.
        seed (`int`, defaults to 0): Seed of the draws.
        kinds ([`FactKinds`], *optional*): The packaged ones when left out.
    """
    kinds, draw = kinds or FactKinds.load(), random.Random(f"{seed}/more asked")
    filled = []
    for record in records:
        others = [*kinds.of(record).values()]
        texts = [
            with_subject(draw.choice(kind.statements + kind.questions), record.subject or "")
            for kind in draw.sample(others, min(count, len(others)))
        ]
        filled.append(replace(record, same_subject=[*record.same_subject, *texts]) if texts else record)
    return filled


def with_subject(template: str, subject: str) -> str:
    """Return a template filled in with a subject, its first letter a capital one."""
    return capital(template.replace("{}", subject))
