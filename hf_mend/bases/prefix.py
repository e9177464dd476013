"""
What stands before the answers of a batch, run once and without a gradient: edits that act at answers alone change
nothing of it, and every further pass runs the answers' few tokens on its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from ..data.encoding import IGNORE, EncodedBatch
from ..data.places import Places, on_device
from .beginnings import Group, expanded, groups_of
from .by_length import in_processes, parts_by_length
from .known_mask import known_mask, mask_of_ones
from .readout import last_mlp
from .split import HiddenState, SplitModel, logits_at, logits_of, same_logits
from .threads import StopForwardError, ends_early, hooked


logger = logging.get_logger(__name__)

# The kinds of a cache's layers that a pass replaces and does not change: the same prefix serves many passes.
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass
class Prefix:
    """
    What stands before the answers of some rows.

    Args:
        cache (`DynamicCache`): Its keys and values, padded on the left.
        mask (`torch.Tensor` of shape `(rows, prefix)`): 1 where a token stands.
    """

    cache: Any
    mask: torch.Tensor


def prefix_of(split: SplitModel, rows: EncodedBatch, state: HiddenState) -> Prefix | None:
    """
    Run what stands before the positions of some rows, from their stored hidden state on. Where a model cannot go on
    from its cache to the same logits, which the first use checks, or no row has a token before its positions, there is
    nothing to run.

    Args:
        split ([`SplitModel`]): A causal model.
        rows ([`EncodedBatch`]): The texts, padded on the right.
        state ([`HiddenState`]): Their output of `run_below`.

    Returns:
        [`Prefix`] or `None`.
    """
    lengths = [start for start, _ in rows.places.spans]
    tokens = len(rows) * max(lengths)
    if not tokens or not pays(split.device, tokens, split.parameters) or not _goes_on(split, rows):
        return None
    groups = [Group([*range(len(rows))])]
    if split.begins_alike:
        groups = groups_of(rows.inputs["input_ids"], [n - 1 for n in lengths])
    return _run(split, rows, state, lengths, groups)


def pays(device: torch.device, tokens: int, parameters: int) -> bool:
    """
    Whether a pass of its own pays for some tokens: on a GPU it is more kernels, which few tokens of a small model take
    longer to launch than to run. Processes that share a base out have to make the same passes, whatever their tokens.
    """
    return device.type == "cpu" or in_processes() or tokens * parameters >= MUCH


# A pass's kernels take some two milliseconds to launch, in which a GPU of today makes about so many products.
MUCH = 4e11


def answers_behind(
    split: SplitModel, prefix: Prefix, rows: EncodedBatch, state: HiddenState
) -> tuple[EncodedBatch, HiddenState]:
    """
    Return the tokens of some rows from the first position on, as a batch and a state that stand for all of them: the
    answers run as they would behind the whole text.

    Args:
        split ([`SplitModel`]): The model.
        prefix ([`Prefix`]): What stands before them.
        rows ([`EncodedBatch`]): The texts, or the same with further tokens behind.
        state ([`HiddenState`]): Their output of `run_below`.
    """
    spans, device = rows.places.spans, rows.positions.device
    width = max(end - start for start, end in spans)
    start = on_device(torch.tensor([first for first, _ in spans]), device)[:, None]
    numbers = start + torch.arange(width, device=device)  # (rows, width)
    inside = numbers < on_device(torch.tensor([end for _, end in spans]), device)[:, None]
    index = numbers.clamp(max=rows.positions.shape[1] - 1)
    mask = torch.cat([prefix.mask, inside.to(prefix.mask.dtype)], 1)
    if len({first for first, _ in spans}) == 1:
        mask = mask_of_ones(mask)  # nothing reads what stands behind an answer's end
    else:
        mask = known_mask(mask, sum(end for _, end in spans))
    inputs = {"input_ids": rows.inputs["input_ids"].gather(1, index), "attention_mask": mask}
    if split.takes_positions:
        inputs["position_ids"] = numbers
    positions = rows.positions.gather(1, index) & inside
    next_tokens = rows.next_tokens.gather(1, index).masked_fill(~inside, -100)
    answers = None if rows.answers is None else rows.answers.gather(1, index) & inside
    found = EncodedBatch(inputs, next_tokens, positions, None, rows.forms, answers=answers)
    found._places = _within(rows.places, width, rows.positions.shape[1])
    hidden = state.hidden.gather(1, index.to(state.hidden.device)[..., None].expand(-1, -1, state.hidden.shape[-1]))
    return found, HiddenState(hidden, cache=prefix.cache)


def _within(places: Places, width: int, length: int) -> Places:
    """Return the places of rows whose tokens begin at their first position and are `width`, not `length`."""
    moves = [i * (width - length) - start for i, (start, _) in enumerate(places.spans)]
    moved = torch.tensor(moves).repeat_interleave(torch.tensor(places.counts))
    positions = places.positions + on_device(moved, places.positions.device)
    spans = [(0, end - start) for start, end in places.spans]
    return replace(places, positions=positions, read=None, spans=spans, lengths=[], pads_right=False)


def _run(
    split: SplitModel, rows: EncodedBatch, state: HiddenState, lengths: Sequence[int], groups: Sequence[Group]
) -> Prefix:
    """The prefix of all rows, those of about one length in a pass, and what a group begins with in one of its own."""
    found: list[Prefix] = []
    order: list[int] = []
    for group in groups:
        before = _beginning(split, rows, state, group)
        for part in parts_by_length([lengths[i] - group.tokens for i in group.rows], split.device):
            numbers = [group.rows[k] for k in part]
            found.append(_of_part(split, rows, state, [lengths[i] for i in numbers], numbers, before))
            order += numbers
    prefix = found[0]
    if len(found) > 1:
        prefix = _joined(found, torch.tensor(order).argsort())
    _fill_below(split, prefix.cache, len(rows), prefix.mask.shape[1])
    return prefix


def _beginning(split: SplitModel, rows: EncodedBatch, state: HiddenState, group: Group) -> Any:
    """The keys and values of what some rows begin with, one row's; nothing where each runs its own."""
    if not group.tokens:
        return None
    first = group.rows[:1]
    cache = _cache_of(split, *_before(split, rows, state, [group.tokens], first))
    _fill_below(split, cache, 1, group.tokens)
    return cache


