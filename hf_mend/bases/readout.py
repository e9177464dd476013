"""
What a loss reads of a pass: the answers' positions alone, of the last block's MLP and of the vocabulary projection. No
logit is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..data.encoding import EncodedBatch
from .gradients import kl_divergence
from .projection import plain_head, projected
from .split import HiddenState, SplitModel, logits_of, same_logits
from .targets import ATTENTION_NAME, MLP_NAME
from .threads import hooked


logger = logging.get_logger(__name__)

# Positions whose logits are in memory at a time.
_CHUNK = 512


class Readout:
    """
    Reads the passes of a model at the positions of their answers, for a loss.

    What is read is the input of the vocabulary projection, from which [`nll`] and [`kl`] make logits, a few positions
    at a time, together with their gradient: it is kept in their place for the backward pass. Of a model that does more
    with its logits than to project them, or whose projection is offloaded or shared out over processes, what is read
    is its logits.

    Args:
        split ([`SplitModel`]): The model.
        rows ([`EncodedBatch`]): Texts, of which two check the shortcuts: those that do not give the model's own logits
            are not taken.
        below (`Callable`): Gives the rows' output of `run_below`.
    """

    def __init__(self, split: SplitModel, rows: EncodedBatch, below: Callable[[EncodedBatch], HiddenState]):
        self.split = split
        some = rows[:2]
        state = below(some)
        self.head: Any = plain_head(split, split.inputs_of(some), state, some.places)
        self.mlp: nn.Module | None = last_mlp(split)
        if self.mlp is not None and not self._gives_the_same(some, state):
            self.mlp = None

    @torch.no_grad()
    def _gives_the_same(self, rows: EncodedBatch, state: HiddenState) -> bool:
        """Whether the model's logits stay where the MLP runs at the positions alone."""
        logits = logits_of(self.split, rows, state)
        try:
            with narrowed(self.mlp, rows):
                found = logits_of(self.split, rows, state)
        except Exception as error:  # foreign code that calls its layers in another way
            name = type(self.split.model).__name__
            logger.info(f"{name} runs its last MLP at all tokens ({type(error).__name__}: {error})")
            return False
        return same_logits(found, logits)

    def at(self, rows: EncodedBatch, state: HiddenState) -> torch.Tensor:
        """
        Run the model from the stored hidden state on, and return what is read, `(positions, width)`.

        Args:
            rows ([`EncodedBatch`]): The texts.
            state ([`HiddenState`]): Their output of `run_below`.
        """
        if self.head is None:
            return logits_of(self.split, rows, state)
        return projected(self.split, self.split.inputs_of(rows), state, rows.places, self.head)

    def nll(self, read: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Return the negative log-likelihood of a token at each position, in nats.

        Args:
            read (`Sequence[torch.Tensor]`): What was read of each batch, `(positions, width)`.
            labels (`Sequence[torch.Tensor]`): Its tokens, `(positions,)`.
        """
        if self.head is None:
            return [
                nn.functional.cross_entropy(one.float(), label.to(one.device), reduction="none")
                for one, label in zip(read, labels, strict=True)
            ]
        return self._at_each(read, torch.cat([*labels]).to(read[0].device), None)

    def kl(self, edited: Sequence[torch.Tensor], base: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Return `KL(base || edited)` at each position, in nats. No gradient flows into `base`.

        Args:
            edited, base (`Sequence[torch.Tensor]`): What was read of each batch, `(positions, width)`, under edits and
                without them.
        """
        if self.head is None:
            return [kl_divergence(one, other) for one, other in zip(edited, base, strict=True)]
        if not edited:
            return []
        return self._at_each(edited, None, torch.cat([*base]).to(edited[0].device, edited[0].dtype))

    def _at_each(
        self, read: Sequence[torch.Tensor], labels: torch.Tensor | None, base: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The loss of all batches in one product with the vocabulary, which is as wide as a small model's blocks."""
        loss: Any = _AtEach.apply
        values: torch.Tensor = loss(torch.cat([*read]), self.head.weight, self.head.bias, labels, base)
        return [*values.split([len(one) for one in read])]


class _AtEach(torch.autograd.Function):
    """
    The loss at each position, from the vocabulary projection's input; the projection has no gradient. A position's
    loss depends on that position alone, so that its gradient is known with it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        read: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor | None,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        values: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for start in range(0, len(read), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = nn.functional.linear(read[part], weight, bias).float()
            if labels is not None:
                value, gradient = _nll_and_gradient(logits, labels[part])
            else:
                assert base is not None
                value, gradient = _kl_and_gradient(logits, nn.functional.linear(base[part], weight, bias).float())
            values.append(value)
            if ctx.needs_input_grad[0]:
                gradients.append(gradient.to(weight.dtype) @ weight)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).to(read.dtype))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, at_each: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * at_each[:, None].to(gradient.dtype), None, None, None, None


def _nll_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and in the logits' memory its gradient: the probabilities, less one where the label is."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    chosen = labels[:, None]
    value = (normaliser - logits.gather(-1, chosen))[:, 0]
    gradient = logits.sub_(normaliser).exp_()
    return value, gradient.scatter_add_(-1, chosen, torch.full_like(value, -1.0)[:, None])


def _kl_and_gradient(logits: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence, and in the logits' memory its gradient: the difference of the probabilities."""
    logits.sub_(logits.logsumexp(-1, keepdim=True))
    base.sub_(base.logsumexp(-1, keepdim=True))
    probabilities = base.exp()
    value = torch.linalg.vecdot(probabilities, base.sub_(logits))
    return value, logits.exp_().sub_(probabilities)


def last_mlp(split: SplitModel) -> nn.Module | None:
    """Return the MLP of the last block, behind which each token is for itself; `None` where none is found."""
    lists = {block_list.kind: block_list for block_list in split.block_lists}
    block = lists["decoder"].blocks[-1]
    for name, module in block.named_modules():
        if MLP_NAME.search(name) and not ATTENTION_NAME.search(name):
            inner = [*module.parameters()]
            if any(weight.dim() > 1 for weight in inner) and not any(weight.is_meta for weight in inner):
                return module
    return None


def readout_of(split: SplitModel, rows: EncodedBatch, below: Callable[[EncodedBatch], HiddenState]) -> Readout:
    """Return the readout of a model, which is made once. The arguments are those of [`Readout`]."""
    if split.readout is None:
        split.readout = Readout(split, rows, below)
    found: Readout = split.readout
    return found


@contextmanager
def narrowed(mlp: nn.Module | None, rows: EncodedBatch) -> Iterator[None]:
    """
    Run a module at the rows' positions alone within the context, as many for each row: those that are missing in a row
    are filled up. Its output elsewhere is zero.

    Args:
        mlp (`nn.Module`, *optional*): A module that treats each token for itself; with none, nothing changes.
        rows ([`EncodedBatch`]): The texts.
    """
    if mlp is None:
        yield
        return
    slots = Slots(rows)

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return slots.narrow(args[0]), *args[1:]

    def widen(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return slots.widen(output)

    with ExitStack() as hooks:
        hooks.enter_context(hooked(mlp.register_forward_pre_hook, narrow))
        hooks.enter_context(hooked(mlp.register_forward_hook, widen))
        yield


class Slots:
    """
    As many places for each row as the row with the most positions has.

    Args:
        rows ([`EncodedBatch`]): The texts.
    """

    def __init__(self, rows: EncodedBatch):
        self.rows, self.length = rows.positions.shape
        places = rows.places
        self.width = max(places.counts)
        slots = [row * self.width + i for row, count in enumerate(places.counts) for i in range(count)]
        self.is_full = len(slots) == self.rows * self.width
        missing = self.rows * self.length
        # Where each slot lies among all tokens: an empty one behind the last.
        self.put = places.positions.new_full((self.rows * self.width,), missing)
        self.put[torch.tensor(slots, device=self.put.device)] = places.positions
        self.take = self.put.clamp(max=missing - 1)

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens in the slots, `(rows, seq, width)` -> `(rows, slots, width)`; empty ones hold any."""
        if x.dim() != 3 or x.shape[:2] != (self.rows, self.length):
            raise ValueError(f"the MLP's input has the shape {tuple(x.shape)}, not {(self.rows, self.length)} tokens")
        taken = x.reshape(-1, x.shape[-1]).index_select(0, self.take.to(x.device))
        return taken.reshape(self.rows, self.width, -1)

    def widen(self, y: torch.Tensor) -> torch.Tensor:
        """Return what is in the slots at its tokens, and zero at the others; undoes [`narrow`]."""
        whole = y.new_zeros(self.rows * self.length + 1, y.shape[-1])
        whole = whole.index_copy(0, self.put.to(y.device), y.reshape(-1, y.shape[-1]))
        return whole[:-1].reshape(self.rows, self.length, -1)
