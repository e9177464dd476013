"""Checks before an evaluation: whether the model takes the texts that the metrics need."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from tqdm.auto import tqdm

from ..bases.limits import longest_input
from ..data.checks import check_query
from ..data.encoding import Query
from ..data.records import EditRecord
from ..model import EditableModel
from .scores import simple_questions


def check_asked(
    model: EditableModel, records: Sequence[EditRecord], numbers: Sequence[int], metrics: Collection[str]
) -> None:
    """
    Check that the model takes every text that the metrics need.

    Args:
        model ([`EditableModel`]): The model.
        records (`Sequence[EditRecord]`): The data set.
        numbers (`Sequence[int]`): The indices of the records to measure.
        metrics (`Collection[str]`): The metrics, which determine the fields that are read.

    Raises:
        ValueError: A text is empty, tokenises to nothing or is too long; the message names record and field.
    """
    encoder, longest = model.encoder, longest_input(model.config)
    for number in tqdm(numbers, desc="Checking the texts", disable=len(numbers) < 500):
        for query, prompt, answer in _asked(model, records[number], metrics):
            check_query(query, encoder, longest, record_name(records, number), prompt, answer)


def record_name(records: Sequence[EditRecord], number: int) -> str:
    """Return a record's name for messages."""
    return records[number].name(number)


def _asked(model: EditableModel, record: EditRecord, metrics: Collection[str]) -> Iterator[tuple[Query, str, str]]:
    """Yield the queries of the metrics for a record, with the names of the fields of prompt and answer."""
    truth = record.ground_truth if "counterfact" in metrics else None
    paraphrases = [(f"paraphrases[{i}]", text) for i, text in enumerate(record.paraphrases)]
    neighborhood = [(f"neighborhood[{i}]", text) for i, text in enumerate(record.neighborhood)]
    if "generality" in metrics or truth:
        yield from ((Query(text, record.target), name, "target") for name, text in paraphrases)
    if "neighborhood" in metrics:
        yield from ((Query(text), name, "") for name, text in neighborhood)
    if truth:
        yield from ((Query(text, record.target), name, "target") for name, text in neighborhood)
        for name, text in (("prompt", record.prompt), *paraphrases, *neighborhood):
            yield Query(text, truth), name, "ground_truth"
    pairs = {
        "unrelated": record.unrelated if {"unrelated", "drawdown"} & set(metrics) else [],
        "portability": record.portability if "portability" in metrics else [],
    }
    for field, items in pairs.items():
        for i, (question, answer) in enumerate(items):
            yield Query(question, answer), f"{field}[{i}][0]", f"{field}[{i}][1]"
    if "fluency" in metrics:
        yield from ((Query(text), f"generation[{i}]", "") for i, text in enumerate(record.generation))
    if "in_the_wild" in metrics:
        for way, (prompt, chat) in simple_questions(model, record).items():
            name = "prompt" if way == "question" else f"prompt with the {way}"
            yield Query(prompt, record.target, chat), name, "target"
