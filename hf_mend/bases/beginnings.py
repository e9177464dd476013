"""
What texts of a batch begin with alike, such as a chat template's system prompt: it runs once, and the texts go on from
its keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .caches import continued
from .known_mask import mask_of_ones


# Tokens by which texts are told to begin alike, and those that have to be saved by a beginning's pass of its own: a
# pass reads all weights once more.
_FIRST, _SAVED = 8, 96


@dataclass(frozen=True)
class Group:
    """
    Texts of a batch that begin alike.

    Args:
        rows (`list[int]`): Their numbers.
        tokens (`int`): The tokens that all of them begin with and that run once; 0 where that does not pay.
    """

    rows: list[int]
    tokens: int = 0


def groups_of(ids: torch.Tensor, most: Sequence[int]) -> list[Group]:
    """
    Return the texts of a batch by what they begin with: those for which it pays, and all others in one group.

    Args:
        ids (`torch.Tensor` of shape `(rows, seq)`): Their tokens, padded on the right, in the host's memory.
        most (`Sequence[int]`): Of each text how many tokens may belong to its beginning.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, (start, longest) in enumerate(zip(ids[:, :_FIRST].tolist(), most, strict=True)):
        if longest >= _FIRST:
            alike.setdefault(tuple(start), []).append(row)
    found, left = [], {*range(len(ids))}
    for rows in alike.values():
        tokens = _common(ids[rows], min(most[row] for row in rows))
        if tokens * (len(rows) - 1) >= _SAVED:
            found.append(Group(rows, tokens))
            left -= {*rows}
    return [*found, Group(sorted(left))] if left else found


def _common(ids: torch.Tensor, most: int) -> int:
    """How many first tokens some texts have in common, at most so many."""
    differ = (ids[:, :most] != ids[:1, :most]).any(0).nonzero()
    return int(differ[0]) if len(differ) else most


def keeps_all(config: Any) -> bool:
    """Whether a model's cache keeps the keys and values of all tokens, and nothing else."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def expanded(cache: Any, rows: int) -> Any:
    """Return the keys and values of one text as those of so many, which takes no memory."""
    found = continued(cache)
    for layer in found.layers:
        if layer.is_initialized:
            layer.keys, layer.values = (side.expand(rows, -1, -1, -1) for side in (layer.keys, layer.values))
    return found


def inputs_behind(
    inputs: Mapping[str, torch.Tensor], index: torch.Tensor, start: int, stop: int, masked: bool, positions: bool
) -> dict[str, torch.Tensor]:
    """
    Return the arguments of a model for some texts' tokens behind what they begin with.

    Args:
        inputs (`Mapping[str, torch.Tensor]`): Those of the whole texts, padded on the right.
        index (`torch.Tensor` of shape `(texts,)`): The texts.
        start, stop (`int`): The tokens; from 0 on, the texts have no beginning of their own.
        masked (`bool`): Mask the padding.
        positions (`bool`): Tell where the tokens stand.
    """
    mask = inputs["attention_mask"][index, :stop]
    found = {
        "input_ids": inputs["input_ids"][index, start:stop],
        "attention_mask": mask if masked else mask_of_ones(mask),
    }
    if start and positions:
        found["position_ids"] = torch.arange(start, stop, device=mask.device).expand(len(index), -1)
    return found
