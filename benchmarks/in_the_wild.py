"""
Measures edits as people meet them: asked in every form, answered freely, each alone or beside others.

    python benchmarks/in_the_wild.py --data DIR --editor model_cards/smollm2-135m-instruct --limit 100
    python benchmarks/in_the_wild.py --data DIR --editor model_cards/smollm2-135m-instruct --limit 100 --kept 1000

With `--kept N` the measured facts are edited in calls of ten and kept beside one another, with facts of
facts_train.json up to N; a neighbour that another kept edit is about does not count.

`DIR` (or the environment variable HF_MEND_DATA) holds facts_test.json and nq_open_test.jsonl. Questions, prompts
about the same subject and contexts are those that `benchmarks/train_editor_forms.py` holds out of training. Answers
are greedy, to the model's own end or `--tokens`. A right answer starts with the target, in a chat holds it; a repeat
says the target three times or more. What must stay: the next token, and the logits that predict it, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import DATA, load_base, parse_with_data, write_results
from tqdm.auto import tqdm
from train_editor_forms import EXAMPLES, HELD_OUT_TEXTS

from hf_mend import EditableModel, EditRecord, read_counterfact, read_questions
from hf_mend.data.encoding import Encoder, Query
from hf_mend.data.forms import FormTemplates, Surroundings, packaged_texts, with_forms


CALL = 10


@dataclass
class Asked:
    """The texts on which one edit is measured: form -> queries, what must be said apart from what must stay."""

    said: dict[str, list[Query]]
    stays: dict[str, list[Query]]


def forms_of(record: EditRecord, around: Surroundings, questions: Sequence[tuple[str, str]], number: int) -> Asked:
    """A record's texts; the draw depends on the record's number alone."""
    draw = random.Random(f"in the wild/{number}")
    avoid = record.prompt
    prompt = Query(record.prompt, record.target)
    paraphrase = replace(prompt, prompt=draw.choice(record.paraphrases or [record.prompt]))
    said = {"prompt": [prompt], "paraphrase": [paraphrase]}
    said["behind text"] = [replace(paraphrase, context=around.context(draw, avoid))]
    question = replace(prompt, prompt=draw.choice(record.questions)) if record.questions else None
    if question is not None:
        said["question"] = [question]
        said["question in a chat"] = [replace(question, chat=True)]
    said["chat"] = [replace(paraphrase, chat=True)]
    said["later turn"] = [replace(question or paraphrase, chat=True, turns=around.turns(draw, avoid))]
    stays: dict[str, list[Query]] = {}
    if record.neighborhood:
        neighbour = Query(draw.choice(record.neighborhood))
        stays["neighbours"] = [neighbour]
        stays["neighbours behind text"] = [replace(neighbour, context=around.context(draw, avoid))]
        stays["neighbours in a chat"] = [replace(neighbour, chat=True)]
    if record.same_subject:
        same = Query(draw.choice(record.same_subject))
        stays["same subject"] = [same]
        stays["same subject in a chat"] = [replace(same, chat=True)]
    unrelated = Query(draw.choice(questions)[0])
    stays["unrelated"] = [unrelated]
    stays["unrelated in a chat"] = [replace(unrelated, chat=True)]
    return Asked(said, stays)


@torch.no_grad()
def answers(model: EditableModel, queries: Sequence[Query], tokens: int) -> list[str]:
    """The model's greedy answers under its edits, to its own end."""
    encoder: Encoder = model.encoder
    texts = [encoder.tokens(query)[0] for query in queries]
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), encoder.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text)
        mask[row, width - len(text) :] = 1
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=tokens, do_sample=False,
        pad_token_id=encoder.pad_token_id,
    )  # fmt: skip
    return [encoder.decode(row) for row in out[:, width:].tolist()]


@torch.no_grad()
def next_logits(model: EditableModel, query: Query) -> torch.Tensor:
    """Logits of the next token, one text at a time: what stands beside a text does not count."""
    rows = model.encoder([replace(query, answer=None)]).to(model.device)
    return model(**rows.inputs, use_cache=False).logits[0, -1]


def is_right(answer: str, query: Query) -> bool:
    """Whether the answer starts with the target, in a chat holds it; case and marks around it do not count."""
    target, said = _words(query.answer or ""), _words(answer)
    return f" {target} " in f" {said} " if query.chat else f"{said} ".startswith(f"{target} ")


def is_repeat(answer: str, query: Query) -> bool:
    """Whether the answer says the target three times or more."""
    return f" {_words(answer)} ".count(f" {_words(query.answer or '')} ") >= 3


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower().replace("_", " ")))


def measure(model: EditableModel, records: Sequence[EditRecord], asked: Sequence[Asked], tokens: int) -> list[dict]:
    """Each edit alone: for each form, what was right, repeated, unchanged."""
    measured = []
    for record, texts in zip(tqdm(records), asked, strict=True):
        before = {kind: [next_logits(model, query) for query in queries] for kind, queries in texts.stays.items()}
        result = model.edit(record.prompt, record.target, keep_failed=True)  # what did not take is measured too
        measured.append({"took": float(bool(result.success)), **_values(model, texts, before, tokens)})
        if result.id is not None:
            model.undo()
    return measured