def _of_part(
    split: SplitModel,
    rows: EncodedBatch,
    state: HiddenState,
    lengths: Sequence[int],
    part: Sequence[int],
    before: Any,
) -> Prefix:
    """The prefix of some rows, in one pass behind what they begin with, if that is known."""
    start = 0 if before is None else before.get_seq_length()
    inputs, hidden = _before(split, rows, state, lengths, part, start)
    cache = _cache_of(split, inputs, hidden, None if before is None else expanded(before, len(part)))
    for number, layer in enumerate(cache.layers[: split.block]):
        if start and layer.keys.shape[2] == start:  # a block that does not run, and told how long the beginning is
            cache.layers[number] = DynamicLayer()
    return Prefix(cache, inputs["attention_mask"].as_subclass(torch.Tensor))


def _joined(parts: Sequence[Prefix], back: torch.Tensor) -> Prefix:
    """The prefixes of all parts, padded on the left, in the order of the rows."""
    cache = parts[0].cache

    def joined(sides: Sequence[torch.Tensor], dim: int) -> torch.Tensor:  # each (rows, ..., tokens, ...)
        behind, longest = sides[0].dim() - 1 - dim, max(side.shape[dim] for side in sides)
        padded = [torch.nn.functional.pad(x, (0, 0) * behind + (longest - x.shape[dim], 0)) for x in sides]
        return torch.cat(padded).index_select(0, back.to(sides[0].device))

    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:
            layers = [one.cache.layers[number] for one in parts]
            layer.keys = joined([one.keys for one in layers], 2)
            layer.values = joined([one.values for one in layers], 2)
    return Prefix(cache, joined([one.mask for one in parts], 1))


def _before(
    split: SplitModel,
    rows: EncodedBatch,
    state: HiddenState,
    lengths: Sequence[int],
    part: Sequence[int],
    start: int = 0,
) -> tuple[dict[str, torch.Tensor], HiddenState]:
    """
    Inputs and state of some rows' first tokens from `start` on, padded on the left: between what stands before them,
    which the mask tells of too, and them.
    """
    device = rows.positions.device
    width = max(lengths) - start
    row = on_device(torch.tensor([*part]), device)
    numbers = torch.arange(width) - (width + start - torch.tensor([*lengths]))[:, None]  # below 0 for padding
    mask = on_device(torch.cat([torch.ones(len(part), start), numbers >= 0], 1).long(), device)
    numbers = on_device(numbers.clamp(min=0) + start, device)  # (rows, width)
    ids = rows.inputs["input_ids"].index_select(0, row).gather(1, numbers)
    inputs = {"input_ids": ids, "attention_mask": known_mask(mask, sum(lengths))}
    if split.takes_positions:
        inputs["position_ids"] = numbers
    hidden = state.hidden.index_select(0, row.to(state.hidden.device))
    index = numbers.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
    return inputs, HiddenState(hidden.gather(1, index))


