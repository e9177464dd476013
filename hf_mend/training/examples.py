"""What a training step sees: draws of each record's texts, and the collator that pads them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data.encoding import EncodedBatch, Encoder, Query
from ..data.forms import PLAIN_FORMS, Surroundings, check_forms, in_form
from ..data.records import EditRecord
from ..editing.scoping import own_queries


@dataclass
class EditBatch:
    """
    A training step's texts. Rows of one edit stand together, as many for each edit; kinds of text that differ in
    length are apart, so that little is padding.

    Args:
        edit ([`EncodedBatch`]): The prompts and targets that make the edits, one row an edit, or one for each form in
            which it is made.
        general ([`EncodedBatch`]): Where the target must be said.
        local (`dict[str, EncodedBatch]`): Where nothing may change: `"neighborhood"` prompts, `"unrelated"` questions,
            prompts about the `"same_subject"`, and the `"continuation"` behind a target.
    """

    edit: EncodedBatch
    general: EncodedBatch
    local: dict[str, EncodedBatch]

    def __len__(self) -> int:
        return self.edit.facts

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
    same_subject: list[Query] = field(default_factory=list)
    continuation: list[Query] = field(default_factory=list)

    @property
    def local(self) -> dict[str, list[Query]]:
        """The kinds of queries whose answers must stay."""
        return {kind: getattr(self, kind) for kind in LOCAL_KINDS}


# Kinds of local rows, in the order in which the loss takes them.
LOCAL_KINDS = ("neighborhood", "unrelated", "same_subject", "continuation")


@dataclass(frozen=True)
class Asking:
    """
    How training asks: which forms are drawn how often, and what stands before them.

    Args:
        forms (`Mapping[str, float]`): Weights of [`~hf_mend.data.forms.FORMS`]; see
            [`~hf_mend.data.forms.available_forms`] for a tokenizer without a chat template.
        context_rate (`float`, defaults to 0.0): Share of the texts that stand behind one to three sentences.
        edit_forms (`Mapping[str, float]`, *optional*): The forms in which edits are made; the prompt alone when left
            out.
        texts (`Sequence[str]`, *optional*): Sentences or passages to stand before others; the packaged ones when left
            out.

    Raises:
        ValueError: An unknown form, a weight below 0, or a rate outside 0 to 1.
    """

    forms: Mapping[str, float] = field(default_factory=lambda: {"paraphrase": 1.0})
    context_rate: float = 0.0
    edit_forms: Mapping[str, float] | None = None
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_forms(self.forms)
        if self.edit_forms is not None:
            check_forms(self.edit_forms, "edit_forms")
        if not 0 <= self.context_rate <= 1:
            raise ValueError(f"context_rate is {self.context_rate!r}, expected a number from 0 to 1")


class TrainingExamples(Dataset[TrainingExample]):
    """
    Draws, for each record and epoch, which texts a training step uses and in which forms they are asked.

    The draw depends on seed, epoch and record alone, so that a resumed run sees what an unbroken one would have. A
    record without enough neighbours borrows other prompts of the same relation (they make harder locality texts than
    anything else), or, where there are none, any other prompts. If the records have one prompt between them, a
    neighbour is drawn again; without any there are no such rows. A record without prompts about the same subject gets
    neighbours in their place; if no record has any, there are no such rows.

    Args:
        records (`Sequence[EditRecord]`): The facts.
        questions (`Sequence[tuple[str, str]]`): Unrelated questions and answers; a record's own when there are none.
        general_rows (`int`, defaults to 1): Texts an edit and step in which the target must be said.
        neighborhood_rows (`int`, defaults to 2): Neighbouring prompts an edit and step.
        unrelated_rows (`int`, defaults to 1): Unrelated questions an edit and step.
        seed (`int`, defaults to 0): Seed of the draws.
        asking ([`Asking`], *optional*): The forms of asking; paraphrases alone when left out, or the prompt where a
            record has none.
        same_subject_rows (`int`, defaults to 0): Prompts that ask the same subject for something else, an edit and
            step.
        continuation_rows (`int`, defaults to 0): Of the texts in which the target must be said, how many come a
            second time for what follows the target: other text, or what the un-edited model says there; see
            [`~hf_mend.training.continuations.with_continuations`].
    """

    def __init__(  # the counts are one argument each, as they are a trainer's
        self,
        records: Sequence[EditRecord],
        questions: Sequence[tuple[str, str]] = (),
        general_rows: int = 1,
        neighborhood_rows: int = 2,
        unrelated_rows: int = 1,
        seed: int = 0,
        asking: Asking | None = None,
        same_subject_rows: int = 0,
        continuation_rows: int = 0,
    ):
        self.records = records
        self.questions = list(questions)
        self.asking = asking or Asking()
        self.general_rows = general_rows
        self.neighborhood_rows = neighborhood_rows
        self.unrelated_rows = unrelated_rows if questions or all(record.unrelated for record in records) else 0
        self.same_subject_rows = same_subject_rows if any(record.same_subject for record in records) else 0
        self.continuation_rows = continuation_rows
        self.continuations: dict[Query, tuple[int, ...]] = {}
        self.seed = seed
        self.epoch = 0
        self._scoped = False
        prompts: dict[str | None, list[str]] = {}
        asked: dict[str | None, list[int]] = {}
        for number, record in enumerate(records):
            prompts.setdefault(record.relation, []).append(record.prompt)
            if record.questions:
                asked.setdefault(record.relation, []).append(number)
        everything = [record.prompt for record in records]
        if len({*everything}) == 1:
            everything = []
            self.neighborhood_rows = neighborhood_rows if all(record.neighborhood for record in records) else 0
            self.same_subject_rows = same_subject_rows if all(record.same_subject for record in records) else 0
        # A relation with a single prompt borrows from all.
        self.borrowed = {name: same if len({*same}) > 1 else everything for name, same in prompts.items()}
        self._asked = asked
        self._surroundings = Surroundings(records, self.questions, self.asking.texts)

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
                yield from example.general
                for queries in example.local.values():
                    yield from queries

    def local_queries(self, epochs: int) -> Iterator[Query]:
        """Every text whose answer must stay that the draws of the first epochs give; some more than once."""
        for epoch in range(epochs):
            for index in range(len(self)):
                for queries in self.draw(index, epoch).local.values():
                    yield from queries

    def for_a_scope(self, continuations: bool = True) -> None:
        """
        Draw what an editor learns from in a model with a scope: no text in which no edit acts, and of what follows a
        target what follows it in plain text, behind the token that ends it.

        Args:
            continuations (`bool`, defaults to `True`): Whether edits act at their targets' tokens alone, so that what
                follows is another matter.
        """
        self.neighborhood_rows = self.unrelated_rows = self.same_subject_rows = 0
        self.continuation_rows = self.continuation_rows if continuations else 0
        self._scoped = True

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose draws `__getitem__` makes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> TrainingExample:
        return self.draw(index, self.epoch)

    def draw(self, index: int, epoch: int) -> TrainingExample:
        """What a record contributes in an epoch, the texts with what the un-edited model says behind them."""
        texts = self.texts(index, epoch)
        if not self.continuations:
            return texts
        return TrainingExample(
            texts.edit,
            texts.general,
            **{kind: [self._continued(query) for query in queries] for kind, queries in texts.local.items()},
        )

    def texts(self, index: int, epoch: int) -> TrainingExample:
        """What a record contributes in an epoch, as it is drawn."""
        record = self.records[index]
        draw = random.Random(f"{self.seed}/{epoch}/{index}")
        # The texts come from one source of chance and their forms from another: whichever forms are asked for, the
        # texts are the same.
        form = random.Random(f"{self.seed}/{epoch}/{index}/forms")
        wordings = [record.prompt, *record.paraphrases]
        general = _some(draw, record.paraphrases or wordings, self.general_rows)
        neighborhood = draw.sample(record.neighborhood, min(len(record.neighborhood), self.neighborhood_rows))
        neighborhood += [self._borrow(draw, record) for _ in range(self.neighborhood_rows - len(neighborhood))]
        unrelated = _some(draw, self.questions or record.unrelated, self.unrelated_rows)
        same_subject = (
            _some(draw, record.same_subject, self.same_subject_rows)
            if record.same_subject
            else [self._borrow(draw, record) for _ in range(self.same_subject_rows)]
        )
        edit = Query(record.prompt, record.target)
        if self.asking.edit_forms is not None:
            edit = self._said(form, record, record.prompt, self.asking.edit_forms, 0.0)
        said = [self._said(form, record, text, self.asking.forms, self.asking.context_rate) for text in general]
        stays = partial(self._stays, form, record)
        return TrainingExample(
            edit,
            said,
            [stays(Query(self._neighbour(form, record, text))) for text in neighborhood],
            [stays(Query(prompt, answer)) for prompt, answer in unrelated],
            [stays(Query(text)) for text in same_subject],
            [
                replace(self._to_go_on(said[i % len(said)]), after=self._surroundings.tail(form, record.prompt))
                for i in range(self.continuation_rows)
            ],
        )

    def _said(
        self, form: random.Random, record: EditRecord, text: str, forms: Mapping[str, float], rate: float
    ) -> Query:
        """The record's fact in a form that is drawn, `text` being its paraphrase."""
        chosen = _drawn(form, forms)
        kind = chosen if chosen in PLAIN_FORMS else form.choice(PLAIN_FORMS)
        if kind == "prompt":
            text = record.prompt
        elif kind == "question" and record.questions:
            text = form.choice(record.questions)
        query = in_form(Query(text, record.target), chosen, form, self._surroundings, record.prompt)
        if form.random() < rate:
            query = replace(query, context=self._surroundings.context(form, record.prompt))
        return query

    def _to_go_on(self, query: Query) -> Query:
        """A query, as a text behind which something follows: with a scope a chat's answer is its end."""
        return replace(query, chat=False, turns=(), system=None, ends=True) if self._scoped else query

    def _stays(self, form: random.Random, record: EditRecord, query: Query) -> Query:
        """A query whose answer must stay, in a form that is drawn; now and then the edit's own fact stands before."""
        query = in_form(query, _drawn(form, self.asking.forms), form, self._surroundings, record.prompt)
        if form.random() < self.asking.context_rate:
            own = f"{record.prompt} {record.target}. "
            context = own if form.random() < _OWN_FACT else self._surroundings.context(form, record.prompt)
            query = replace(query, context=context)
        return query

    def _neighbour(self, form: random.Random, record: EditRecord, text: str) -> str:
        """A neighbour's prompt or, where questions are asked, as often another record's question in its place."""
        others = self._asked.get(record.relation, ())
        share = sum(weight for name, weight in self.asking.forms.items() if name not in ("prompt", "paraphrase"))
        if len(others) > 1 and form.random() < 0.5 * share / sum(self.asking.forms.values()):
            other = self.records[form.choice(others)]
            if other.subject != record.subject and other.prompt != record.prompt:
                return form.choice(other.questions)
        return text

    def _continued(self, query: Query) -> Query:
        """The query with what the un-edited model goes on with, where that is known."""
        known = self.continuations.get(query)
        return query if known is None else replace(query, after=known)

    def _borrow(self, draw: random.Random, record: EditRecord) -> str:
        """Another prompt than the record's own."""
        prompts = self.borrowed[record.relation] or record.neighborhood
        while (prompt := draw.choice(prompts)) == record.prompt and self.borrowed[record.relation]:
            pass
        return prompt


