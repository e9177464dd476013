"""The split pass: a model runs up to a block, and from that block on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from ..data.encoding import IGNORE, EncodedBatch
from ..data.places import on_device
from .beginnings import Group, expanded, groups_of, inputs_behind, keeps_all
from .by_length import in_processes, parts_by_length
from .caches import cache_name, continued, rows_of_cache, takes_positions
from .compiled import compiled_blocks, kept
from .known_mask import mask_of_ones
from .quantized import unusual_layers
from .targets import Target, block_lists, lowest_block
from .threads import StopForwardError, ending_before, ends_early, hooked, replaced_forward
from .weights import device_of


logger = logging.get_logger(__name__)

# Tolerated difference of two equal passes' logits, as a share of the largest: rounding only.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# Their blocks take `(seq, rows, width)`, so that rows cannot be told apart in a layer's input.
_TOKENS_FIRST = frozenset({"xlnet"})

Inputs = Mapping[str, torch.Tensor]


@dataclass
class HiddenState:
    """
    The state of a forward pass at the lowest edited block.

    Args:
        hidden (`torch.Tensor` of shape `(rows, seq, width)`): The input of that block.
        encoder (`torch.Tensor` of shape `(rows, source, width)`, *optional*): The encoder's output, when the block is
            one of the decoder's.
        cache (`transformers.Cache`, *optional*): Keys and values of tokens that stand before these, in the blocks from
            that one on.
        answers (`tuple[EncodedBatch, HiddenState]`, *optional*): The rows' answers alone, behind what stands before
            them: see [`~hf_mend.bases.prefix.answers_behind`].
    """

    hidden: torch.Tensor
    encoder: torch.Tensor | None = None
    cache: Any = None
    answers: tuple[EncodedBatch, HiddenState] | None = None

    def rows(self, index: slice | torch.Tensor) -> HiddenState:
        """Return the state of some of the rows."""
        encoder = None if self.encoder is None else self.encoder[index]
        cache = None if self.cache is None else rows_of_cache(self.cache, index)
        answers = None if self.answers is None else (self.answers[0][index], self.answers[1].rows(index))
        return HiddenState(self.hidden[index], encoder, cache, answers)

    def of_facts(self, facts: torch.Tensor, rows: EncodedBatch) -> HiddenState:
        """
        Return the state of some of the facts' rows.

        Args:
            facts (`torch.Tensor` of shape `(facts,)`): Their numbers, in the host's memory.
            rows ([`EncodedBatch`]): All rows.
        """
        found = self.rows(on_device(rows.rows_of(facts), self.hidden.device))
        if self.answers is None or found.answers is None:
            return found
        return replace(found, answers=(self.answers[0].of_facts(facts), found.answers[1]))


class SplitModel:
    """
    Run a model up to a block, and from that block on, through the model's own `forward`.

    The first use checks that both halves together give the whole pass's logits; where they do not, one warning says so
    and every pass runs the whole model.

    The model's own code computes embeddings, masks, position ids and rotary tables in both halves. In the second half
    the blocks below the cut return their input, and the cut block gets the stored hidden state. Where blocks return
    tuples (T5 hands its position bias from block to block), the first block does run, and the ones between return the
    further values of its output beside their input.

    Args:
        model (`nn.Module`): A causal or seq2seq model of transformers.
        targets (`Sequence[Target]`): The edited layers; the lowest of them decides where to cut.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]):
        self.model: Any = model
        kind, self.block = lowest_block(targets)
        self.block_lists = block_lists(model)  # which takes as long as half a short pass
        lists = {block_list.kind: block_list for block_list in self.block_lists}
        self.blocks = lists[kind].blocks
        self.cuts_decoder_of_two = kind == "decoder" and "encoder" in lists
        config: Any = model.config
        self.tokens_first: bool = config.model_type in _TOKENS_FIRST
        self.unusual_layers = unusual_layers(model)
        self._returns_tuple: bool | None = None
        self._resumes: bool | None = None  # not checked yet
        self._needs_mask = True
        self.readout: Any = None  # of a loss: see bases.readout
        self.head_is_plain: bool | None = None  # not checked yet: see bases.projection
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.cache_name = cache_name(model)
        self.takes_positions = takes_positions(model)
        self.goes_on: bool | None = None  # from its cache; not checked yet: see bases.prefix
        self._shares: bool | None = None  # not checked yet
        self.begins_alike = False  # may texts share what they begin with from the cut on, too? See bases.prefix

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return device_of(self.model.get_input_embeddings())

    def inputs_of(self, rows: EncodedBatch) -> Inputs:
        """
        Return the arguments of the model for a batch. Where padding, which stands at the end, changes no token before
        it, nothing is masked, and the model is told so: it would look into the mask, and the host wait for it.
        """
        if self._needs_mask or not rows.places.pads_right:
            return rows.inputs
        return {**rows.inputs, "attention_mask": mask_of_ones(rows.inputs["attention_mask"])}

    @torch.no_grad()
    def state_of(self, rows: EncodedBatch) -> HiddenState:
        """
        Return the output of `run_below` for a batch; on a CPU, what texts begin with alike runs once, and texts of
        about the same length run together.

        Args:
            rows ([`EncodedBatch`]): The texts.
        """
        apart = set(rows.inputs) == {"input_ids", "attention_mask"} and rows.places.pads_right
        if not apart or self.tokens_first:
            return self.run_below(self.inputs_of(rows))
        if self._resumes is None:
            self.run_below(rows[:1].inputs)  # which checks; from then on a text runs in the same way
        lengths = rows.places.lengths
        groups = [Group([*range(len(rows))])]
        if len(rows) > 1 and self.shares(rows):  # a token is left to each text
            groups = groups_of(rows.inputs["input_ids"], [n - 1 for n in lengths])
        parts = [
            (group, parts_by_length([lengths[i] - group.tokens for i in group.rows], self.device)) for group in groups
        ]
        if len(parts) == 1 and len(parts[0][1]) == 1 and not groups[0].tokens:
            return self.run_below(self.inputs_of(rows))
        hidden: torch.Tensor | None = None
        for group, of_group in parts:
            beginning = self._beginning_below(rows, group)
            for part in of_group:
                index = torch.tensor(sorted(group.rows[k] for k in part), device=rows.positions.device)
                values = self._behind(rows, index, max(lengths[group.rows[k]] for k in part), beginning)
                if hidden is None:
                    hidden = values.new_zeros(*rows.positions.shape, values.shape[-1])
                hidden[index, : values.shape[1]] = values
        assert hidden is not None
        return HiddenState(hidden)

    def _beginning_below(self, rows: EncodedBatch, group: Group) -> tuple[torch.Tensor, Any] | None:
        """Run what some texts begin with below the cut: its hidden states `(1, tokens, width)`, and a cache."""
        if not group.tokens:
            return None
        first = torch.tensor(group.rows[:1], device=rows.positions.device)
        inputs = inputs_behind(rows.inputs, first, 0, group.tokens, False, False)
        cache = DynamicCache(config=self.model.config)
        return self.run_below(inputs, cache).hidden, cache

    def _behind(
        self, rows: EncodedBatch, index: torch.Tensor, width: int, beginning: tuple[torch.Tensor, Any] | None
    ) -> torch.Tensor:
        """The hidden states of some texts, `(texts, width, ...)`, of what they begin with those that are known."""
        start = 0 if beginning is None else beginning[0].shape[1]
        inputs = inputs_behind(rows.inputs, index, start, width, self._needs_mask, self.takes_positions)
        if beginning is None:
            return self.run_below(inputs).hidden
        known, cache = beginning
        own = self.run_below(inputs, expanded(cache, len(index))).hidden
        return torch.cat([known.expand(len(index), -1, -1), own], 1)

    def shares(self, rows: EncodedBatch) -> bool:
        """
        Whether texts may go on from what they begin with, run once: on a CPU, where the blocks below the cut then give
        the same hidden states, which the first use checks.

        Args:
            rows ([`EncodedBatch`]): Texts, of which the first is tried.
        """
        if self.device.type != "cpu" or in_processes() or not self.block:
            return False
        if self._shares is None:
            self._shares = self._may_share(rows)
        return self._shares

    def _may_share(self, rows: EncodedBatch) -> bool:
        if self.cuts_decoder_of_two or not self.cache_name or any(p.is_meta for p in self.model.parameters()):
            return False
        length = int(rows.inputs["attention_mask"][0].sum())
        ids = rows.inputs["input_ids"][:1, :length].repeat(2, -(-6 // length))
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        tried = EncodedBatch(inputs, torch.full_like(ids, IGNORE), mask.bool())
        start = ids.shape[1] // 2
        try:
            if not keeps_all(self.model.config):
                return False
            with torch.autocast(self.device.type, enabled=False):
                whole = self.run_below(inputs).hidden[:, start:]
                beginning = self._beginning_below(tried, Group([0, 1], start))
                found = self._behind(tried, torch.arange(2), ids.shape[1], beginning)[:, start:]
        except (
            Exception
        ):  # foreign code that takes no such cache; memory that runs out here does so in the pass itself
            return False
        here = mask.bool()[:, start:]
        return same_logits(found[here], whole[here])

    @torch.no_grad()
    def run_below_further(self, rows: EncodedBatch) -> tuple[HiddenState, HiddenState | None]:
        """
        Run the blocks that no edit changes once, for `rows` and for its `further`.

        Returns:
            `tuple`: The output of `run_below` for `rows` and for `rows.further`; of the latter `None` where there is
            none, or where a token more could change what a model says before it.
        """
        further = rows.further
        if further is None or self._resumes is not None and not self._looks_back(rows):
            return self.state_of(rows), None
        state = self.state_of(further)
        hidden, name = state.hidden, "decoder_input_ids" if self.cuts_decoder_of_two else "input_ids"
        if not self._looks_back(rows) or hidden.shape[1] != further.inputs[name].shape[1]:
            return self.state_of(rows), None
        return HiddenState(hidden[:, : rows.inputs[name].shape[1]], state.encoder), state

    def _looks_back(self, rows: EncodedBatch) -> bool:
        """Whether each token of an answer depends on earlier ones alone, as the first use has found."""
        return "decoder_input_ids" in rows.inputs or not self._needs_mask

    @torch.no_grad()
    def run_below(self, inputs: Inputs, into: Any = None) -> HiddenState:
        """
        Run the blocks that no edit changes, without a gradient.

        Args:
            inputs (`Mapping[str, torch.Tensor]`): The model's arguments.
            into (`transformers.Cache`, *optional*): A cache to go on from, which gets these blocks' keys and values.

        Raises:
            ValueError: The model does not run that block on text.
        """
        found: dict[str, torch.Tensor] = {}

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found["hidden"] = args[0] if args else kwargs["hidden_states"]
            raise StopForwardError

        def note_type(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)

        def keep_encoder(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found["encoder"] = output[0]

        with ExitStack() as hooks:
            hooks.enter_context(hooked(self.blocks[self.block].register_forward_pre_hook, stop, with_kwargs=True))
            if self.block:
                hooks.enter_context(hooked(self.blocks[self.block - 1].register_forward_hook, note_type))
            if self.cuts_decoder_of_two:
                hooks.enter_context(hooked(self.model.get_encoder().register_forward_hook, keep_encoder))
            if into is None:
                hooks.enter_context(self._compiled(self.blocks[: self.block]))
            with ends_early(), ending_before(self.blocks[self.block]):
                self.model(**inputs, **self._with_cache(into))
        if "hidden" not in found:
            raise ValueError(
                f"{type(self.model).__name__} does not run its edited block {self.block} on text; name others in "
                "target_modules, or pass the part of it that is a language model"
            )
        state = HiddenState(kept(found["hidden"]), found.get("encoder"))
        if self._resumes is None:
            self._resumes = self._check(inputs, state)
            self._needs_mask = not self._runs_without_mask(inputs)
        return state

    def _check(self, inputs: Inputs, state: HiddenState) -> bool:
        """Whether a pass from the stored state gives the whole pass's logits in this architecture."""
        whole = self.model(**inputs, use_cache=False).logits
        tokens = inputs.get("decoder_input_ids", inputs["input_ids"])
        if whole.shape[:-1] != tokens.shape:  # a diffusion model's, say
            raise ValueError(
                f"{type(self.model).__name__} gives logits at positions {tuple(whole.shape[:-1])} for tokens "
                f"{tuple(tokens.shape)}, so they are not those of each token's next one, and it cannot be edited; "
                "pass a model that predicts text from left to right"
            )
        try:
            resumed = self._resume(inputs, state).logits
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            if same_logits(resumed, whole):
                return True
            reason = f"logits differ by {float((whole.float() - resumed.float()).abs().max()):.3g}"
        logger.warning(
            f"{type(self.model).__name__} cannot be run from block {self.block} on ({reason}); every pass runs the "
            "whole model instead, which is slower and as exact"
        )
        return False

    def _runs_without_mask(self, inputs: Inputs) -> bool:
        """Whether padding behind a text changes none of its logits, though no mask tells of it."""
        if set(inputs) != {"input_ids", "attention_mask"} or self.tokens_first or self.cuts_decoder_of_two:
            return False
        if any(parameter.is_meta for parameter in self.model.parameters()):
            return False  # offloaded: a further pass would cost more than is won
        length = int(inputs["attention_mask"][0].sum())
        ids = torch.cat([inputs["input_ids"][:1, :length], inputs["input_ids"][:1, :2]], 1)
        mask = torch.ones_like(ids)
        mask[:, length:] = 0
        try:
            masked = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            plain = self.model(input_ids=ids, attention_mask=mask_of_ones(mask), use_cache=False).logits
        except Exception:  # a longer text than the model takes, or foreign code that takes no such mask
            return False
        return same_logits(plain[:, :length], masked[:, :length])

    @property
    def resumes(self) -> bool:
        """Whether a pass from a stored state gives the whole pass's logits, as the first use has found."""
        return bool(self._resumes)

    def run_above(self, inputs: Inputs, state: HiddenState, into: Any = None) -> Any:
        """
        Return the model's output from the stored hidden state on. Gradients flow if they are enabled.

        Args:
            inputs (`Mapping[str, torch.Tensor]`): The model's arguments, of the same rows as `state`.
            state ([`HiddenState`]): Their output of `run_below`, with the cache to go on from, if any.
            into (`transformers.Cache`, *optional*): An empty cache, which gets the keys and values.
        """
        if not self._resumes:
            return self.model(**inputs, use_cache=False)
        if into is None and state.cache is not None:
            into = continued(state.cache)
        return self._resume(inputs, state, into)

    def _with_cache(self, cache: Any) -> dict[str, Any]:
        """The arguments by which a pass goes on from a cache, and fills it; without one it keeps none."""
        return {"use_cache": False} if cache is None else {"use_cache": True, str(self.cache_name): cache}

    def _resume(self, inputs: Inputs, state: HiddenState, cache: Any = None) -> Any:
        beside: list[Any] = []

        def use_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (state.hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": state.hidden}

        def note_first(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            beside[:] = output[1:]

        def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states, *beside) if self._returns_tuple else hidden_states

        extra = self._with_cache(cache)
        if state.encoder is not None:
            extra["encoder_outputs"] = BaseModelOutput(last_hidden_state=state.encoder)
        with ExitStack() as undo:
            # Before other hooks of the block, which are to see the stored state too.
            block = self.blocks[self.block]
            undo.enter_context(hooked(block.register_forward_pre_hook, use_state, prepend=True, with_kwargs=True))
            first_skipped = 0
            if self._returns_tuple and self.block:
                undo.enter_context(hooked(self.blocks[0].register_forward_hook, note_first))
                first_skipped = 1
            for block in self.blocks[first_skipped : self.block]:
                undo.enter_context(replaced_forward(block, pass_on))
            if cache is None:
                undo.enter_context(self._compiled(self.blocks[self.block :]))
            return self.model(**inputs, **extra)

    @contextmanager
    def _compiled(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Run some blocks compiled within the context, if the user has asked for it."""
        compiled = compiled_blocks()
        if compiled is None or self._resumes is None:  # the first use checks the passes as they are
            yield
        else:
            with compiled.used(blocks):
                yield


def same_logits(found: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether logits are a model's, to rounding."""
    if found.shape != logits.shape:
        return False
    difference = (found.float() - logits.float()).abs().max()
    return bool(difference <= _TOLERANCE[logits.dtype] * logits.float().abs().max())


@contextmanager
def logits_at(model: Any, chosen: torch.Tensor) -> Iterator[None]:
    """
    Restrict the vocabulary projection to chosen positions within the context: logits have the shape `(1, chosen,
    vocab)`.

    With a large vocabulary the projection of every position otherwise dominates a short pass.

    Args:
        model (`nn.Module`): A model with output embeddings.
        chosen (`torch.Tensor`): The positions to keep: a mask of shape `(rows, seq)`, or their numbers, counted
            through all rows, for which nothing waits.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        hidden, own = args[0], chosen.to(args[0].device)
        if hidden.dim() == 4:  # ProphetNet's streams, of which the first predicts the next token
            return (_chosen(hidden[:, 0], own)[None, None],)  # (1, 1, chosen, width)
        return (_chosen(hidden, own).unsqueeze(0),)  # (1, chosen, width)

    with hooked(model.get_output_embeddings().register_forward_pre_hook, select):
        yield


def _chosen(hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of the chosen positions, `(chosen, width)`."""
    if chosen.dtype == torch.bool:
        return hidden[chosen]
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, chosen)


def logits_of(split: SplitModel, rows: EncodedBatch, state: HiddenState | None = None) -> torch.Tensor:
    """
    Return the logits at the positions of `rows`, `(positions, vocab)`.

    Args:
        split ([`SplitModel`]): The model.
        rows ([`EncodedBatch`]): The texts.
        state ([`HiddenState`], *optional*): Their output of `run_below`; computed when missing.
    """
    if state is None:
        state = split.state_of(rows)
    with logits_at(split.model, rows.places.positions):
        logits: torch.Tensor = split.run_above(split.inputs_of(rows), state).logits[0]
    return logits
