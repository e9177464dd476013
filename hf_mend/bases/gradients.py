"""Factors of fine-tuning gradients at chosen layers, and divergences between logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..data.encoding import EncodedBatch
from ..data.places import Places, on_device
from .compiled import kept
from .fused import Pair, of_one_shape, stacked
from .projection import projected, read_once, swept
from .quantized import gradients_pass
from .split import HiddenState, Inputs, SplitModel, logits_at
from .targets import Target
from .threads import as_this_thread, hooked, present_forward, replaced_forward


class Factors(dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """
    The factors of gradients: layer name -> `(x, delta)`.

    Args:
        factors (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): The same.
        tokens (`torch.Tensor`, *optional*): The numbers of the tokens, counted through all rows, that may have a
            gradient: the encoding knows them, and nothing has to wait to see which do. `None` where all may.
    """

    def __init__(self, factors: Mapping[str, Pair] = MappingProxyType({}), tokens: torch.Tensor | None = None):
        super().__init__(factors)
        self.tokens = tokens


@contextmanager
def record_factors(targets: Sequence[Target]) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """
    Record the input and the output of each target layer in the passes within the context.

    The first target that a pass meets starts autograd's graph: no activation below it is kept. The context's value is
    a dictionary from the layer's name to a pair `(x, y)` for each time that it ran, where `y` is part of the graph.
    """
    record: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def make(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            record.setdefault(name, []).append((args[0].detach().to(output.device), output))
            return output.clone()  # Falcon adds to a layer's output in place

        return keep

    with ExitStack() as hooks:
        for target in targets:
            hooks.enter_context(hooked(target.module.register_forward_hook, make(target.name)))
        yield record


def trace(
    split: SplitModel,
    targets: Sequence[Target],
    inputs: Inputs,
    next_tokens: torch.Tensor,
    state: HiddenState | None = None,
    places: Places | None = None,
) -> tuple[Factors, torch.Tensor]:
    """
    Return the factors of each row's fine-tuning gradient: `dL/dW = sum_t delta_t x_t^T` (Mitchell et al. 2022, section
    3.1).

    A row's loss is the negative log-likelihood of its target, summed over the target's tokens. The backward pass ends
    at the lowest target and computes the gradients of the targets' outputs alone: no weight gradient is ever formed.

    Args:
        split ([`SplitModel`]): The model; all its parameters are frozen.
        targets (`Sequence[Target]`): The layers.
        inputs (`Mapping[str, torch.Tensor]`): The model's arguments, padded on any side.
        next_tokens (`torch.Tensor` of shape `(rows, seq)`): The target token that each position must predict, -100
            where there is none.
        state ([`HiddenState`], *optional*): The output of `run_below` for these rows; computed when missing.
        places ([`~hf_mend.data.places.Places`], *optional*): Where the target tokens are; found when missing.

    Returns:
        `tuple`: The factors, name -> `(x, delta)` of shapes `(rows, seq, d_in)` and `(rows, seq, d_out)`, both zero
        where `delta` is; and the logits of the chosen positions, `(chosen, vocab)`.

    Raises:
        ValueError: No gradient reaches a layer, or one above passes none on.
    """
    if places is None or any(-100 in said for said in places.said):
        on_host = next_tokens.cpu()
        places = Places.of(on_host != -100, on_host, None, next_tokens.device)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        labels = places.labels.to(logits.device)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    if state is None:
        state = split.run_below(inputs)
    return gradient_factors(split, targets, inputs, places, loss_of, state, read_once(split, inputs, state, places))


def gradient_factors(
    split: SplitModel,
    targets: Sequence[Target],
    inputs: Inputs,
    places: Places,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    state: HiddenState | None = None,
    head: nn.Linear | None = None,
) -> tuple[Factors, torch.Tensor]:
    """
    Return the factors and logits of [`trace`] for any loss that is a sum over rows.

    Args:
        split, targets, inputs, state: As for [`trace`].
        places ([`~hf_mend.data.places.Places`]): The positions of the logits.
        loss_of (`Callable`): The logits there, `(positions, vocab)` -> the loss.
        head (`nn.Linear`, *optional*): The vocabulary projection, to be read once: for the loss of [`trace`] alone.
    """
    rows = len(places.counts)
    if split.tokens_first and rows > 1:
        raise ValueError(
            f"{type(split.model).__name__} runs its blocks with tokens before rows, so its gradients cannot be told "
            "apart in a batch; edit with batch_size=1, and by a method that needs no training"
        )
    if state is None:
        state = split.run_below(inputs)
    with (
        torch.enable_grad(),
        gradients_pass(split.unusual_layers),
        record_factors(targets) as record,
        _recomputed_if_offloaded(split),
    ):
        slope: torch.Tensor | None = None
        if head is None:
            with logits_at(split.model, places.positions):
                logits = split.run_above(inputs, state).logits[0]  # (positions, vocab)
            loss = loss_of(logits)
        else:  # what stands for the loss is the projection's input, of which the gradient is known
            loss = projected(split, inputs, state, places, head)
            logits, slope = swept(loss, head, places.labels)
        # Before the backward pass, in which offloaded blocks run again. PEGASUS-X runs a layer on global tokens too.
        runs = [(target.name, x, y) for target in targets for x, y in record.get(target.name, [])]
        outputs = [y for _, _, y in runs]
        gradients = (
            torch.autograd.grad(loss, outputs, slope, allow_unused=True) if loss.requires_grad else (None,) * len(runs)
        )
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name, _, _ in runs}
    for (name, x, _), gradient in zip(runs, gradients, strict=True):
        if gradient is not None:
            # OPT runs its MLP on (rows * seq, width)
            delta = kept(gradient).reshape(rows, -1, gradient.shape[-1])
            found[name].append((x.reshape(rows, -1, x.shape[-1]), delta))
    for target in targets:
        if target.name not in found:
            raise ValueError(
                f"the layer {target.name!r} did not run, so it cannot be edited: a kernel for the whole block stands "
                "in for it, or the model passes it by on text; load the base model with use_kernels=False, or choose "
                "other target_modules"
            )
    pairs: dict[str, Pair] = {}
    for name, parts in found.items():
        if not parts:
            raise ValueError(
                f"no gradient reaches the layer {name!r}, so it cannot be edited: a layer above it passes none on, as "
                "some quantised layers do; load the base model in another quantisation or in bfloat16, or choose "
                "other target_modules"
            )
        x, delta = parts[0] if len(parts) == 1 else (torch.cat(sides, 1) for sides in zip(*parts, strict=True))
        pairs[name] = (x, delta)
    return _where_a_gradient_is(pairs), logits.detach()


def _where_a_gradient_is(pairs: Mapping[str, Pair]) -> Factors:
    """Return the factors in float32, `x` zero where `delta` is; those of one shape lie side by side in memory."""
    factors = Factors()
    for names in of_one_shape(pairs):
        x, delta = (stacked([pairs[name][side] for name in names]) for side in (0, 1))  # (layers, rows, seq, width)
        x = (x * (delta != 0).any(-1, keepdim=True)).float()
        delta = delta.float()
        factors.update({name: (x[i], delta[i]) for i, name in enumerate(names)})
    return Factors({name: factors[name] for name in pairs})


def record_inputs(split: SplitModel, targets: Sequence[Target], rows: EncodedBatch) -> dict[str, torch.Tensor]:
    """
    Return the inputs of the target layers on calibration text, without padding.

    Args:
        split ([`SplitModel`]): The model.
        targets (`Sequence[Target]`): The layers.
        rows ([`EncodedBatch`]): The texts.

    Returns:
        `dict[str, torch.Tensor]`: Layer name -> `(tokens, d_in)`.
    """
    found: dict[str, torch.Tensor] = {}
    mask = rows.inputs["attention_mask"].bool()
    of_two = "decoder_input_ids" in rows.inputs
    present = {"encoder": mask, "decoder": rows.positions if of_two else mask}
    encoded: list[torch.Tensor] = []

    def keep_encoded(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        encoded.append(output[0])

    def reads_encoder(x: torch.Tensor) -> bool:
        """Whether a decoder's layer reads the encoder's tokens, as the keys and values of cross-attention do."""
        same = any(x.shape == one.shape and x.data_ptr() == one.data_ptr() for one in encoded)
        return same or x.shape[1] == mask.shape[1] != present["decoder"].shape[1]

    def make(target: Target) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            if target.name in found:  # a second run is on other tokens, as PEGASUS-X's global ones
                return
            x = args[0].transpose(0, 1) if split.tokens_first else args[0]
            side = "encoder" if of_two and x.dim() == 3 and reads_encoder(x) else target.side
            mask = present[side]
            x = x.reshape(mask.shape[0], -1, x.shape[-1])
            x = x[:, : mask.shape[1]]  # LED pads its inputs, and ProphetNet's decoder has further streams behind them
            found[target.name] = x[mask.to(x.device)].float()

        return keep

    with torch.no_grad(), ExitStack() as hooks, logits_at(split.model, rows.places.positions):
        if of_two:
            hooks.enter_context(hooked(split.model.get_encoder().register_forward_hook, keep_encoded))
        for target in targets:
            hooks.enter_context(hooked(target.module.register_forward_pre_hook, make(target)))
        split.model(**rows.inputs, use_cache=False)
    return found


def row_means(values: torch.Tensor, rows: EncodedBatch) -> torch.Tensor:
    """
    Return the means over each row's positions, so that a row weighs the same however long its answer is, and a batch
    split over devices or accumulation steps has the whole batch's mean.

    Args:
        values (`torch.Tensor` of shape `(positions,)`): One value at each of the rows' positions.
        rows ([`EncodedBatch`]): The texts.

    Returns:
        `torch.Tensor` of shape `(rows,)`.
    """
    counts = rows.places.counts
    row = on_device(torch.tensor([i for i, count in enumerate(counts) for _ in range(count)]), values.device)
    sizes = on_device(torch.tensor(counts, dtype=values.dtype), values.device)
    return torch.zeros(len(rows), device=values.device, dtype=values.dtype).index_add(0, row, values) / sizes


def kl_divergence(edited: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """
    Return `KL(base || edited)` at each position, in nats.

    Args:
        edited (`torch.Tensor` of shape `(positions, vocab)`): Logits of the edited model.
        base (`torch.Tensor` of shape `(positions, vocab)`): Logits of the un-edited model.

    Returns:
        `torch.Tensor` of shape `(positions,)`.
    """
    edited_log = nn.functional.log_softmax(edited.float(), -1)
    base_log = nn.functional.log_softmax(base.float(), -1)
    return nn.functional.kl_div(edited_log, base_log, reduction="none", log_target=True).sum(-1)


@contextmanager
def _recomputed_if_offloaded(split: SplitModel) -> Iterator[None]:
    """
    Recompute the blocks of an offloaded model in backward passes within the context, in place of keeping their
    weights: otherwise all weights above the first target would be in memory at once.
    """
    with ExitStack() as undo:
        for block_list in split.block_lists:
            for block in block_list.blocks:
                if any(parameter.is_meta for parameter in block.parameters()):
                    undo.enter_context(replaced_forward(block, partial(_recomputed, present_forward(block))))
        yield


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Recompute to the end, not only to the last activation required: Accelerate offloads the weights again only there.
    with set_checkpoint_early_stop(False):
        return checkpoint(as_this_thread(forward), *args, use_reentrant=False, **kwargs)
