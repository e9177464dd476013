"""The factors of a fine-tuning gradient at chosen layers, and running a model from a given block on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .data import Rows
from .targets import Target, block_stacks, device_of, lowest_block


logger = logging.get_logger(__name__)

# How far logits of two equal passes may lie apart, as a share of the largest: rounding only.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Inputs = Mapping[str, torch.Tensor]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class _StopForwardError(Exception):
    """Ends a forward pass early; never leaves this module."""


@dataclass
class HiddenState:
    """
    Where a forward pass stands at the lowest edited block.

    Args:
        hidden (`torch.Tensor` of shape `(rows, seq, width)`): What enters that block.
        encoder (`torch.Tensor` of shape `(rows, source, width)`, *optional*): The encoder's output, when the block is
            one of the decoder's.
    """

    hidden: torch.Tensor
    encoder: torch.Tensor | None = None

    def rows(self, index: slice | torch.Tensor) -> HiddenState:
        """The same for some of the rows."""
        return HiddenState(self.hidden[index], None if self.encoder is None else self.encoder[index])


class SplitModel:
    """
    Runs a model up to a block, and from that block on, through the model's own `forward`.

    The first use checks that both halves together give the whole pass's logits; where they do not, one warning says so
    and every pass runs the whole model.

    The model's own code computes embeddings, masks, position ids and rotary tables in both halves. In the second half
    the blocks below the cut return what they are given, and the cut block gets the kept hidden state. Where blocks
    return tuples (T5 hands its position bias from block to block), the first block does run, and the ones between
    hand on what it returned beside its hidden state.

    Args:
        model (`nn.Module`): A causal or seq2seq model of transformers.
        targets (`Sequence[Target]`): The edited layers; the lowest of them decides where to cut.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]):
        self.model: Any = model
        kind, self.block = lowest_block(targets)
        stacks = {stack.kind: stack for stack in block_stacks(model)}
        self.blocks = stacks[kind].blocks
        self.cuts_decoder_of_two = kind == "decoder" and "encoder" in stacks
        self._returns_tuple: bool | None = None
        self._resumes: bool | None = None  # not checked yet

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return device_of(self.model.get_input_embeddings())

    @torch.no_grad()
    def run_below(self, inputs: Inputs) -> HiddenState:
        """
        The part that no edit changes, without a gradient.

        Args:
            inputs (`Mapping[str, torch.Tensor]`): The model's arguments.
        """
        found: dict[str, torch.Tensor] = {}

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found["hidden"] = args[0] if args else kwargs["hidden_states"]
            raise _StopForwardError

        def note_type(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)

        def keep_encoder(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found["encoder"] = output[0]

        with ExitStack() as hooks:
            hooks.enter_context(_hook(self.blocks[self.block].register_forward_pre_hook(stop, with_kwargs=True)))
            if self.block:
                hooks.enter_context(_hook(self.blocks[self.block - 1].register_forward_hook(note_type)))
            if self.cuts_decoder_of_two:
                hooks.enter_context(_hook(self.model.get_encoder().register_forward_hook(keep_encoder)))
            with suppress(_StopForwardError):
                self.model(**inputs, use_cache=False)
        state = HiddenState(found["hidden"], found.get("encoder"))
        if self._resumes is None:
            self._resumes = True
            self._resumes = self._check(inputs, state)
        return state

    def _check(self, inputs: Inputs, state: HiddenState) -> bool:
        """Whether a pass from the kept state gives the whole pass's logits in this architecture."""
        whole = self.model(**inputs, use_cache=False).logits
        try:
            resumed = self.run_above(inputs, state).logits
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            difference = (whole.float() - resumed.float()).abs().max()
            if difference <= _TOLERANCE[whole.dtype] * whole.float().abs().max():
                return True
            reason = f"logits differ by {float(difference):.3g}"
        logger.warning(
            f"{type(self.model).__name__} cannot be run from block {self.block} on ({reason}); every pass runs the "
            f"whole "
            "model instead, which is slower and as exact"
        )
        return False

    def run_above(self, inputs: Inputs, state: HiddenState) -> Any:
        """
        The model's output, from the kept hidden state on. Gradients flow if they are enabled.

        Args:
            inputs (`Mapping[str, torch.Tensor]`): The model's arguments, of the same rows as `state`.
            state ([`HiddenState`]): What `run_below` returned for them.
        """
        if not self._resumes:
            return self.model(**inputs, use_cache=False)
        beside: list[Any] = []

        def use_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (state.hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": state.hidden}

        def note_first(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            beside[:] = output[1:]

        def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states, *beside) if self._returns_tuple else hidden_states

        extra = {} if state.encoder is None else {"encoder_outputs": BaseModelOutput(last_hidden_state=state.encoder)}
        with ExitStack() as undo:
            undo.enter_context(_hook(self.blocks[self.block].register_forward_pre_hook(use_state, with_kwargs=True)))
            first_skipped = 0
            if self._returns_tuple and self.block:
                undo.enter_context(_hook(self.blocks[0].register_forward_hook(note_first)))
                first_skipped = 1
            for block in self.blocks[first_skipped : self.block]:
                undo.enter_context(_replaced_forward(block, pass_on))
            return self.model(**inputs, **extra, use_cache=False)


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Gives a module another `forward` for a while; Accelerate's own replacement, if any, comes back after it."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def _recomputed_if_offloaded(model: nn.Module) -> Iterator[None]:
    """
    Within the context, the blocks of an offloaded model run again in the backward pass instead of keeping their
    weights for it: else all weights above the first target would be in memory at once.
    """
    with ExitStack() as undo:
        for stack in block_stacks(model):
            for block in stack.blocks:
                if any(parameter.is_meta for parameter in block.parameters()):
                    undo.enter_context(_replaced_forward(block, partial(_recomputed, block.forward)))
        yield


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # To the end, not just as far as is needed: after it Accelerate takes the weights away again.
    with set_checkpoint_early_stop(False):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def logits_at(model: Any, mask: torch.Tensor) -> Iterator[None]:
    """
    Within the context, the vocabulary projection sees the chosen positions only: logits come as `(1, chosen, vocab)`.

    With a large vocabulary the projection of every position otherwise dominates a short pass.

    Args:
        model (`nn.Module`): A model with output embeddings.
        mask (`torch.Tensor` of shape `(rows, seq)`, bool): The positions to keep, in row-major order.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (args[0][mask.to(args[0].device)].unsqueeze(0),)  # (1, chosen, width)

    with _hook(model.get_output_embeddings().register_forward_pre_hook(select)):
        yield


@contextmanager
def record_factors(targets: Sequence[Target]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """
    Records the input and the output of each target layer in the passes within the context.

    The first target that a pass meets starts autograd's graph: nothing below it is kept. Yields a dictionary from
    the layer's name to `[x, y]`, where `y` is part of the graph.
    """
    record: dict[str, list[torch.Tensor]] = {}

    def make(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            record.setdefault(name, [args[0].detach().to(output.device), output])  # a recomputed pass comes second
            return output.clone()  # Falcon adds to a layer's output in place

        return keep

    with ExitStack() as hooks:
        for target in targets:
            hooks.enter_context(_hook(target.module.register_forward_hook(make(target.name))))
        yield record


def trace(
    split: SplitModel,
    targets: Sequence[Target],
    inputs: Inputs,
    next_tokens: torch.Tensor,
    state: HiddenState | None = None,
) -> tuple[Factors, torch.Tensor]:
    """
    The factors of each row's fine-tuning gradient: `dL/dW = sum_t delta_t x_t^T` (Mitchell et al. 2022, section 3.1).

    A row's loss is the negative log-likelihood of its target, summed over the target's tokens. The backward pass ends
    at the lowest target and asks for the gradients of the targets' outputs alone: no weight gradient is ever formed.

    Args:
        split ([`SplitModel`]): The model; all its parameters are frozen.
        targets (`Sequence[Target]`): The layers.
        inputs (`Mapping[str, torch.Tensor]`): The model's arguments, padded on any side.
        next_tokens (`torch.Tensor` of shape `(rows, seq)`): The target token that each position must predict, -100
            where there is none.
        state ([`HiddenState`], *optional*): What `run_below` gave for these rows; computed when missing.

    Returns:
        `tuple`: The factors, name -> `(x, delta)` of shapes `(rows, seq, d_in)` and `(rows, seq, d_out)`, both zero
        where `delta` is; and the logits of the chosen positions, `(chosen, vocab)`.

    Raises:
        ValueError: No gradient reaches a layer.
    """
    mask = next_tokens != -100

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        labels = next_tokens[mask].to(logits.device)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    return gradient_factors(split, targets, inputs, mask, loss_of, state)


def gradient_factors(
    split: SplitModel,
    targets: Sequence[Target],
    inputs: Inputs,
    positions: torch.Tensor,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    state: HiddenState | None = None,
) -> tuple[Factors, torch.Tensor]:
    """
    [`trace`] for any loss that is a sum over rows.

    Args:
        split, targets, inputs, state: As for [`trace`].
        positions (`torch.Tensor` of shape `(rows, seq)`, bool): Where there are logits.
        loss_of (`Callable`): The loss, from the logits there, `(positions, vocab)`.
    """
    if state is None:
        state = split.run_below(inputs)
    with (
        torch.enable_grad(),
        record_factors(targets) as record,
        logits_at(split.model, positions),
        _recomputed_if_offloaded(split.model),
    ):
        logits = split.run_above(inputs, state).logits[0]  # (positions, vocab)
        loss = loss_of(logits)
        names = [target.name for target in targets if target.name in record]
        outputs = [record[name][1] for name in names]
        gradients = (
            torch.autograd.grad(loss, outputs, allow_unused=True) if loss.requires_grad else (None,) * len(names)
        )
    factors: Factors = {}
    rows = positions.shape[0]
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"no gradient reaches the layer {name!r}, so it cannot be edited: a layer above it passes none on, as "
                "some quantised layers do; load the base model in another quantisation or in bfloat16, or choose "
                "other target_modules"
            )
        x = record[name][0]
        x = x.reshape(rows, -1, x.shape[-1])  # OPT runs its MLP on (rows * seq, width)
        delta = gradient.reshape(rows, -1, gradient.shape[-1])
        x = x * (delta != 0).any(-1, keepdim=True)
        factors[name] = (x.float(), delta.float())
    return factors, logits.detach()


def logits_of(split: SplitModel, rows: Rows, state: HiddenState | None = None) -> torch.Tensor:
    """
    Logits at the positions of `rows` that matter, `(positions, vocab)`.

    Args:
        split ([`SplitModel`]): The model.
        rows ([`Rows`]): The texts.
        state ([`HiddenState`], *optional*): What `run_below` gave for them; computed when missing.
    """
    if state is None:
        state = split.run_below(rows.inputs)
    with logits_at(split.model, rows.positions):
        logits: torch.Tensor = split.run_above(rows.inputs, state).logits[0]
    return logits


def record_inputs(split: SplitModel, targets: Sequence[Target], rows: Rows) -> dict[str, torch.Tensor]:
    """
    What enters the target layers on ordinary text, padding left out.

    Args:
        split ([`SplitModel`]): The model.
        targets (`Sequence[Target]`): The layers.
        rows ([`Rows`]): The texts.

    Returns:
        `dict[str, torch.Tensor]`: Layer name -> `(tokens, d_in)`.
    """
    found: dict[str, torch.Tensor] = {}
    present = {
        "encoder": rows.inputs["attention_mask"].bool(),
        "decoder": rows.inputs["attention_mask"].bool(),
    }
    if "decoder_input_ids" in rows.inputs:
        present["decoder"] = rows.positions

    def make(target: Target) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            mask = present[target.stack]
            x = args[0].reshape(mask.shape[0], -1, args[0].shape[-1])
            found[target.name] = x[mask.to(x.device)].float()

        return keep

    with torch.no_grad(), ExitStack() as hooks, logits_at(split.model, rows.positions):
        for target in targets:
            hooks.enter_context(_hook(target.module.register_forward_pre_hook(make(target))))
        split.model(**rows.inputs, use_cache=False)
    return found
