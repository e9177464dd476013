"""The facts of `seq2seq.py`, and how edits fare that are kept together, asked in several forms."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from hf_mend import EditableModel, EditRecord
from hf_mend.data.encoding import Query, batches
from hf_mend.data.forms import FormTemplates, Surroundings, with_forms


# What a scope is trained on and an editor with it; the model has no chats.
FORMS = {"prompt": 1.0, "paraphrase": 2.0, "question": 2.0}
SAID = ("prompt", "paraphrase", "behind text", "question")
STAYS = ("neighborhood", "same subject", "unrelated")

Answers = Callable[[Sequence[str]], list[str]]


@dataclass
class Known:
    """Facts and what the model says to them."""

    facts: list[EditRecord]
    said: list[str]

    @property
    def questions(self) -> list[tuple[str, str]]:
        return [(fact.prompt, said) for fact, said in zip(self.facts, self.said, strict=True) if said]


def with_locality(facts: Sequence[EditRecord], known: Known, seed: int, rows: int = 5) -> list[EditRecord]:
    """
    The facts, each with other facts of the model's own to leave alone: neighbours are of the same relation, with the
    same true answer as far as there are such; the unrelated ones are any.
    """
    draw = random.Random(seed)
    by_relation: dict[str | None, list[EditRecord]] = {}
    for fact in known.facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    records = []
    for fact in facts:
        others = [other for other in by_relation[fact.relation] if other.subject != fact.subject]
        draw.shuffle(others)
        others.sort(key=lambda other: other.ground_truth != fact.ground_truth)
        questions = draw.sample(known.questions, rows + 1)
        records.append(
            replace(
                fact,
                neighborhood=[other.prompt for other in others[:rows]],
                unrelated=[pair for pair in questions if pair[0] != fact.prompt][:rows],
            )
        )
    return records


def with_targets(facts: Sequence[EditRecord], count: int, seed: int) -> list[EditRecord]:
    """
    Each fact with its own target, and again with others of its relation: an editor that sees a fact with one target
    alone learns the pair.
    """
    draw = random.Random(seed)
    answers: dict[str | None, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, []).extend((fact.target, fact.ground_truth or fact.target))
    records = []
    for fact in facts:
        others = sorted({*answers[fact.relation]} - {fact.target, fact.ground_truth})
        targets = [fact.target, *draw.sample(others, min(len(others), count - 1))]
        records += [replace(fact, target=target) for target in targets]
    return records


def trained_forms(records: Sequence[EditRecord]) -> list[EditRecord]:
    """The records with the questions and prompts about the same subject that training may see."""
    return with_forms(records, FormTemplates.load().split()[0])


def asked(records: Sequence[EditRecord], others: Sequence[tuple[str, str]], seed: int) -> list[dict[str, list[str]]]:
    """
    Of each fact, the texts by which it is asked for and those whose answers must stay, in forms that training did not
    see; `others` are prompts that no edit is about, and the model's answers.
    """
    draw, around = random.Random(seed), Surroundings([], others)
    found = []
    for record in with_forms(records, FormTemplates.load().split()[1]):
        said = record.paraphrases or [record.prompt]
        found.append(
            {
                "prompt": [record.prompt],
                "paraphrase": list(record.paraphrases),
                "behind text": [around.context(draw) + text for text in said],
                "question": list(record.questions),
                "neighborhood": list(record.neighborhood),
                "same subject": list(record.same_subject),
                "unrelated": [prompt for prompt, _ in record.unrelated],
            }
        )
    return found


@torch.no_grad()
def first_logits(model: EditableModel, prompts: Sequence[str]) -> torch.Tensor:
    """The logits of each answer's first token, `(prompts, vocab)`."""
    rows = [model.encoder([Query(prompt) for prompt in chunk]) for chunk in batches(prompts, 256)]
    return torch.cat([model(**one.inputs, use_cache=False).logits[:, -1] for one in rows])


def kept_together(
    model: EditableModel,
    records: Sequence[EditRecord],
    texts: Sequence[dict[str, list[str]]],
    count: int,
    answers: Answers,
) -> dict[str, float]:
    """
    Edits the facts, `count` in a call and undone before the next, and asks: the share of right answers in each form of
    asking, and of answers and of logits, bit for bit, that stay.

    Args:
        model ([`EditableModel`]): The model, without edits.
        records (`Sequence[EditRecord]`): The facts.
        texts (`Sequence[dict[str, list[str]]]`): What [`asked`] gives of them.
        count (`int`): How many edits the model carries at a time.
        answers (`Callable`): Prompts -> what the model answers.
    """
    shares: dict[str, list[bool]] = {}
    for start in range(0, len(records), count):
        chunk, own = records[start : start + count], texts[start : start + count]
        stays = {kind: [text for one in own for text in one[kind]] for kind in STAYS}
        before = {kind: answers(prompts) for kind, prompts in stays.items()}
        logits = first_logits(model, stays["unrelated"])
        bare = {record.prompt: replace(record, paraphrases=[], neighborhood=[], unrelated=[]) for record in chunk}
        with model.edited([*bare.values()], force=True):
            for form in SAID:
                wanted = [record.target for record, one in zip(chunk, own, strict=True) for _ in one[form]]
                said = answers([text for one in own for text in one[form]])
                shares.setdefault(form, []).extend(a == b for a, b in zip(said, wanted, strict=True))
            for kind, prompts in stays.items():
                after = answers(prompts)
                shares.setdefault(kind, []).extend(a == b for a, b in zip(after, before[kind], strict=True))
            same = (first_logits(model, stays["unrelated"]) == logits).all(-1)
            shares.setdefault("unrelated, bit for bit", []).extend(same.tolist())
    return {name: sum(values) / len(values) for name, values in shares.items() if values}


def kept_table(values: dict[str, dict[str, float]]) -> str:
    """A Markdown table, a row for each number of edits."""
    names = list(dict.fromkeys(name for one in values.values() for name in one))
    lines = [f"| kept | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {kept} | {' | '.join(f'{one[name]:.3f}' for name in names)} |" for kept, one in values.items()]
    return "\n".join(lines)