@torch.no_grad()
def _cache_of(split: SplitModel, inputs: dict[str, torch.Tensor], state: HiddenState, cache: Any = None) -> Any:
    """
    Keys and values of some tokens in the blocks above the cut, behind those of a cache. Of the last block nothing else
    is computed.
    """
    cache = DynamicCache(config=split.model.config) if cache is None else cache

    def stop(module: Any, args: tuple[Any, ...]) -> None:
        raise StopForwardError

    if in_processes():  # whose blocks may be shared out, and have to run to their ends
        with logits_at(split.model, torch.zeros(1, dtype=torch.long)):
            split.run_above(inputs, state, into=cache)
        return cache
    last = last_mlp(split) or split.model.get_output_embeddings()
    with hooked(last.register_forward_pre_hook, stop), ends_early():
        split.run_above(inputs, state, into=cache)
    return cache


def _fill_below(split: SplitModel, cache: Any, rows: int, width: int) -> None:
    """Let the layers below the cut, which do not run, tell how many tokens there are: models ask the first one."""
    for layer in cache.layers[: split.block]:
        if not layer.is_initialized:
            nothing = torch.zeros(rows, 1, width, 1, device=split.device)
            layer.update(nothing, nothing)


def _goes_on(split: SplitModel, rows: EncodedBatch) -> bool:
    """Whether the model says the same where it goes on from its cache; checked once."""
    if split.goes_on is None:
        reason = _hindrance(split, rows)
        split.goes_on = not reason
        split.begins_alike = split.goes_on and split.shares(rows) and _begins_alike(split, rows)
        if reason:
            name = type(split.model).__name__
            logger.info(f"{name} runs whole texts where edits act at answers alone ({reason}): slower, and as exact")
    return split.goes_on


@torch.no_grad()
def _hindrance(split: SplitModel, rows: EncodedBatch) -> str:
    """Why a model cannot go on from its cache; nothing where it can."""
    if split.cuts_decoder_of_two or split.tokens_first or set(rows.inputs) != {"input_ids", "attention_mask"}:
        return "its inputs are not one text"
    if not split.cache_name:
        return "it takes no cache"
    if not split.resumes:
        return "it cannot be run from a block on"
    if any(parameter.is_meta for parameter in split.model.parameters()):
        return "it is offloaded"
    if any(type(layer) not in _GROWING for layer in DynamicCache(config=split.model.config).layers):
        return "its cache holds a state"
    some = _two_lengths(rows)
    state = split.run_below(some.inputs)
    whole = logits_of(split, some, state)
    try:
        prefix = _run(split, some, state, [start for start, _ in some.places.spans], [Group([0, 1])])
        if any(type(layer) not in _GROWING or not layer.is_initialized for layer in prefix.cache.layers):
            return "not all of its blocks have keys and values of their own"
        for _ in range(2):  # the second pass goes on from the same cache
            if not same_logits(logits_of(split, *answers_behind(split, prefix, some, state)), whole):
                return "its logits differ"
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _two_lengths(rows: EncodedBatch) -> EncodedBatch:
    """A text of the batch without its first tokens, and the same with them, each with two positions at its end."""
    length = int(rows.inputs["attention_mask"][0].sum())
    ids = rows.inputs["input_ids"][0, :length]
    ids = ids.repeat(-(-6 // length)) if length < 6 else ids
    pair = torch.stack([ids.roll(-2), ids])
    mask, positions = torch.ones_like(pair), torch.zeros_like(pair, dtype=torch.bool)
    mask[0, -2:] = 0
    positions[0, -4:-2] = True
    positions[1, -2:] = True
    return EncodedBatch({"input_ids": pair, "attention_mask": mask}, torch.full_like(pair, IGNORE), positions)


@torch.no_grad()
def _begins_alike(split: SplitModel, rows: EncodedBatch) -> bool:
    """Whether two texts say the same behind what they begin with, run once, with padding between that and the rest."""
    ids = _two_lengths(rows).inputs["input_ids"][1:].repeat(2, 1)
    mask, positions = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[0, -1] = 0
    positions[0, -3:-1] = True
    positions[1, -2:] = True
    some = EncodedBatch({"input_ids": ids, "attention_mask": mask}, torch.full_like(ids, IGNORE), positions)
    state, groups = split.run_below(some.inputs), [Group([0, 1], ids.shape[1] - 4)]
    prefix = _run(split, some, state, [start for start, _ in some.places.spans], groups)
    return same_logits(logits_of(split, *answers_behind(split, prefix, some, state)), logits_of(split, some, state))
