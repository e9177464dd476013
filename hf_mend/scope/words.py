"""The numbers of words, by which a scope tells texts apart that ask for the same of different subjects."""

from __future__ import annotations

import zlib

import torch
from transformers import PreTrainedTokenizerBase

from .network import ANY_WORD


# What tokenizers write in place of a space before a word.
_SPACES = "\u0120\u2581 "
_BITS = 0xFFFFFF  # as many as a float holds


def word_numbers(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """
    Return the number of each token's word, `(vocabulary,)`: the same with and without a space before it, and in
    whatever case. They are hashes, the same in every process, and two words may share one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
    """
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([zlib.crc32((text or "").strip(_SPACES).lower().encode()) & _BITS for text in texts])


def words_of(numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Return the numbers of the words of some tokens; those that the tokenizer does not know may be any.

    Args:
        numbers (`torch.Tensor` of shape `(vocabulary,)`): As [`word_numbers`] returns them.
        tokens (`torch.Tensor`): Token ids, of any shape.
    """
    known = (tokens >= 0) & (tokens < len(numbers))
    return torch.where(known, numbers.to(tokens.device)[tokens.clamp(0, len(numbers) - 1)], ANY_WORD)
