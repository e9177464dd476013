"""The score of targets by logits: log-probability, and the tokens that the model chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..bases.fused import fetched
from ..data.encoding import IGNORE, EncodedBatch


@dataclass
class Answers:
    """
    The model's answers, one a row.

    Args:
        log_probability (`list[float]`): Log-probability of the whole target.
        tokens (`list[list[int]]`): The model's own choice at each of the target's tokens, teacher-forced.
        correct (`list[list[bool]]`): Which of those choices are the target's tokens.
        min_log_probability (`list[float]`): Log-probability of the target's least likely token.
        following (`list[int | None]`): The token that the model chooses behind the target, where it was asked for.
    """

    log_probability: list[float]
    tokens: list[list[int]]
    correct: list[list[bool]]
    min_log_probability: list[float]
    following: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.following = self.following or [None] * len(self.tokens)

    @property
    def all_correct(self) -> torch.Tensor:
        """The rows that say their whole target, `(rows,)`, bool."""
        return torch.tensor([all(correct) for correct in self.correct], dtype=torch.bool)

    @property
    def finite(self) -> list[bool]:
        """The rows whose logits are finite."""
        return [math.isfinite(value) for value in self.log_probability]

    def rank(self, row: int) -> tuple[bool, float]:
        """Return a row's order of merit: all tokens correct, then the target's probability."""
        return all(self.correct[row]), self.log_probability[row]


def score_targets(rows: EncodedBatch, logits: torch.Tensor) -> Answers:
    """
    Score the targets of some rows.

    Args:
        rows ([`EncodedBatch`]): Prompts and targets.
        logits (`torch.Tensor` of shape `(positions, vocab)`): The model's logits at the rows' positions.
    """
    return score_and_fetch(rows, logits)[0]


def score_and_fetch(
    rows: EncodedBatch, logits: torch.Tensor, further: Sequence[torch.Tensor] = ()
) -> tuple[Answers, list[torch.Tensor]]:
    """
    Score the targets of some rows, as [`score_targets`] does, and return further tensors in the host's memory: it
    waits once for all of them.
    """
    labels = rows.places.labels.to(logits.device)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    chosen, log_probabilities, *rest = fetched([logits.argmax(-1), log_probabilities, *further])
    # Where logits overflow, as large steps on a float16 base may let them, nothing is worse.
    log_probabilities = log_probabilities.nan_to_num(nan=-math.inf)
    labels = torch.tensor([label for said in rows.places.said for label in said], dtype=torch.long)
    # What has no label, as behind a target, counts for nothing.
    log_probabilities = torch.where((labels == IGNORE) & log_probabilities.isfinite(), 0.0, log_probabilities)
    correct = (chosen == labels) & log_probabilities.isfinite()
    per_row = rows.places.counts
    answers = Answers(
        [float(part.sum()) for part in log_probabilities.split(per_row)],
        [part.tolist() for part in chosen.split(per_row)],
        [part.tolist() for part in correct.split(per_row)],
        [float(part.min()) for part in log_probabilities.split(per_row)],
    )
    return (answers if rows.forms == 1 else _of_facts(answers, rows.forms)), rest


def _of_facts(answers: Answers, forms: int) -> Answers:
    """
    Return one answer a fact: the tokens of its first form, its mean log-probability over the forms, and whether all
    forms are correct.
    """
    runs = [slice(start, start + forms) for start in range(0, len(answers.tokens), forms)]
    return Answers(
        [sum(answers.log_probability[run]) / forms for run in runs],
        [answers.tokens[run.start] for run in runs],
        [[one for correct in answers.correct[run] for one in correct] for run in runs],
        [min(answers.min_log_probability[run]) for run in runs],
    )


def chosen_answers(first: torch.Tensor, one: Answers, other: Answers) -> Answers:
    """Return the rows of `one` where `first`, `(rows,)`, is set, and those of `other` elsewhere."""
    return _picked([(one if flag else other, i) for i, flag in enumerate(first.tolist())])


def placed_answers(facts: torch.Tensor, some: Answers, others: Answers) -> Answers:
    """Return the answers `some` in the places of `facts`, `(facts,)`, and those of `others` elsewhere."""
    place = {fact: i for i, fact in enumerate(facts.tolist())}
    picks = [(some, place[i]) if i in place else (others, i) for i in range(len(others.tokens))]
    return _picked(picks)


def _picked(picks: Sequence[tuple[Answers, int]]) -> Answers:
    """Return the answers that are named, each by where it stands and its number there."""
    return Answers(
        [one.log_probability[i] for one, i in picks],
        [one.tokens[i] for one, i in picks],
        [one.correct[i] for one, i in picks],
        [one.min_log_probability[i] for one, i in picks],
        [one.following[i] for one, i in picks],
    )


def without_following(answers: Answers) -> Answers:
    """Return the answers of rows whose last position is that of what follows the target: see `following`."""
    return Answers(
        answers.log_probability,
        [tokens[:-1] for tokens in answers.tokens],
        [correct[:-1] for correct in answers.correct],
        answers.min_log_probability,
        [tokens[-1] for tokens in answers.tokens],
    )
