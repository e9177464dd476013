"""The numbers of words, by which a scope tells texts apart that ask for the same of different subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .network import ANY_WORD


# What tokenizers write in place of a space before a word, and of other white space.
_SPACES, _BREAKS = "\u0120\u2581 ", "\u010a\u0109\u010d\n\t\r"
# A word's hash is that of its letters, a polynomial in them: a token at its end goes on from the token before.
_BASE, _MODULUS = 1_000_003, 1 << 23


@dataclass(frozen=True)
class WordTable:
    """
    What the tokens of a vocabulary are to words, `(vocabulary,)` each.

    Args:
        hashes (`torch.Tensor`): Of the token's letters.
        powers (`torch.Tensor`): What the hash of the letters before is multiplied by.
        begins (`torch.Tensor`): Whether it begins a word, whatever stands before it.
        ends (`torch.Tensor`): Whether it ends in a letter or digit, with which a word may go on.
    """

    hashes: torch.Tensor
    powers: torch.Tensor
    begins: torch.Tensor
    ends: torch.Tensor

    def to(self, device: torch.device) -> WordTable:
        """Return the table on a device."""
        return WordTable(*(one.to(device) for one in (self.hashes, self.powers, self.begins, self.ends)))


def word_table(tokenizer: PreTrainedTokenizerBase) -> WordTable:
    """
    Return what the tokens of a tokenizer are to words.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
    """
    hashes, powers, begins, ends = [], [], [], []
    for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        token = token or ""
        letters = token.strip(_SPACES + _BREAKS).lower()
        found, power = 0, 1
        for letter in letters:
            found, power = (found * _BASE + ord(letter)) % _MODULUS, power * _BASE % _MODULUS
        hashes.append(found)
        powers.append(power)
        begins.append(not letters or token[0] in _SPACES + _BREAKS or not letters[0].isalnum())
        ends.append(bool(letters) and token[-1] not in _SPACES + _BREAKS and letters[-1].isalnum())
    return WordTable(*(torch.tensor(values) for values in (hashes, powers, begins, ends)))


@dataclass(frozen=True)
class Word:
    """
    A word of a text.

    Args:
        hash (`int`): Of its letters.
        first (`int`), last (`int`): Its tokens.
    """

    hash: int
    first: int
    last: int


def words_in(table: WordTable, tokens: Sequence[int]) -> list[Word]:
    """
    Return the words of a text, punctuation among them.

    Args:
        table ([`WordTable`]): Of the tokenizer.
        tokens (`Sequence[int]`): The text's token ids; one that the table lacks is a word of its own.
    """
    ids = torch.tensor([*tokens], dtype=torch.long)
    numbers = word_numbers(table, ids[None])[0].tolist()
    begins = table.begins[ids.clamp(0, len(table.begins) - 1)].tolist()
    found: list[Word] = []
    before = 0  # its last bit tells whether the word may go on
    for place, number in enumerate(numbers):
        if number == ANY_WORD:
            found.append(Word(ANY_WORD, place, place))
            before = 0
            continue
        if before % 2 and not begins[place]:
            found[-1] = Word(number // 2, found[-1].first, place)
        elif number // 2:  # more than white space
            found.append(Word(number // 2, place, place))
        before = number
    return found


def place_within(part: Sequence[Word], whole: Sequence[Word]) -> int | None:
    """Return where some words stand in a row among others for the last time; `None` where they do not."""
    wanted, given = [word.hash for word in part], [word.hash for word in whole]
    places = range(len(given) - len(wanted), -1, -1) if wanted else ()
    return next((place for place in places if given[place : place + len(wanted)] == wanted), None)


def word_numbers(
    table: WordTable, tokens: torch.Tensor, mask: torch.Tensor | None = None, before: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return the number of the word that each token ends, as far as it: the same in whatever case, with and without a
    space before it, and however it falls into tokens. Twice a hash of its letters, and 1 more where it may go on.

    Args:
        table ([`WordTable`]): Of the tokenizer.
        tokens (`torch.Tensor` of shape `(rows, seq)`): Token ids; those that the table lacks may be any.
        mask (`torch.Tensor` of shape `(rows, seq)`, *optional*): 0 where there is only padding.
        before (`torch.Tensor` of shape `(rows,)`, *optional*): The numbers of the tokens before.
    """
    known = (tokens >= 0) & (tokens < len(table.hashes))
    ids = tokens.clamp(0, len(table.hashes) - 1)
    ends = table.ends[ids] & known
    if mask is not None:
        ends = ends & mask.bool()
    first = torch.zeros_like(tokens[:, :1]) if before is None else before[:, None].to(tokens.dtype).clamp(min=0)
    goes_on = torch.cat([first % 2 == 1, ends[:, :-1]], 1) & ~table.begins[ids] & known
    factor = torch.where(goes_on, table.powers[ids], 0)
    found = table.hashes[ids]
    found[:, :1] = (found[:, :1] + factor[:, :1] * (first // 2)) % _MODULUS
    factor[:, :1] = 0
    step = 1
    while step < tokens.shape[1]:  # found[t] += factor[t] * found[t - 1], for all t at once
        found = torch.cat([found[:, :step], (found[:, step:] + factor[:, step:] * found[:, :-step]) % _MODULUS], 1)
        factor = torch.cat([factor[:, :step] * 0, factor[:, step:] * factor[:, :-step] % _MODULUS], 1)
        step *= 2
    return torch.where(known, 2 * found + ends, ANY_WORD)
