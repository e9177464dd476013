"""What a training step sees: draws of each record's texts, and the collator that pads them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data.encoding import EncodedBatch, Encoder, Query
from ..data.records import EditRecord


@dataclass
class EditBatch:
    """
    A training step's texts. Rows of one edit stand together, as many for each edit; kinds of text that differ in
    length are apart, so that little is padding.

    Args:
        edit ([`EncodedBatch`]): The prompts and targets that make the edits, one row an edit.
        general ([`EncodedBatch`]): Where the target must be said.
        local (`dict[str, EncodedBatch]`): Where nothing may change: `"neighborhood"` prompts, `"unrelated"` questions.
    """

    edit: EncodedBatch
    general: EncodedBatch
    local: dict[str, EncodedBatch]

    def __len__(self) -> int:
        return len(self.edit)

    def edits(self, start: int, stop: int) -> EditBatch:
        """Some neighbouring edits with their texts."""

        def part(rows: EncodedBatch) -> EncodedBatch:
            each = len(rows) // len(self)
            return rows[start * each : stop * each]

        return EditBatch(part(self.edit), part(self.general), {kind: part(rows) for kind, rows in self.local.items()})

    def to(self, device: torch.device | str) -> EditBatch:
        """The same on a device."""
        local = {kind: rows.to(device) for kind, rows in self.local.items()}
        return EditBatch(self.edit.to(device), self.general.to(device), local)


@dataclass
class TrainingExample:
    """What one record contributes to a training step."""

    edit: Query
    general: list[Query]
    neighborhood: list[Query]
    unrelated: list[Query]


class TrainingExamples(Dataset[TrainingExample]):
    """
    Draws, for each record and epoch, which paraphrases and which locality texts a training step uses.

    The draw depends on seed, epoch and record alone, so that a resumed run sees what an unbroken one would have. A
    record without enough neighbours borrows other prompts of the same relation (they make harder locality texts than
    anything else), or, where there are none, any other prompts. If the records have one prompt between them, a
    neighbour is drawn again; without any there are no such rows.

    Args:
        records (`Sequence[EditRecord]`): The facts.
        questions (`Sequence[tuple[str, str]]`): Unrelated questions and answers; a record's own when there are none.
        general_rows (`int`, defaults to 1): Prompts or paraphrases an edit and step.
        neighborhood_rows (`int`, defaults to 2): Neighbouring prompts an edit and step.
        unrelated_rows (`int`, defaults to 1): Unrelated questions an edit and step.
        seed (`int`, defaults to 0): Seed of the draws.
    """

    def __init__(
        self,
        records: Sequence[EditRecord],
        questions: Sequence[tuple[str, str]] = (),
        general_rows: int = 1,
        neighborhood_rows: int = 2,
        unrelated_rows: int = 1,
        seed: int = 0,
    ):
        self.records = records
        self.questions = list(questions)
        self.general_rows = general_rows
        self.neighborhood_rows = neighborhood_rows
        self.unrelated_rows = unrelated_rows if questions or all(record.unrelated for record in records) else 0
        self.seed = seed
        self.epoch = 0
        prompts: dict[str | None, list[str]] = {}
        for record in records:
            prompts.setdefault(record.relation, []).append(record.prompt)
        everything = [record.prompt for record in records]
        if len({*everything}) == 1:
            everything = []
            self.neighborhood_rows = neighborhood_rows if all(record.neighborhood for record in records) else 0
        # A relation with a single prompt borrows from all.
        self.borrowed = {name: same if len({*same}) > 1 else everything for name, same in prompts.items()}

    def queries(self, epochs: int) -> Iterator[Query]:
        """
        Every text that the draws of the first epochs give; some more than once.

        Args:
            epochs (`int`): How many epochs.
        """
        for epoch in range(epochs):
            for index in range(len(self)):
                example = self.draw(index, epoch)
                yield example.edit
                yield from (*example.general, *example.neighborhood, *example.unrelated)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose draws `__getitem__` makes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> TrainingExample:
        return self.draw(index, self.epoch)

    def draw(self, index: int, epoch: int) -> TrainingExample:
        """What a record contributes in an epoch."""
        record = self.records[index]
        draw = random.Random(f"{self.seed}/{epoch}/{index}")
        wordings = [record.prompt, *record.paraphrases]
        general = _some(draw, record.paraphrases or wordings, self.general_rows)
        neighborhood = draw.sample(record.neighborhood, min(len(record.neighborhood), self.neighborhood_rows))
        neighborhood += [self._borrow(draw, record) for _ in range(self.neighborhood_rows - len(neighborhood))]
        unrelated = _some(draw, self.questions or record.unrelated, self.unrelated_rows)
        return TrainingExample(
            Query(record.prompt, record.target),
            [Query(prompt, record.target) for prompt in general],
            [Query(prompt) for prompt in neighborhood],
            [Query(prompt, answer) for prompt, answer in unrelated],
        )

    def _borrow(self, draw: random.Random, record: EditRecord) -> str:
        """Another prompt than the record's own."""
        prompts = self.borrowed[record.relation] or record.neighborhood
        while (prompt := draw.choice(prompts)) == record.prompt and self.borrowed[record.relation]:
            pass
        return prompt


class EditCollator:
    """
    Pads a list of [`TrainingExample`] into one [`EditBatch`].

    Args:
        encoder ([`Encoder`]): Tokenises and pads.
    """

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, examples: Sequence[TrainingExample]) -> EditBatch:
        local = {
            "neighborhood": [query for example in examples for query in example.neighborhood],
            "unrelated": [query for example in examples for query in example.unrelated],
        }
        return EditBatch(
            self.encoder([example.edit for example in examples]),
            self.encoder([query for example in examples for query in example.general]),
            {kind: self.encoder(queries) for kind, queries in local.items() if queries},
        )


def _some(draw: random.Random, items: Sequence[Any], count: int) -> list[Any]:
    """`count` items, different ones as far as there are."""
    if len(items) >= count:
        return draw.sample(list(items), count)
    return [draw.choice(items) for _ in range(count)]