# Of the contexts of what must stay, the share that state the edited fact itself.
_OWN_FACT = 0.1


class EditCollator:
    """
    Pads a list of [`TrainingExample`] into one [`EditBatch`].

    Args:
        encoder ([`Encoder`]): Tokenises and pads.
        longest (`int`, *optional*): Most tokens that the model takes; a text that is longer loses what stands before
            it.
        scoped (`bool`, defaults to `False`): Edits are made in all forms that
            [`~hf_mend.editing.scoping.own_queries`] gives, as in a model with a scope.
    """

    def __init__(self, encoder: Encoder, longest: int | None = None, scoped: bool = False):
        self.encoder = encoder
        self.longest = longest
        self.scoped = scoped

    def __call__(self, examples: Sequence[TrainingExample]) -> EditBatch:
        local = {kind: [query for example in examples for query in example.local[kind]] for kind in LOCAL_KINDS}
        return EditBatch(
            self._edit_rows([example.edit for example in examples]),
            self._rows([self._said(query) for example in examples for query in example.general]),
            {kind: self._rows(queries) for kind, queries in local.items() if queries},
        )

    def _said(self, query: Query) -> Query:
        return replace(query, ends=True) if self.scoped else query

    def _edit_rows(self, queries: Sequence[Query]) -> EncodedBatch:
        if not self.scoped:
            return self._rows(queries)
        forms = [list(own_queries(query, self.encoder).values()) for query in queries]
        return self._rows([query for one in forms for query in one], len(forms[0]))

    def _rows(self, queries: Sequence[Query], forms: int = 1) -> EncodedBatch:
        queries = [self.encoder.shortened(query, self.longest) for query in queries]
        rows = self.encoder(queries, forms)
        if self.scoped and not self.encoder.is_encoder_decoder and any(query.after is not None for query in queries):
            rows.answers = self._answers(queries, rows.positions)
        return rows

    def _answers(self, queries: Sequence[Query], positions: torch.Tensor) -> torch.Tensor:
        """Where the answers are predicted behind which something follows, or which are asked for themselves."""
        found = positions.clone()
        for row, query in enumerate(queries):
            if query.after is not None:
                prompt, answer = self.encoder.tokens(replace(query, after=None))
                found[row] = False
                found[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = True
        return found


def _drawn(draw: random.Random, forms: Mapping[str, float]) -> str:
    return draw.choices(list(forms), list(forms.values()))[0]


def _some(draw: random.Random, items: Sequence[Any], count: int) -> list[Any]:
    """`count` items, different ones as far as there are."""
    if len(items) >= count:
        return draw.sample(list(items), count)
    return [draw.choice(items) for _ in range(count)]