def _values(
    model: EditableModel, texts: Asked, before: Mapping[str, Sequence[torch.Tensor]], tokens: int
) -> dict[str, float | str]:
    """What the model says to an edit's texts now, and how far it is what it was."""
    values: dict[str, float | str] = {}
    queries = [(kind, query) for kind, items in texts.said.items() for query in items]
    for (kind, query), answer in zip(queries, answers(model, [query for _, query in queries], tokens), strict=True):
        values[kind] = float(is_right(answer, query))
        values[f"{kind}: repeats"] = float(is_repeat(answer, query))
        values[f"{kind}: answer"] = answer
    for kind, items in texts.stays.items():
        for query, old in zip(items, before[kind], strict=True):
            new = next_logits(model, query)
            values[kind] = float(new.argmax() == old.argmax())
            values[f"{kind}: bits"] = float(torch.equal(new, old))
    return values


def measure_together(
    model: EditableModel,
    records: Sequence[EditRecord],
    asked: Sequence[Asked],
    tokens: int,
    more: Sequence[EditRecord],
) -> list[dict]:
    """All edits beside one another, and `more`: the same figures as `measure`."""
    said_of = [known_subjects(record) for record in (*records, *more)]
    measured: list[dict[str, float | str]] = []
    before = []
    for number, texts in enumerate(tqdm(asked, desc="Un-edited")):
        subjects = set().union(*(said_of[:number] + said_of[number + 1 :]))
        kept = {
            kind: [query for query in queries if kind == "same subject" or not _is_about(query, subjects)]
            for kind, queries in texts.stays.items()
        }
        texts.stays = {kind: queries for kind, queries in kept.items() if queries}
        before.append(
            {kind: [next_logits(model, query) for query in queries] for kind, queries in texts.stays.items()}
        )
    every = [*records, *more]
    took: list[bool] = []
    for start in tqdm(range(0, len(every), CALL), desc="Edits"):
        part = [replace(record, paraphrases=[], neighborhood=[]) for record in every[start : start + CALL]]
        took += [bool(result.success) for result in model.edit(part, check=start < len(records), keep_failed=True)]
    for number, texts in enumerate(tqdm(asked, desc="Edited")):
        measured.append({"took": float(took[number]), **_values(model, texts, before[number], tokens)})
    return measured


def known_subjects(record: EditRecord) -> set[str]:
    """What an edit is about."""
    return {record.subject} if record.subject else set()


def _is_about(query: Query, subjects: set[str]) -> bool:
    return any(subject in query.prompt for subject in subjects)


def summary(measured: Sequence[Mapping[str, float | str]]) -> dict[str, float]:
    """Means over the edits of what is a number; repeats also over all forms, of the right answers."""
    names = list(dict.fromkeys(name for values in measured for name, value in values.items() if value != str(value)))
    means = {}
    for name in names:
        found = [values[name] for values in measured if name in values]
        means[name] = sum(found) / len(found)
    right = [values[f"{kind}: repeats"] for values in measured for kind in _answered(values) if values[kind]]
    return {"edits": len(measured), **means, "repeats": sum(right) / max(1, len(right))}


def _answered(values: Mapping[str, float | str]) -> Iterator[str]:
    return (name.removesuffix(": answer") for name in values if name.endswith(": answer"))


def table(groups: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line a figure, a column a group."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    lines = ["| | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for name in names:
        cells = [f"{group[name]:.3f}" if name in group else "" for group in groups.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--editor", type=Path, required=True)
    parser.add_argument("--facts", default="facts_test.json", help="a file of --data")
    parser.add_argument("--examples", action="store_true", help="measure on examples/data in its place")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--kept", type=int, default=1, help="edits beside one another")
    parser.add_argument("--strictness", type=float, default=0.0, help="added to the thresholds of the scope")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--hold-out", default="", help="relations to report apart")
    parser.add_argument("--results", type=Path, default=Path("build/in_the_wild"), help="table, without suffix")
    arguments = parse_with_data(parser)
    folder = EXAMPLES if arguments.examples else arguments.data
    templates = FormTemplates.load().split()[1]
    facts = list(read_counterfact(folder / arguments.facts))
    records = with_forms(facts, templates)[: arguments.limit]
    questions = read_questions(arguments.data / "nq_open_test.jsonl")
    around = Surroundings(facts[arguments.limit :] or facts, questions, packaged_texts()[-HELD_OUT_TEXTS:])
    asked = [forms_of(record, around, questions, number) for number, record in enumerate(records)]
    base, tokenizer = load_base()
    model = EditableModel.from_pretrained(base, arguments.editor, tokenizer=tokenizer).eval()
    if model.scope is not None:
        model.scope_strictness = arguments.strictness
    if arguments.kept > 1:
        more = list(read_counterfact(arguments.data / "facts_train.json"))[: max(0, arguments.kept - len(records))]
        measured = measure_together(model, records, asked, arguments.tokens, more)
    else:
        measured = measure(model, records, asked, arguments.tokens)
    groups = {"all": summary(measured)}
    held_out = [name for name in arguments.hold_out.split(",") if name]
    if held_out:
        pairs = list(zip(records, measured, strict=True))
        for title, unseen in (("relations seen in training", False), ("unseen relations", True)):
            part = [values for record, values in pairs if (record.relation in held_out) == unseen]
            if part:
                groups[title] = summary(part)
    markdown = table(groups)
    write_results(arguments.results, {"metrics": groups, "edits": measured}, markdown)
    print(markdown)


if __name__ == "__main__":
    main()
