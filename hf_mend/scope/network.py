"""The scope's network: what is asked at each token of a text, as a key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn


# What a scope is made of; the shapes of its file's tensors follow from these and the width of the base model.
HEADS = 4
HEAD_WIDTH = 128
HIDDEN_WIDTH = 512
MEANING_WIDTH = 128
# A key is this many unit vectors side by side, all of which have to agree, and behind them the text's words.
KEY_PARTS = 2
# Words are told apart by half their numbers modulo this, and those of so many tokens back count as said.
WORDS, WORD_WINDOW = 256, 64
# The share of a key's words that counts as missing in a text of which that is not known, and how much a word counts
# that the text has and the key does not.
WORDS_UNKNOWN, STRANGE_WORDS = 0.3, 0.3
KEY_WIDTH = MEANING_WIDTH + WORDS

_LARGEST = 5.0  # of a standardised input: a text's first token is hundreds of times as large as the others
_PADDING = -1e9  # log weight of a token that is not there
# In place of the number of a word: of a token that is not there, and of one that may be any.
NO_WORD, ANY_WORD = -2, -1
# A token is likely enough to be said in every form of asking from this on, for its word to matter.
_WORD_MATTERS = 0.55
_SAID = 1e-3  # the weight of a word that is said and does not matter
_ROUNDED_MINIMUM = 12.0  # sharpness of the minimum over the parts of a key
# A score is at most so much above each of its parts; the rest is for rounding.
_ABOVE_PARTS = math.log(KEY_PARTS) / _ROUNDED_MINIMUM + 1e-4
_QUERIES_AT_ONCE = 512
# The share of a hidden state's components that a training step leaves out.
_DROPOUT = 0.1


@dataclass
class TokenStates:
    """
    What a scope keeps of each token of a text, so that later tokens can be decided on without the text.

    Args:
        gates (`torch.Tensor` of shape `(rows, heads, seq, 4)`): Each token's log weight for its head, and the sum of
            what the head has forgotten until then; of its word, for all heads, the number and how much it matters.
        values (`torch.Tensor` of shape `(rows, heads, seq, HEAD_WIDTH)`): What the token adds to the head.
    """

    gates: torch.Tensor
    values: torch.Tensor


class ScopeNetwork(nn.Module):
    """
    Map the hidden states of a text to a key at each token: what the text asks there.

    Each head takes a weighted mean over the tokens so far. Token `t`'s weight at token `T` is `exp(a_t - sum_{t < s <=
    T} softplus(f_s))`, `a` and `f` being linear in the hidden state: what stands further back counts less, at a rate
    that the later tokens set. As a softmax over `a_t + sum_{s <= t} softplus(f_s)` it needs of each token but two
    numbers a head, and its value, whatever comes later.

    Beside what the heads have found, a key has the words of the last tokens, by number, and how much each matters.

    Args:
        width (`int`): Width of the hidden states.

    Attributes:
        threshold (`torch.nn.Parameter` of shape `()`): The score from which on a text asks for the same as a key; an
            edit has it for each of its keys when it is made.
    """

    centre: torch.Tensor
    spread: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.gates = nn.Linear(width, 2 * HEADS)
        with torch.no_grad():
            self.gates.weight.mul_(0.3)
            self.gates.bias[:HEADS] = 0.0
            self.gates.bias[HEADS:] = torch.linspace(-4.0, 0.5, HEADS)  # from a whole text to its last words
        self.values = nn.Parameter(torch.randn(HEADS, width, HEAD_WIDTH) / math.sqrt(width))
        self.norm = nn.LayerNorm(HEADS * HEAD_WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(HEADS * HEAD_WIDTH, HIDDEN_WIDTH), nn.GELU(), nn.Linear(HIDDEN_WIDTH, MEANING_WIDTH)
        )
        self.skip = nn.Linear(HEADS * HEAD_WIDTH, MEANING_WIDTH)
        # Log odds that a token's word is said in whatever way a fact is asked for; none matters before training.
        self.word = nn.Linear(width, 1)
        with torch.no_grad():
            self.word.weight.zero_()
            self.word.bias.zero_()
        # Log odds that a word names what the text is about, at its last token; none is known before training.
        self.subject = nn.Linear(width, 1)
        with torch.no_grad():
            self.subject.weight.zero_()
            self.subject.bias.zero_()
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(15.0)))
        self.threshold = nn.Parameter(torch.tensor(0.5))

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.centre.shape[0]

    @property
    def is_trained(self) -> bool:
        """Whether it knows what hidden states are ordinary, which training learns first."""
        return bool((self.spread != 1.0).any())

    @property
    def knows_subjects(self) -> bool:
        """Whether it has learned which words name what a text is about."""
        return bool(self.subject.weight.any())

    @torch.no_grad()
    def standardise(self, hidden: torch.Tensor) -> None:
        """
        Set what counts as an ordinary value of each component: median and median absolute deviation, which the first
        tokens' huge ones do not move.

        Args:
            hidden (`torch.Tensor` of shape `(tokens, width)`): Hidden states.
        """
        hidden = hidden.float()
        self.centre.copy_(hidden.median(0).values)
        self.spread.copy_(1.4826 * (hidden - self.centre).abs().median(0).values + 1e-6)

    def token_states(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        past: TokenStates | None = None,
        words: torch.Tensor | None = None,
    ) -> TokenStates:
        """
        Return what is kept of some tokens.

        Args:
            hidden (`torch.Tensor` of shape `(rows, seq, width)`): Their hidden states.
            mask (`torch.Tensor` of shape `(rows, seq)`, *optional*): 0 where there is only padding.
            past ([`TokenStates`], *optional*): Those of the tokens before.
            words (`torch.Tensor` of shape `(rows, seq)`, *optional*): The numbers of their words
                ([`~hf_mend.scope.words.word_numbers`]); any word may be said where they are missing.
        """
        x = self._standardised(hidden)
        weight, forgotten = self.gates(x).transpose(1, 2).split(HEADS, 1)  # (rows, heads, seq) each
        forgotten = nn.functional.softplus(forgotten)
        number = weight.new_full(hidden.shape[:2], ANY_WORD) if words is None else words.to(weight)
        if mask is not None:
            present = mask[:, None].bool()
            forgotten = forgotten * present
            number = number.masked_fill(~present[:, 0], NO_WORD)
        forgotten = forgotten.cumsum(-1)
        if past is not None:
            forgotten = forgotten + past.gates[:, :, -1:, 1]
        weight = weight + forgotten
        if mask is not None:
            weight = weight.masked_fill(~present, _PADDING)
        values = (x.flatten(0, 1) @ self.values).unflatten(1, x.shape[:2])  # (heads, rows, seq, HEAD_WIDTH)
        word = torch.stack([number, self._matters(x)], -1)[:, None].expand(-1, HEADS, -1, -1)
        return TokenStates(torch.cat([torch.stack([weight, forgotten], -1), word], -1), values.transpose(0, 1))

    def keys(self, states: TokenStates, last: int | None = None) -> torch.Tensor:
        """
        Return the keys of a text at its last tokens, `(rows, last, KEY_WIDTH)`.

        Args:
            states ([`TokenStates`]): Those of all its tokens.
            last (`int`, *optional*): The number of tokens; all of them when missing.
        """
        weights, values = states.gates[..., 0], states.values
        number, matters = states.gates[:, 0, :, 2:].unbind(-1)  # (rows, seq) each
        length = weights.shape[-1]
        first = length - (length if last is None else last)
        parts = []
        for start in range(first, length, _QUERIES_AT_ONCE):
            stop = min(start + _QUERIES_AT_ONCE, length)
            scores = weights[:, :, None, :stop]  # (rows, heads, queries, stop)
            if stop - start > 1:  # a single one sees all before it
                seen = torch.ones(stop - start, stop, dtype=torch.bool, device=weights.device).tril(start)
                scores = scores.masked_fill(~seen, -math.inf)
            pooled = scores.softmax(-1) @ values[:, :, :stop]  # (rows, heads, queries, HEAD_WIDTH)
            said = said_words(_windows(number, start, stop, NO_WORD), _windows(matters, start, stop, 0.0))
            parts.append(torch.cat([self.meaning(pooled.transpose(1, 2).flatten(2)), said], -1))
        return torch.cat(parts, 1)

    def keys_at(
        self, hidden: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, words: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Return the keys of texts at a few of their tokens, `(places, KEY_WIDTH)`: what [`keys`] gives there, for less.

        Args:
            hidden (`torch.Tensor` of shape `(rows, seq, width)`): Their hidden states, padded on the right.
            rows (`torch.Tensor` of shape `(places,)`), places (`torch.Tensor` of shape `(places,)`): Row and token of
                each, row by row.
            words (`torch.Tensor` of shape `(rows, seq)`, *optional*): As for [`token_states`].
        """
        learns = self.training and torch.is_grad_enabled()
        plain = self._standardised(hidden)
        x = nn.functional.dropout(plain, _DROPOUT, learns)
        weight, forgotten = self.gates(x).split(HEADS, -1)  # (rows, seq, heads) each
        scores = (weight + nn.functional.softplus(forgotten).cumsum(1))[rows]  # (places, seq, heads)
        later = torch.arange(hidden.shape[1], device=hidden.device) > places[:, None]
        weights = scores.masked_fill(later[..., None], -math.inf).softmax(1).transpose(1, 2)  # (places, heads, seq)
        # A row's places in one product: its hidden states are not copied for each of them.
        counts = torch.bincount(rows, minlength=len(hidden))
        number = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]  # within the row
        of_rows = weights.new_zeros(len(hidden), int(counts.max()), *weights.shape[1:])
        of_rows = of_rows.index_put((rows, number), weights).flatten(1, 2)  # (rows, most places * heads, seq)
        pooled = (of_rows @ x).unflatten(1, (-1, HEADS))[rows, number]  # (places, heads, width)
        meaning = self.meaning(torch.einsum("nhd,hdp->nhp", pooled, self.values).flatten(1))
        window = places[:, None] - torch.arange(WORD_WINDOW, device=hidden.device)  # (places, WORD_WINDOW)
        near = (rows[:, None], window.clamp(min=0))
        with torch.no_grad():
            number = plain.new_full(window.shape, ANY_WORD) if words is None else words.to(plain)[near]
            said = said_words(number.masked_fill(window < 0, NO_WORD), self._matters(plain)[near])
        return torch.cat([meaning, said], -1)

    def _standardised(self, hidden: torch.Tensor) -> torch.Tensor:
        return ((hidden.float() - self.centre) / self.spread).clamp(-_LARGEST, _LARGEST)

    def log_odds(self, hidden: torch.Tensor) -> torch.Tensor:  # (..., width) -> (...)
        """Return the log odds that tokens' words are said in whatever way the same is asked for."""
        return self.word(self._standardised(hidden))[..., 0]

    def subject_odds(self, hidden: torch.Tensor) -> torch.Tensor:  # (..., width) -> (...)
        """Return the log odds that words name what their text is about, from their last tokens' hidden states."""
        return self.subject(self._standardised(hidden))[..., 0]

    def _matters(self, x: torch.Tensor) -> torch.Tensor:  # (..., width) -> (...)
        """Return how much the words of tokens matter, from their standardised hidden states."""
        return (self.word(x)[..., 0].sigmoid() - _WORD_MATTERS).clamp(min=0.0)

    def meaning(self, pooled: torch.Tensor) -> torch.Tensor:  # (..., heads * HEAD_WIDTH) -> (..., MEANING_WIDTH)
        """Return the first parts of the key of what the heads have pooled."""
        z = self.norm(pooled)
        return nn.functional.normalize((self.mlp(z) + self.skip(z)).unflatten(-1, (KEY_PARTS, -1)), dim=-1).flatten(-2)


def said_words(number: torch.Tensor, matters: torch.Tensor) -> torch.Tensor:
    """
    Return the words of a key, `(..., WORDS)`: 0 for those that are not said, a little for those that do not matter,
    and for those that do as much more as their share of all that matters.

    Args:
        number (`torch.Tensor` of shape `(..., tokens)`): The numbers of the tokens' words, or [`NO_WORD`], or
            [`ANY_WORD`].
        matters (`torch.Tensor` of the same shape): How much each matters.
    """
    weight = torch.where(number >= 0, matters + _SAID, 0.0)
    said = weight.new_zeros(*number.shape[:-1], WORDS)
    said = said.scatter_reduce(-1, number.clamp(min=0).long() // 2 % WORDS, weight, "amax")
    said = said.clamp(min=_SAID * (number == ANY_WORD).any(-1, keepdim=True))
    share = (said - _SAID).clamp(min=0.0)
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-6)
    return torch.where(said > 0, share + _SAID, 0.0)


def _windows(values: torch.Tensor, start: int, stop: int, missing: float) -> torch.Tensor:
    """Return what stands at some tokens and those before, `(rows, stop - start, WORD_WINDOW)`."""
    first = max(0, start - WORD_WINDOW + 1)
    before = first + WORD_WINDOW - 1 - start
    return nn.functional.pad(values[:, first:stop], (before, 0), value=missing).unfold(1, WORD_WINDOW, 1)


def key_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """
    Return how alike keys are, at most 1, `(queries, keys)`: a rounded minimum of the cosines of their parts. Their
    words do not count; see [`missing_words`].

    Args:
        queries (`torch.Tensor` of shape `(queries, KEY_WIDTH)`), keys (`torch.Tensor` of shape `(keys, KEY_WIDTH)`):
            The keys.
    """
    return part_scores(queries, key_parts(keys))


def part_scores(queries: torch.Tensor, keys: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what [`key_scores`] does, from each of the keys' parts, as [`key_parts`] gives them."""
    cosines = (-_ROUNDED_MINIMUM * q @ k.T for q, k in zip(key_parts(queries), keys, strict=True))
    least = reduce(torch.logaddexp, cosines)
    return (math.log(KEY_PARTS) - least) / _ROUNDED_MINIMUM


def missing_words(queries: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """
    Return how much the words of texts and keys differ, from 0 to 1, `(...)`: the share of those that matter in keys
    that are missing in the texts, and a part of the share of those that matter in the texts that are missing in the
    keys, as other things may stand before a question.

    Args:
        queries (`torch.Tensor` of shape `(..., KEY_WIDTH)`): The texts' keys.
        words (`torch.Tensor` of shape `(..., WORDS)`): The words of the keys, as [`key_words`] gives them.
    """
    said = key_words(queries)
    return (_missing(said, words) + STRANGE_WORDS * _missing(words, said)).clamp(max=1.0)


def other_words(queries: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """
    Return how far texts name something else in the place of what keys name, from 0 to 1, `(...)`: the lesser of the
    share of the words that matter in keys and are missing in the texts, and of those that matter in the texts and are
    missing in the keys. Other wordings leave the name, and what stands before a question leaves it there too.

    Args:
        queries, words: As for [`missing_words`].
    """
    said = key_words(queries)
    return torch.minimum(_missing(said, words), _missing(words, said))


def _missing(said: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return what share of some words that matter is not said; [`WORDS_UNKNOWN`] where none does or any may be."""
    shares, absent = (words - _SAID).clamp(min=0.0), said <= 0
    known = (shares.sum(-1) > 0) & absent.any(-1)
    return torch.where(known, (absent * shares).sum(-1), WORDS_UNKNOWN)


def least_cosines(queries: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return the least of the cosines of texts with keys in some of the parts, `(queries, keys)`: no score is much above
    it, and it costs a fraction of [`key_scores`].

    Args:
        queries (`torch.Tensor` of shape `(queries, KEY_WIDTH)`): The texts' keys.
        parts (`Sequence[torch.Tensor]`, each of shape `(keys, MEANING_WIDTH / KEY_PARTS)`): The last parts of the
            keys, one or more.
    """
    own = key_parts(queries)[-len(parts) :]
    return reduce(torch.minimum, (q @ k.T for q, k in zip(own, parts, strict=True)))


def may_pass(cosines: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """
    Return which keys may have a score of at least `least` with one of the queries, `(keys,)`, bool.

    Args:
        cosines (`torch.Tensor` of shape `(queries, keys)`): As [`least_cosines`] gives them.
        least (`torch.Tensor` of shape `(keys,)`): The scores.
    """
    # `max` finds the places too, at many times the cost.
    return cosines.amax(0) + _ABOVE_PARTS >= least


def may_ask(cosines: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return which queries may have such a score with one of the keys, `(queries,)`, bool; as for [`may_pass`]."""
    return (cosines + _ABOVE_PARTS >= least).any(1)


def key_parts(keys: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the parts of keys, which are unit vectors each."""
    return keys[..., :MEANING_WIDTH].float().chunk(KEY_PARTS, -1)


def key_words(keys: torch.Tensor) -> torch.Tensor:
    """Return the words of keys, `(..., WORDS)`, as [`said_words`] gives them."""
    return keys[..., MEANING_WIDTH:].float()
