"""The requests of one call, and what is known of them so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from ..bases.limits import longest_input
from ..data.encoding import EncodedBatch, Encoder, Query, length_batches
from ..edits.active import ActiveEdits
from ..edits.edit import Edit
from ..methods import IterativeMethod
from ..scope.gate import ScopeGate
from .batch_state import FoundUpdates
from .budget import Budget, in_passes
from .context import EditingContext
from .edit_result import EditResult
from .proposals import SearchOptions
from .requests import EditRequest
from .scoping import own_queries
from .scoring import Answers, without_following
from .together import Together


Found = TypeVar("Found")


@dataclass(frozen=True)
class AfterEdits:
    """
    What is done when the edits of a call are made.

    Args:
        keep_failed (`bool`, defaults to `True`): Keep edits that did not take.
        check_earlier (`int`, defaults to 0): So many of the latest earlier edits are asked again.
    """

    keep_failed: bool = True
    check_earlier: int = 0


@dataclass
class Call:
    """
    The requests of one call, and their results.

    Args:
        context ([`EditingContext`]): The model and the method.
        encoder ([`Encoder`]): Tokenises and pads.
        active ([`ActiveEdits`]): The model's edits.
        requests (`list[EditRequest]`): The requests.
        options ([`SearchOptions`]): The options of the search for an update.
        budget ([`Budget`]): How much goes into one pass.
        made_by (`str`): The editor's id.
        gate ([`~hf_mend.scope.gate.ScopeGate`], *optional*): Decides where edits act.
        after ([`AfterEdits`]): What is done when the edits are made.
        together ([`Together`]): This process among those that make the call. Each has the results of its share, and
            the edits of all.
        now (`dict[int, tuple[Answers, int]]`): A request's number -> the model's answers to it while an earlier edit
            of its prompt acts, and the row of the answers.
        kept (`list[tuple[list[int], FoundUpdates]]`): The numbers of the requests that were found in one batch, with
            their texts and what lies below the edited layers, which no edit changes.
        said (`dict[int, tuple[Answers, int]]`): A request's number -> the model's last answers to it, and their row.
        before (`dict[int, torch.Tensor]`): A request's number -> with scopes, the keys at its prompt's tokens before
            the one that asks.
        within (`dict[int, torch.Tensor]`): A request's number -> the numbers in the bank of the edits that act at
            these, of those requests where one does.
        results, edits: A request's number -> its result, and its edit if one was made.
    """

    context: EditingContext
    encoder: Encoder
    active: ActiveEdits
    requests: list[EditRequest]
    options: SearchOptions
    budget: Budget
    made_by: str
    gate: ScopeGate | None = None
    after: AfterEdits = AfterEdits()
    together: Together = Together()
    now: dict[int, tuple[Answers, int]] = field(default_factory=dict)
    kept: list[tuple[list[int], FoundUpdates]] = field(default_factory=list)
    said: dict[int, tuple[Answers, int]] = field(default_factory=dict)
    before: dict[int, torch.Tensor] = field(default_factory=dict)
    within: dict[int, torch.Tensor] = field(default_factory=dict)
    results: dict[int, EditResult] = field(default_factory=dict)
    edits: dict[int, Edit] = field(default_factory=dict)

    @property
    def longest(self) -> int | None:
        """The most tokens that the model takes."""
        return longest_input(self.context.split.model.config)

    def passes(self, numbers: Sequence[int], run: Callable[[list[int]], Found]) -> Iterator[tuple[list[int], Found]]:
        """Run some of the requests, by number, in passes of like lengths, as large as memory allows."""
        return in_passes(self.budget, numbers, self.lengths(numbers), run)

    def in_as_many_forms(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return some of the requests, by number, in groups whose edits are made in as many forms."""
        groups: dict[int, list[int]] = {}
        for i in numbers:
            groups.setdefault(len(self.forms(self.requests[i])) if self.ends else 1, []).append(i)
        return [*groups.values()]

    def batches(self, requests: Sequence[EditRequest]) -> list[list[int]]:
        """Return the places of some requests in batches of like lengths, which are all in memory together."""
        return [*length_batches(self._lengths(requests), self.budget.most_rows, self.budget.tokens)]

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Return the number of tokens of some of the requests, by number, in all forms in which edits are made."""
        return self._lengths([self.requests[i] for i in numbers])

    def _lengths(self, requests: Sequence[EditRequest]) -> list[int]:
        found = []
        for one in requests:
            forms = self.forms(one).values() if self.ends else [one.query]
            found.append(len(forms) * max(sum(map(len, self.encoder.tokens(form))) for form in forms))
        return found

    def rows(self, numbers: Sequence[int]) -> EncodedBatch:
        """Return the texts by which some of the requests' edits are made."""
        if not self.ends:
            queries = [self.requests[i].query for i in numbers]
            looked_at = self.options.check and self.gate is None
            return self.encoder.with_further(queries) if looked_at else self.encoder(queries)
        forms = [list(self.forms(self.requests[i]).values()) for i in numbers]
        return self.encoder([query for one in forms for query in one], forms=len(forms[0]))

    def forms(self, request: EditRequest, paraphrases: Sequence[str] = ()) -> dict[str, Query]:
        """Return the forms in which a request's edit is made, and of its paraphrases those that give it keys."""
        paraphrases = request.paraphrases if request.in_paraphrases else paraphrases
        return own_queries(
            request.query, self.encoder, paraphrases, self.context.method.in_further_forms, self.longest
        )

    @torch.no_grad()
    def answers(self, queries: Sequence[Query]) -> Answers:
        """Return the model's answers to queries, under its edits."""
        return self.context.answers(self.encoder(queries).to(self.context.split.device))

    @property
    def ends(self) -> bool:
        """Whether an edit is made with the token that ends its answer, so that the answer's last word is whole."""
        return self.gate is not None and not isinstance(self.context.method, IterativeMethod)

    @torch.no_grad()
    def answers_to(self, numbers: Sequence[int]) -> dict[int, tuple[Answers, int]]:
        """
        Return the model's answers to some of the requests, by number: the answers of a batch, and the row. Where an
        edit is made without the token that ends its answer, they tell what follows the target.
        """
        found: dict[int, tuple[Answers, int]] = {}
        for batch, one in self.kept:
            if set(batch) <= {*numbers}:
                answers, _ = self.context.answers_and((), one.rows, one.hidden, behind=one.further)
                found.update({i: (answers, row) for row, i in enumerate(batch)})
        left = [i for i in numbers if i not in found]
        if not self.ends:
            return found | self.answers_beyond(left)
        for batch, answers in self.passes(left, lambda some: self.answers([self.requests[i].query for i in some])):
            found.update({i: (answers, row) for row, i in enumerate(batch)})
        return found

    @torch.no_grad()
    def answers_beyond(self, numbers: Sequence[int]) -> dict[int, tuple[Answers, int]]:
        """
        Return the model's answers to some of the requests, by number, as `answers_to` does, with what follows the
        targets, in a pass of their own.
        """

        def run(batch: list[int]) -> Answers:
            rows = self.encoder.with_further([self.requests[i].query for i in batch]).further
            assert rows is not None
            return without_following(self.context.answers(rows.to(self.context.split.device)))

        found = {}
        for batch, answers in self.passes(numbers, run):
            found.update({i: (answers, row) for row, i in enumerate(batch)})
        return found

    def others(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return those of some edits that are not this call's."""
        made = {edit.id for edit in self.edits.values()}
        return [edit for edit in edits if edit.id not in made]

    def in_order(self) -> list[Edit]:
        """Return the call's edits in the order of their requests."""
        return [self.edits[i] for i in sorted(self.edits)]

    def target_length(self, number: int) -> int:
        """Return how many tokens the target of a request has, without the one that ends the answer."""
        return len(self.encoder.tokens(replace(self.requests[number].query, ends=False))[1])
