"""The keys of all edits that act, in one matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch

from ..data.places import joined, on_device
from ..edits.edit import Edit
from ..edits.growing import GrowingRows
from .network import (
    MEANING_WIDTH,
    key_parts,
    key_scores,
    key_words,
    least_cosines,
    may_ask,
    may_pass,
    missing_words,
    other_words,
    part_scores,
)
from .penalties import least_near, penalty_of, room_above


Found = TypeVar("Found")

# Tokens whose scores with all keys are in memory at once, by the number of keys.
_SCORES_AT_ONCE = 1 << 24
# Less than any score is past any threshold.
_OUT = -2.0
# Scores as near as this are one: rounding in half precision, in passes of other texts.
_ONE = 1e-4


def _in_full_precision(method: Callable[..., Found]) -> Callable[..., Found]:
    """Let a method that takes keys compare them as they are, also where its caller casts to less."""

    @wraps(method)
    def exact(*args: Any, **kwargs: Any) -> Found:
        keys = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))
        with torch.autocast(keys.device.type, enabled=False):
            return method(*args, **kwargs)

    return exact


class KeyBank:
    """
    Find the edit that a text asks for. A bank never changes; others are made from it at the cost of what differs.

    Args:
        edits (`Sequence[Edit]`): The edits, each with a scope.
    """

    def __init__(self, edits: Sequence[Edit]):
        self.ids: list[str] = []  # by number; those that are gone keep theirs
        self.numbers: dict[str, int] = {}  # of the edits that are there
        self._owner = GrowingRows(torch.zeros(0, dtype=torch.long))
        self._target = GrowingRows(torch.zeros(0, dtype=torch.long))  # number of what the edit says
        self._targets: dict[str, int] = {}
        self._thresholds = GrowingRows(torch.zeros(0, dtype=torch.float32))  # infinite for an edit that is gone
        self._parts: list[GrowingRows] = []  # of the keys, and behind them their words
        self._excluded: dict[int, torch.Tensor] = {}
        # Keys of texts that only name what an edit is about, without words, and their edits' numbers.
        self._contrasts = GrowingRows(torch.zeros(0, MEANING_WIDTH, dtype=torch.float16))
        self._contrasted = GrowingRows(torch.zeros(0, dtype=torch.long))
        # A device -> keys, thresholds and owners there. What asks of one edit reads the host's own.
        self._elsewhere: dict[torch.device, list[GrowingRows]] = {}
        self._add(edits)

    def _add(self, edits: Sequence[Edit]) -> None:
        first = len(self.ids)
        scopes = [edit.scope for edit in edits if edit.scope is not None]
        if not scopes:
            return
        self.ids = [*self.ids, *(edit.id for edit in edits)]
        self.numbers = self.numbers | {edit.id: first + i for i, edit in enumerate(edits)}
        keys = joined([one.keys for one in scopes])
        parts = [*key_parts(keys), key_words(keys)]
        before = self._parts or [GrowingRows(part.new_zeros(0, part.shape[1])) for part in parts]
        self._parts = [rows.extended([_on(part, rows)]) for rows, part in zip(before, parts, strict=True)]
        thresholds = torch.cat([one.thresholds for one in scopes]).float()
        self._thresholds = self._thresholds.extended([_on(thresholds, self._thresholds)])
        counts = torch.tensor([len(one.keys) for one in scopes])
        owner = torch.arange(first, first + len(scopes)).repeat_interleave(counts)
        self._owner = self._owner.extended([_on(owner, self._owner)])
        new = dict.fromkeys(edit.target for edit in edits if edit.target not in self._targets)
        self._targets = self._targets | {target: len(self._targets) + i for i, target in enumerate(new)}
        target = torch.tensor([self._targets[edit.target] for edit in edits]).repeat_interleave(counts)
        self._target = self._target.extended([_on(target, self._target)])
        excluded = {first + i: one.excluded.float() for i, one in enumerate(scopes) if len(one.excluded)}
        if excluded:
            self._excluded = self._excluded | excluded
        contrasts = [one.contrasts for one in scopes if len(one.contrasts)]
        if contrasts:
            counts = torch.tensor([len(one.contrasts) for one in scopes])
            owner = torch.arange(first, first + len(scopes)).repeat_interleave(counts)
            self._contrasts = self._contrasts.extended([_on(joined(contrasts).half(), self._contrasts)])
            self._contrasted = self._contrasted.extended([_on(owner, self._contrasted)])

    def extended(self, edits: Sequence[Edit]) -> KeyBank:
        """Return the bank of these edits and further ones."""
        new = copy.copy(self)
        new._add(edits)
        return new

    def without(self, ids: Sequence[str]) -> KeyBank:
        """Return the bank without some of the edits."""
        if not ids:
            return self
        new, gone = copy.copy(self), {self.numbers[one] for one in ids}
        new.numbers = {one: number for one, number in self.numbers.items() if number not in gone}
        new._excluded = {number: keys for number, keys in self._excluded.items() if number not in gone}
        owner, thresholds = self._owner.rows, self._thresholds.rows
        is_gone = torch.zeros(len(self.ids), dtype=torch.bool, device=owner.device)
        is_gone[torch.tensor(sorted(gone), device=owner.device)] = True
        new._thresholds = GrowingRows(thresholds.masked_fill(is_gone[owner], math.inf))
        new._elsewhere = {}
        return new if 2 * len(new.numbers) >= len(new.ids) else new._compacted()

    def _compacted(self) -> KeyBank:
        """Return the same bank without the room of the edits that are gone."""
        new = KeyBank([])
        new.ids = [*self.numbers]
        new.numbers = {one: i for i, one in enumerate(new.ids)}
        there = self._thresholds.rows < math.inf
        renumbered = torch.full((len(self.ids),), -1, device=there.device)
        renumbered[torch.tensor([*self.numbers.values()], dtype=torch.long, device=there.device)] = torch.arange(
            len(new.ids), device=there.device
        )
        new._owner = GrowingRows(renumbered[self._owner.rows[there]])
        new._target, new._targets = GrowingRows(self._target.rows[there]), self._targets
        new._thresholds = GrowingRows(self._thresholds.rows[there])
        new._parts = [GrowingRows(part.rows[there]) for part in self._parts]
        new._excluded = {int(renumbered[number]): keys for number, keys in self._excluded.items()}
        numbers = renumbered[self._contrasted.rows]
        new._contrasts = GrowingRows(self._contrasts.rows[numbers >= 0])
        new._contrasted = GrowingRows(numbers[numbers >= 0])
        return new

    def __len__(self) -> int:
        return len(self.numbers)

    def _on(self, device: torch.device) -> _Keys:
        """Return the keys on a device, where they stay: those of further edits come behind them."""
        own = [self._owner, self._target, self._thresholds, self._contrasts, self._contrasted, *self._parts]
        held = own
        if self._owner.rows.device != device:
            held = self._elsewhere.get(device) or [GrowingRows(one.rows[:0].to(device)) for one in own]
            if len(held[0].rows) < len(self._owner.rows):
                more = [on_device(one.rows[len(there.rows) :], device) for one, there in zip(own, held, strict=True)]
                held = [one.extended([rows]) for one, rows in zip(held, more, strict=True)]
                self._elsewhere = {**self._elsewhere, device: held}
        owner, target, thresholds, contrasts, contrasted, *parts, words = (one.rows for one in held)
        return _Keys(parts, words, owner, target, thresholds, self._excluded, contrasts, contrasted, len(self.ids))

    @_in_full_precision
    def choose(self, queries: torch.Tensor, strictness: float = 0.0, only: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the number of the edit that each text asks for, -1 where it asks for none.

        Args:
            queries (`torch.Tensor` of shape `(texts, width)`): The texts' keys.
            strictness (`float`, defaults to 0.0): What is added to every threshold.
            only (`torch.Tensor` of shape `(texts,)`, *optional*): The number of the one edit that each may ask for.
        """
        if not self.numbers:
            return queries.new_full((len(queries),), -1, dtype=torch.long)
        held = self._on(queries.device)
        size = max(1, _SCORES_AT_ONCE // len(held.owner))
        if len(queries) <= size:
            return held.choose(queries, only, strictness)
        parts = queries.split(size)
        allowed = [None] * len(parts) if only is None else only.to(queries.device).split(size)
        return torch.cat([held.choose(*pair, strictness) for pair in zip(parts, allowed, strict=True)])

    @_in_full_precision
    def margins(
        self, queries: torch.Tensor, own: Sequence[str], alone: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return how far texts are past what they have to reach: for their own edits, and for the nearest others.

        Args:
            queries (`torch.Tensor` of shape `(texts, width)`): The texts' keys.
            own (`Sequence[str]`): Of each text, the id of its own edit.
            alone (`bool`, defaults to `False`): For its own edit as if the text's edit were the only one.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Two of shape `(texts,)`; -2 where there is no such edit, or a text is
            excluded, or more like what only names what the edit is about.
        """
        none = queries.new_full((len(queries),), _OUT)
        if not self.numbers:
            return none, none.clone()
        held = self._on(queries.device)
        mine = torch.tensor([self.numbers.get(one, -1) for one in own], device=queries.device)
        size = max(1, _SCORES_AT_ONCE // len(held.owner))
        found = []
        for part, numbered in zip(queries.split(size), mine.split(size), strict=True):
            over = held.over(part, slice(None))
            is_own = held.owner == numbered[:, None]
            pair = []
            for group, with_rivals in (
                (over.masked_fill(~is_own, _OUT), not alone),
                (over.masked_fill(is_own, _OUT), True),
            ):
                best = group.max(-1)
                among = over if with_rivals else group.masked_fill(~is_own, _OUT)
                pair.append(best.values - held.penalty(part, among, best.indices))
            found.append(pair)
        own_margins, others = (torch.cat(parts).clamp(min=_OUT) for parts in zip(*found, strict=True))
        return own_margins, others

    @_in_full_precision
    def scores(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Return each edit's score with a text, and what it has to reach, by number: the threshold of the key that it is
        nearest to passing, with what its rivals and other names add, and whatever the strictness, the score of the
        nearest contrast.

        Args:
            query (`torch.Tensor` of shape `(width,)`): The text's key.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Three of shape `(numbers,)`.
        """
        held = self._on(query.device)
        scores = part_scores(query[None], held.parts)[0]
        over = scores - held.thresholds
        places = torch.arange(len(over), device=over.device)
        most = over.new_full((len(self.ids),), -math.inf).scatter_reduce(0, held.owner, over, "amax")
        first = torch.where(over == most[held.owner], places, len(over))
        best = first.new_full((len(self.ids),), len(over)).scatter_reduce(0, held.owner, first, "amin")
        acting = held.over(query[None], slice(None))[0]  # as `over`, but for excluded texts
        by_target = over.new_full((len(self._targets),), _OUT).scatter_reduce(0, held.target, acting, "amax")
        by_target = torch.cat([by_target, over.new_full((1,), _OUT)])  # no rival, where all say the same
        (first_over, second_over), (first_target, _) = by_target.topk(2)
        rivals = torch.where(held.target[best] == first_target, second_over, first_over)
        near = (acting > least_near(held.thresholds)).to(over)
        same = over.new_zeros(len(self._targets)).index_add(0, held.target, near)[held.target[best]]
        thresholds, pair = held.thresholds[best], (query, held.words[best])
        added = penalty_of(rivals, thresholds, missing_words(*pair), other_words(*pair), near.sum() - same)
        return scores[best], thresholds + added, held.contrast_scores(query[None], held.owner)[0, best]

    @_in_full_precision
    def nearest(self, edit_id: str, keys: torch.Tensor) -> tuple[str | None, float]:
        """
        Return the id of the other edit that has a key most like one of an edit's, and how alike they are.

        Args:
            edit_id (`str`): The edit's id.
            keys (`torch.Tensor` of shape `(keys, width)`): Its keys, in the host's memory.
        """
        if len(self.numbers.keys() - {edit_id}) == 0:
            return None, 0.0
        held = self._on(self._owner.rows.device)
        others = (held.owner != self.numbers.get(edit_id, -1)) & (held.thresholds < math.inf)
        if keys.device != held.owner.device:
            keys = keys.to(held.owner.device)
        scores = part_scores(keys, held.parts).amax(0).masked_fill(~others, -1.0)
        best = int(scores.argmax())
        return self.ids[int(held.owner[best])], float(scores[best])


@dataclass(frozen=True, eq=False)
class _Keys:
    """
    All keys on one device: parts and words `(keys, width)`, owner, number of its target and threshold,
    `(keys,)`, and number -> excluded keys; the contrasts of the `count` edits, `(contrasts, MEANING_WIDTH)`, and their
    edits' numbers, `(contrasts,)`.
    """

    parts: Sequence[torch.Tensor]
    words: torch.Tensor
    owner: torch.Tensor
    target: torch.Tensor
    thresholds: torch.Tensor
    excluded: Mapping[int, torch.Tensor]
    contrasts: torch.Tensor
    contrasted: torch.Tensor
    count: int

    def choose(self, queries: torch.Tensor, only: torch.Tensor | None, strictness: float) -> torch.Tensor:
        none = queries.new_full((len(queries),), -1, dtype=torch.long)
        # Of tens of thousands of keys a few are worth a whole look; outside every scope none is. The shipped scope's
        # last part tells them apart, where a fifth of all keys are near in the first.
        needed = self.thresholds + strictness
        cosines = least_cosines(queries, self.parts[-1:])  # (texts, keys)
        passing = may_pass(cosines, needed).nonzero()[:, 0]
        if not len(passing):
            return none
        if len(queries) == 1:
            return self._choose(queries, cosines, only, strictness)
        # Of a prompt's tokens few may ask for anything.
        asking = may_ask(cosines[:, passing], needed[passing]).nonzero()[:, 0]
        if not len(asking):
            return none
        allowed = None if only is None else only[asking]
        return none.index_copy(0, asking, self._choose(queries[asking], cosines[asking], allowed, strictness))

    def _choose(
        self, queries: torch.Tensor, cosines: torch.Tensor, only: torch.Tensor | None, strictness: float
    ) -> torch.Tensor:
        """Return the number of the edit that each text asks for, by a look at all keys that are near to any."""
        none = queries.new_full((len(queries),), -1, dtype=torch.long)
        # Rivals count, too, from as far below their thresholds on as a perfect score is above.
        least = torch.minimum(self.thresholds + strictness, self.thresholds - room_above(self.thresholds))
        near = may_pass(cosines, least).nonzero()[:, 0]
        near = near[may_pass(least_cosines(queries, [part[near] for part in self.parts]), least[near])]
        if not len(near):
            return none
        over, owner = self.over(queries, near), self.owner[near]
        if only is not None:
            over = over.masked_fill(owner != only[:, None], _OUT)
        # Of keys that are one to the scope, the later edit's: what is said last holds.
        best = over.amax(-1)
        index = len(owner) - 1 - (over >= best[:, None] - _ONE).flip(-1).int().argmax(-1)
        past = best - self.penalty(queries, over, index, near)
        return torch.where(past >= strictness, owner[index], -1)

    def penalty(
        self, queries: torch.Tensor, over: torch.Tensor, best: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Return what is added to the thresholds of texts' best keys, `(texts,)`; see [`penalty_of`].

        Args:
            queries (`torch.Tensor` of shape `(texts, width)`): The texts' keys.
            over (`torch.Tensor` of shape `(texts, keys)`): As [`over`] returns them.
            best (`torch.Tensor` of shape `(texts,)`): The place of the best key among these.
            keys (`torch.Tensor` of shape `(keys,)`, *optional*): Which keys these are; all when missing.
        """
        target, thresholds = self.target, self.thresholds
        number = best if keys is None else keys[best]
        if keys is not None:
            target, thresholds = target[keys], thresholds[keys]
        rivals = over.masked_fill(target == target[best][:, None], _OUT)
        count = (rivals > least_near(thresholds)).sum(-1)
        pair = queries, self.words[number]
        return penalty_of(rivals.amax(-1), thresholds[best], missing_words(*pair), other_words(*pair), count)

    def over(self, queries: torch.Tensor, keys: slice | torch.Tensor) -> torch.Tensor:
        """Return how far texts are past the thresholds of some keys, `(texts, keys)`."""
        owner, scores = self.owner[keys], part_scores(queries, [part[keys] for part in self.parts])
        over = scores - self.thresholds[keys]
        for number in self.excluded.keys() & owner.tolist() if self.excluded else ():
            # An excluded text that is at least as near as the key keeps the edit out.
            own = owner == number
            nearest = key_scores(queries, self.excluded[number].to(queries.device)).max(-1).values
            over[:, own] = torch.where(scores[:, own] > nearest[:, None], over[:, own], _OUT)
        if len(self.contrasts):
            # A text that is one of the edit's own, and a contrast too, asks for the edit.
            over = over.masked_fill(scores < self.contrast_scores(queries, owner) - _ONE, _OUT)
        return over.clamp(min=_OUT)

    def contrast_scores(self, queries: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """
        Return how much texts are like the nearest text that only names what an edit is about, `(texts, keys)`, -2
        where there is none.

        Args:
            queries (`torch.Tensor` of shape `(texts, width)`): The texts' keys.
            owner (`torch.Tensor` of shape `(keys,)`): The numbers of the edits, of each key.
        """
        there = owner.new_zeros(self.count, dtype=torch.bool)
        there[owner] = True
        (rows,) = there[self.contrasted].nonzero(as_tuple=True)
        if not len(rows):
            return queries.new_full((len(queries), len(owner)), _OUT)
        place = there.cumsum(0) - 1  # of each edit among these
        scores = part_scores(queries, key_parts(self.contrasts[rows]))
        nearest = scores.new_full((len(queries), int(place[-1]) + 1), _OUT)
        nearest = nearest.scatter_reduce(1, place[self.contrasted[rows]].expand_as(scores), scores, "amax")
        return nearest[:, place[owner]]


def _on(tensor: torch.Tensor, rows: GrowingRows) -> torch.Tensor:
    return tensor if tensor.device == rows.rows.device else tensor.to(rows.rows.device)
