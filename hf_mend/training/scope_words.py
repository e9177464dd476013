"""Learning which words matter, those said in whatever way the same is asked for, and which name a text's subject."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..scope.network import ScopeNetwork
from ..scope.words import place_within, words_in
from .scope_examples import NONE, Mark, MarkedText
from .scope_texts import ScopeTexts


# Facts that are read, drawn at random: the first ones are of few kinds.
_FACTS = 4000
_PASSES, _STEPS, _TOKENS, _LEARNING_RATE = 4, 200, 1024, 3e-3  # at least so many passes and steps
# Forms of asking for a fact, and texts in which nothing asks for it.
_ASKS, _STAYS = ("prompt", "chat", "said"), ("neighborhood", "unrelated")
# Words before a subject that are none of it; further back, another text may have its own.
_BEFORE = 8
# Forms that give a key.
_KEYS = ("prompt", "chat")


def learn_words(scope: ScopeNetwork, data: ScopeTexts, seed: int = 0) -> None:
    """
    Fit the part of a scope that tells how much each token's word matters, a logistic regression on its hidden state:
    how much more often it is said in other forms of asking for the same than in texts that must stay.

    Args:
        scope ([`ScopeNetwork`]): The scope, which knows what hidden states are ordinary.
        data ([`ScopeTexts`]): The texts of its training.
        seed (`int`, defaults to 0): Seed of the draw and of the order.
    """
    hidden, wanted = [], []
    for fact in random.Random(seed).sample(range(len(data)), min(_FACTS, len(data))):
        for text, mark, shares in _shares(data.texts[fact], data):
            assert text.hidden is not None
            hidden.append(text.hidden[: mark.position + 1])
            wanted += shares
    if not wanted:
        return
    _fit(scope.word, scope.log_odds, torch.cat(hidden), torch.tensor(wanted), seed)


def learn_subjects(scope: ScopeNetwork, data: ScopeTexts, seed: int = 0) -> None:
    """
    Fit the part of a scope that tells which words name what a text is about, a logistic regression on the hidden state
    of each word's last token. Facts whose subject is not known, or not in their prompts, teach nothing.

    Args:
        scope ([`ScopeNetwork`]): The scope, which knows what hidden states are ordinary.
        data ([`ScopeTexts`]): The texts of its training.
        seed (`int`, defaults to 0): Seed of the draw and of the order.
    """
    hidden, wanted = [], []
    known = [fact for fact, subject in enumerate(data.subjects) if subject]
    for fact in random.Random(seed).sample(known, min(_FACTS, len(known))):
        subject = data.subjects[fact]
        for text in data.texts[fact]:
            if data.table is None or text.hidden is None or not text.marks or text.marks[0].kind not in _ASKS:
                continue
            words = words_in(data.table, text.tokens[: text.marks[0].position + 1])
            place = place_within(subject, words)
            if place is not None:
                first = max(0, place - _BEFORE)
                hidden.append(text.hidden[[word.last for word in words[first:]]])
                wanted += [float(place <= number < place + len(subject)) for number in range(first, len(words))]
    if wanted:
        _fit(scope.subject, scope.subject_odds, torch.cat(hidden), torch.tensor(wanted), seed)


def _fit(
    layer: nn.Linear, odds: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor, seed: int
) -> None:
    """Fit a layer's logistic regression, which then stays as it is."""
    layer.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=_LEARNING_RATE)
    for _ in range(max(_PASSES, _STEPS // math.ceil(len(x) / _TOKENS))):
        for rows in torch.randperm(len(x), generator=generator).split(_TOKENS):
            loss = nn.functional.binary_cross_entropy_with_logits(odds(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    layer.requires_grad_(False)


def _shares(texts: Sequence[MarkedText], data: ScopeTexts) -> Iterator[tuple[MarkedText, Mark, list[float]]]:
    """Yield each text of a fact that gives a key, with how often each of its words is said when it is asked for."""
    numbers = data.words(texts)
    if numbers is None:
        return
    asks, stays = [], []
    for text, row in zip(texts, numbers.tolist(), strict=True):
        for mark in text.marks:
            said = row[: mark.position + 1]
            if mark.fact != NONE and mark.kind in _ASKS:
                asks.append((text, mark, said))
            elif mark.kind in _STAYS:
                stays.append({*said})
    for text, mark, said in asks:
        others = [{*words} for other, _, words in asks if other is not text]
        if mark.kind in _KEYS and len(others) > 1:
            elsewhere = {word: _share(word, stays) for word in {*said}}
            yield (
                text,
                mark,
                [max(0.0, _share(word, others) - elsewhere[word]) if elsewhere[word] < 0.5 else 0.0 for word in said],
            )


def _share(word: int, texts: list[set[int]]) -> float:
    return sum(word in text for text in texts) / max(1, len(texts))
