"""Greedy answers to many texts at once: in batches of like lengths, what all begin with read once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..bases.limits import longest_input
from ..bases.weights import device_of
from ..data.encoding import Query
from ..model import EditableModel
from ..scope.cache_layer import ScopeLayer


# A batch has so many texts and tokens at most, and its longest text is at most so much longer than its shortest.
_ROWS, _TOKENS = 128, 6144
_LONGER, _MORE = 1.6, 8
# What all texts begin with is read once if it has so many tokens.
_SHARED = 8

# The numbers of a batch's texts -> a context in which its rows are under their edits. It may yield a
# [`~hf_mend.scope.gate.Watch`], whose keys are then those of the texts.
Under = Callable[[Sequence[int]], AbstractContextManager[Any]]


@dataclass
class Answers:
    """
    What a model answers to some texts.

    Args:
        tokens (`list[list[int]]`): The tokens of each answer, special ones and padding included.
        logits (`list[torch.Tensor]`): Of each text, the logits of the first token, where they were asked for.
        keys (`list[torch.Tensor]`): Of each text, the key at its end, of a model with a scope.
    """

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    keys: list[torch.Tensor]


@torch.no_grad()
def answers_to(
    model: EditableModel,
    queries: Sequence[Query],
    under: Under,
    max_new_tokens: int,
    logits: bool = False,
    alike: bool = True,
) -> Answers:
    """
    Answer many texts greedily, each to the model's own end. Which texts share a batch depends on the texts alone.

    Args:
        model ([`EditableModel`]): The model.
        queries (`Sequence[Query]`): The texts.
        under (`Callable`): See `Under`.
        max_new_tokens (`int`): Most tokens of an answer.
        logits (`bool`, defaults to `False`): Keep the logits of the first token.
        alike (`bool`, defaults to `True`): Whether edits that act on what all texts begin with act there in all rows,
            or in none: then it may be read once.
    """
    encoder = model.encoder
    texts = [encoder.tokens(query)[0] for query in queries]
    longest = longest_input(model.config)
    found = Answers([[] for _ in texts], [torch.empty(0)] * len(texts), [torch.empty(0)] * len(texts))
    for chat in (False, True):
        numbers = [i for i, query in enumerate(queries) if query.chat == chat]
        start = _shared_start([texts[i] for i in numbers]) if alike and not encoder.is_encoder_decoder else []
        cache = _read(model, start, under, numbers[:1]) if len(start) >= _SHARED else None
        for batch in _batches(numbers, [len(text) for text in texts]):
            room = max_new_tokens
            if longest is not None and not encoder.is_encoder_decoder:
                room = max(1, min(room, longest - max(len(texts[i]) for i in batch)))
            with under(batch) as watch:
                out = _generate(model, [texts[i] for i in batch], room, cache, len(start), logits)
            for row, i in enumerate(batch):
                found.tokens[i] = out["tokens"][row]
                if logits:
                    found.logits[i] = out["logits"][row]
                if watch is not None and watch.keys:
                    found.keys[i] = watch.keys[0][row]
    return found


def _shared_start(texts: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all texts begin with, each having more."""
    if len(texts) < 2:
        return []
    first, last = min(texts), max(texts)
    length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[: min(length, len(first) - 1)]


def _batches(numbers: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Return the numbers in batches of like lengths, the order of equal ones kept."""
    batch: list[int] = []
    for i in sorted(numbers, key=lambda i: lengths[i]):
        full = len(batch) == _ROWS or lengths[i] * (len(batch) + 1) > _TOKENS
        if batch and (full or lengths[i] > _LONGER * lengths[batch[0]] + _MORE):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _read(model: EditableModel, start: Sequence[int], under: Under, some: Sequence[int]) -> Cache | None:
    """Return the cache of what all texts begin with; `None` where an edit acts there, or where it cannot be shared."""
    device = device_of(model.get_input_embeddings())
    watching = nullcontext() if model.scope is None else model.watching()
    with under(some), watching as watch:
        out = model(input_ids=torch.tensor([list(start)], device=device), use_cache=True, logits_to_keep=1)
    cache = getattr(out, "cache", None) or getattr(out, "past_key_values", None)
    plain = isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, ScopeLayer) for layer in cache.layers
    )
    return cache if plain and not (watch is not None and watch.acted) else None


def _generate(
    model: EditableModel, texts: Sequence[list[int]], room: int, cache: Cache | None, held: int, logits: bool
) -> dict[str, Any]:
    encoder = model.encoder
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), encoder.pad_token_id)
    mask = torch.zeros_like(ids)
    held = 0 if cache is None else held
    for row, text in enumerate(texts):
        place = slice(None, len(text)) if encoder.is_encoder_decoder else slice(width - len(text) + held, None)
        ids[row, place], mask[row, place] = torch.tensor(text[held:]), 1
        ids[row, :held], mask[row, :held] = torch.tensor(text[:held]), 1
    device = device_of(model.get_input_embeddings())
    options: dict[str, Any] = {}
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(texts))
        takes = inspect.signature(model.base_model.forward).parameters
        options["cache" if "cache" in takes else "past_key_values"] = cache
    out = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=room, do_sample=False, num_beams=1,
        pad_token_id=encoder.pad_token_id, return_dict_in_generate=True, output_logits=logits, **options,
    )  # fmt: skip
    new = out.sequences if encoder.is_encoder_decoder else out.sequences[:, width:]
    return {"tokens": new.tolist(), "logits": out.logits[0].cpu() if logits else None}
