"""The vocabulary projection where it is a plain linear layer: read once for a loss and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..data.places import Places
from .split import HiddenState, Inputs, SplitModel, logits_at, same_logits
from .threads import StopForwardError, ends_early, hooked


# A projection of at least so many bytes costs what reading it costs, where there are at most so many positions.
_LARGE, _FEW = 16 << 20, 32
# Rows of it that are read at a time: they stay in the processor's cache until they are used again. Two or three
# positions are filled up to four, with which products of matrices are faster.
_ROWS, _AT_LEAST = 1024, 4


def projected(split: SplitModel, inputs: Inputs, state: HiddenState, places: Places, head: nn.Module) -> torch.Tensor:
    """Run the model from the stored hidden state on, and return the projection's input, `(positions, width)`."""
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0][0])
        raise StopForwardError

    with (
        logits_at(split.model, places.positions),
        hooked(head.register_forward_pre_hook, keep),
        ends_early(),
    ):
        split.run_above(inputs, state)
    return found[0]


def plain_head(split: SplitModel, inputs: Inputs, state: HiddenState, places: Places) -> nn.Linear | None:
    """
    Return the vocabulary projection if the model's logits are its output and no more, which is checked once.

    Args:
        split ([`SplitModel`]): The model.
        inputs (`Mapping[str, torch.Tensor]`): Its arguments, for a few texts.
        state ([`HiddenState`]): Their output of `run_below`.
        places ([`~hf_mend.data.places.Places`]): The positions of the logits.
    """
    head: Any = split.model.get_output_embeddings()
    if not _is_plain(head):
        return None
    if split.head_is_plain is None:
        with torch.no_grad():
            with logits_at(split.model, places.positions):
                logits = split.run_above(inputs, state).logits[0]
            found = head(projected(split, inputs, state, places, head))
        split.head_is_plain = same_logits(found, logits)
    found_head: nn.Linear | None = head if split.head_is_plain else None
    return found_head


def _is_plain(head: Any) -> bool:
    """Whether a vocabulary projection is a linear layer whose whole weight is here."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and not hasattr(head, "_hf_hook")
        and head.weight.shape == (head.out_features, head.in_features)
        and not head.weight.is_meta
        and not head.weight.requires_grad
    )


def read_once(split: SplitModel, inputs: Inputs, state: HiddenState, places: Places) -> nn.Linear | None:
    """Return the projection where it [`is_large`] and plain. The arguments are those of [`plain_head`]."""
    return plain_head(split, inputs, state, places) if is_large(split, places) else None


def is_large(split: SplitModel, places: Places) -> bool:
    """Whether reading the vocabulary projection is what it costs: on a CPU, at few positions."""
    weight = getattr(split.model.get_output_embeddings(), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type != "cpu":
        return False
    return weight.nbytes >= _LARGE and len(places.positions) <= _FEW


@torch.no_grad()
def swept(hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the logits, and the gradient of the tokens' negative log-likelihood, summed, with respect to the hidden
    states: the projection is read once, some rows after the others, with a running maximum as in flash attention.

    Args:
        hidden (`torch.Tensor` of shape `(positions, width)`): The projection's input.
        head (`nn.Linear`): The projection.
        labels (`torch.Tensor` of shape `(positions,)`): The tokens.
    """
    weight = head.weight
    count = len(hidden)
    hidden = _filled(hidden)
    parts: list[torch.Tensor] = []
    highest = hidden.new_full((len(hidden), 1), -torch.inf, dtype=torch.float32)
    total = torch.zeros_like(highest)
    mean = torch.zeros(hidden.shape, dtype=torch.float32)  # the weight's rows, by their tokens' probabilities
    for some, logits in _parts(hidden, head):
        parts.append(logits)
        now = torch.maximum(highest, logits.float().amax(-1, keepdim=True))
        likely = (logits.float() - now).exp()
        before = (highest - now).exp()
        total = total * before + likely.sum(-1, keepdim=True)
        mean = mean * before + (likely.to(weight.dtype) @ some).float()
        highest = now
    mean = (mean / total)[:count]
    return torch.cat(parts, -1)[:count], (mean - weight[labels].float()).to(hidden.dtype)


@torch.no_grad()
def logits_in_parts(hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    """Return the logits, `(positions, vocab)`, from some rows of the projection after the others."""
    return torch.cat([logits for _, logits in _parts(_filled(hidden), head)], -1)[: len(hidden)]


def _parts(hidden: torch.Tensor, head: nn.Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of the projection, and the logits of their tokens."""
    for start in range(0, len(head.weight), _ROWS):
        some = head.weight[start : start + _ROWS]
        bias = None if head.bias is None else head.bias[start : start + _ROWS]
        yield some, nn.functional.linear(hidden, some, bias)


def _filled(hidden: torch.Tensor) -> torch.Tensor:
    missing = _AT_LEAST - len(hidden)
    return nn.functional.pad(hidden, (0, 0, 0, missing)) if 0 < missing < _AT_LEAST - 1 else hidden
