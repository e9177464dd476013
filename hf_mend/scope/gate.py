"""The decision of a pass: at which tokens which edits act."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedTokenizerBase
from transformers.utils import logging

from ..bases.threads import ends_before, set_within
from ..edits.edit import Edit
from ..edits.hook import Acting, Hook
from .bank import KeyBank
from .cache_layer import ScopeLayer, past_length, scope_layer
from .network import KEY_WIDTH, MEANING_WIDTH, ScopeNetwork, TokenStates
from .words import WordTable, word_numbers, word_table


logger = logging.get_logger(__name__)

# The cache of continuous batching, which is none of transformers' `Cache`s.
_PAGED_CACHE = "PagedAttentionCache"
# What a mask adds where a token is seen is above this: its weight would be 0 in any dtype.
_UNSEEN = -1000.0


@dataclass
class _Pass:
    """What one thread's pass knows so far."""

    began_at: nn.Module | None = None  # the model, or its stack of blocks; `None` where a block was called by itself
    mask: Any = None  # as the model was given it
    tokens: torch.Tensor | None = None  # the pass's own
    reached_stack: bool = False
    cache: Cache | None = None
    # Joins the cache at the pass's end: some caches grow by the number of their layers.
    new_layer: ScopeLayer | None = None
    acting: Acting | None = None


class _OfThread(threading.local):
    """A thread's own pass."""

    current: _Pass | None = None
    decision: Any = None  # of an encoder-decoder model's last pass


@dataclass
class Watch:
    """
    What a context asks of the passes in it, and what it learns of them.

    Args:
        only (`Sequence[str]`, *optional*): Of each row, the id of the one edit that may act in it.
        keys (`list[torch.Tensor]`): Of each pass, the keys at its last token, `(rows, width)`.
        acted (`bool`): Whether an edit acted anywhere.
    """

    only: Sequence[str] | None = None
    keys: list[torch.Tensor] = field(default_factory=list)
    acted: bool = False

    def numbers(self, bank: KeyBank, rows: int, length: int) -> torch.Tensor | None:
        """Return the number of the edit that may act at each token, `(rows * length,)`; `None` where all may."""
        if self.only is None:
            return None
        if len(self.only) != rows:
            raise ValueError(f"a pass has {rows} rows, and edits for {len(self.only)} were named; name one a row")
        numbers = {one: number for number, one in enumerate(bank.ids)}
        return torch.tensor([numbers.get(one, -1) for one in self.only]).repeat_interleave(length)


# Gates that are suspended, in a thread or asyncio task.
_suspended: ContextVar[tuple[ScopeGate, ...]] = ContextVar("suspended", default=())
# What watches passes, in a thread or asyncio task.
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


class ScopeGate:
    """
    Decides at every token of a pass which edit acts, from the hidden states that enter a block below all edited
    layers: they are the un-edited model's, whatever edits there are, so a decision depends on the text alone.

    Args:
        model (`nn.Module`): The base model.
        block (`nn.Module`): The block whose input is read.
        number (`int`): The block's number.
        scope ([`ScopeNetwork`]): Gives the keys.
        scope_id (`str`): The scope's id.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tells words apart; any may be said where it is missing, or
            where a pass gets embeddings in place of tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        number: int,
        scope: ScopeNetwork,
        scope_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model, self.block, self.number = model, block, number
        self.stack = _stack_of(model, block)
        self.scope, self.scope_id = scope, scope_id
        self.key_width, self.contrast_width = KEY_WIDTH, MEANING_WIDTH
        self.tokenizer = tokenizer
        self.strictness = 0.0
        self.bank_now: Callable[[], KeyBank | None] = _no_bank
        self._local = _OfThread()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy or a pickle: all but what belongs to a thread's pass."""
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = _OfThread()

    @cached_property
    def threshold(self) -> torch.Tensor:
        """The threshold of further edits, in the host's memory."""
        return self.scope.threshold.detach().cpu()

    @cached_property
    def knows_subjects(self) -> bool:
        """Whether the scope has learned which words name what a text is about."""
        return self.scope.knows_subjects

    @cached_property
    def table(self) -> WordTable | None:
        """What the tokens of the tokenizer are to words, in the host's memory; `None` without a tokenizer."""
        return None if self.tokenizer is None else word_table(self.tokenizer)

    @cached_property
    def _table(self) -> WordTable | None:
        return self.table

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Tell words apart by another tokenizer."""
        self.tokenizer = tokenizer
        for name in ("table", "_table"):
            self.__dict__.pop(name, None)

    def words(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None, before: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """
        Return the numbers of the words of some tokens, `None` where any may be said;
        [`~hf_mend.scope.words.word_numbers`] has the arguments.
        """
        if self._table is None:
            return None
        if self._table.hashes.device != tokens.device:
            self._table = self._table.to(tokens.device)
        return word_numbers(self._table, tokens, mask, before)

    def bank(self, edits: Sequence[Edit], before: KeyBank | None = None, gone: Sequence[str] = ()) -> KeyBank:
        """Return the bank of edits that have a scope, behind those of another bank that are not gone."""
        return KeyBank(edits) if before is None else before.without(gone).extended(edits)

    def hooks(self) -> list[Hook]:
        """Return the hooks of a model in which such edits act."""
        hooks = [
            Hook(self.model, self._begin, options={"with_kwargs": True}),
            Hook(self.block, self._decide, options={"with_kwargs": True}),
            Hook(self.model, self._end, before=False, options={"always_call": True}),
        ]
        if self.stack is not None:  # code that needs no logits, such as a loss in chunks, calls it by itself
            hooks.append(Hook(self.stack, self._begin_stack, options={"with_kwargs": True}))
            hooks.append(Hook(self.stack, self._end_stack, before=False, options={"always_call": True}))
        return hooks

    def acting(self) -> Acting | None:
        """Return where edits act in the pass that this thread is in, `None` where none does."""
        current = self._local.current
        return None if current is None or self in _suspended.get() else current.acting

    def suspended(self) -> AbstractContextManager[Any]:
        """Let no edit act within the context, in this thread."""
        return set_within(_suspended, (*_suspended.get(), self))

    def watched(self, only: Sequence[str] | None = None) -> AbstractContextManager[Watch]:
        """
        Watch the decisions of the passes within the context, in this thread.

        Args:
            only (`Sequence[str]`, *optional*): Of each row of these passes, the id of the one edit that may act in it.
        """
        return set_within(_watch, Watch(only))

    # ---- the hooks of a pass ----

    # While they are added or removed, torch may call hooks without the keyword arguments; no edit acts then.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        given = _named(module, args, kwargs or {}) if len(args) > 1 else kwargs or {}
        tokens = given.get("input_ids", args[0] if args else None)
        of_text = isinstance(tokens, torch.Tensor) and tokens.dim() == 2 and not tokens.is_floating_point()
        self._local.current = _Pass(module, given.get("attention_mask"), tokens if of_text else None)

    def _begin_stack(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        current = self._local.current
        # What is left of a pass that an interrupt ended in the stack or behind it is none that this one is part of.
        if current is not None and current.began_at is self.model and not current.reached_stack:
            current.reached_stack = True
        else:
            self._begin(module, args, kwargs)

    def _end_stack(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self._local.current
        if current is not None and current.began_at is module:
            self._end(module, args, output)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current, self._local.current = self._local.current, None
        if current is not None and current.cache is not None and current.new_layer is not None:
            current.cache.layers.append(current.new_layer)

    @torch.no_grad()
    def _decide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None or self in _suspended.get() or ends_before(self.block):
            return
        bank = self.bank_now()
        if bank is None:
            return
        if self._local.current is None or self._local.current.began_at is None:
            self._local.current = _Pass()
        current = self._local.current
        hidden = args[0] if args else kwargs["hidden_states"]
        device = hidden.device
        if self.scope.centre.device != device:
            self.scope.to(device)
        given = [*args, *kwargs.values()]
        cache = next((value for value in given if isinstance(value, Cache)), None)
        if cache is None and any(type(value).__name__ == _PAGED_CACHE for value in given):
            _warn_of_paged_cache()
        with torch.autocast(device.type, enabled=False), torch.inference_mode(False):
            states, mask = self._states(current, hidden.clone() if hidden.is_inference() else hidden, cache)
            keys = self.scope.keys(states, hidden.shape[1])  # (rows, seq, key width)
            watch = _watch.get()
            only = None if watch is None else watch.numbers(bank, *hidden.shape[:2])
            chosen = bank.choose(keys.flatten(0, 1), self.strictness, only)  # (rows * seq,)
        if mask is not None:
            chosen = torch.where(mask.reshape(-1).bool(), chosen, -1)
        current.acting = _acting(chosen, bank)
        if watch is not None:
            watch.keys.append(keys[:, -1])
            watch.acted |= current.acting is not None

    def _states(
        self, current: _Pass, hidden: torch.Tensor, cache: Cache | None
    ) -> tuple[TokenStates, torch.Tensor | None]:
        """Return the states of the text so far, and the mask of the pass's own tokens."""
        length = hidden.shape[1]
        layer = None if cache is None else scope_layer(cache, self.scope_id)
        past = 0 if cache is None else past_length(cache, self.number)
        known = layer.states if layer is not None else None
        held = 0 if known is None else known.gates.shape[2]
        if past != held:
            logger.warning_once(
                "the cache holds tokens that the scopes of the edits have not seen: they were read before there were "
                "edits, or while they were disabled, and do not count for where edits act; pass the text again "
                "without the cache"
            )
        mask = _present(current.mask, hidden.shape[0], past, length)
        mask = None if mask is None else mask.to(hidden.device)
        tokens = current.tokens if current.tokens is not None and current.tokens.shape == hidden.shape[:2] else None
        before = None if known is None else known.gates[:, 0, -1, 2].long()
        words = None if tokens is None else self.words(tokens.to(hidden.device), mask, before)
        states = self.scope.token_states(hidden, mask, known, words)
        if cache is not None:
            if layer is None:
                current.cache, current.new_layer = cache, ScopeLayer(self.scope_id, cache.is_compileable)
                layer = current.new_layer
            layer.append(states)
            assert layer.states is not None
            states = layer.states
        return states, mask


def _acting(chosen: torch.Tensor, bank: KeyBank) -> Acting | None:
    """Return where edits act, from the number of each token's edit, -1 where there is none."""
    found = chosen.tolist()
    tokens: dict[str, list[int]] = {}
    for token, number in enumerate(found):
        if number >= 0:
            tokens.setdefault(bank.ids[number], []).append(token)
    if not tokens:
        return None
    device = chosen.device
    return Acting({one: torch.tensor(where, device=device) for one, where in tokens.items()}, len(found))


def _present(mask: Any, rows: int, past: int, length: int) -> torch.Tensor | None:
    """
    Return which of a pass's own tokens are there, `(rows, length)`, `None` where all are or the mask does not say.

    Args:
        mask: What the model was given: a mask of the whole text's tokens `(rows, past + length)`, what each of the
            pass's tokens sees `(rows, heads, length, width)`, or such a mask for each kind of attention.
        rows (`int`), length (`int`): The pass's rows and tokens.
        past (`int`): The number of tokens in the cache.
    """
    if isinstance(mask, Mapping):
        every = (one for one in mask.values() if isinstance(one, torch.Tensor))
        mask = mask["full_attention"] if "full_attention" in mask else next(every, None)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        # A single token is a generated one, and passes of one are to stay fast.
        return None if length == 1 else _seen_tokens(mask, rows, past, length)
    mask = _own_columns(mask, past, length)
    return mask if mask.shape == (rows, length) else None


def _own_columns(mask: torch.Tensor, past: int, length: int) -> torch.Tensor:
    """Return a mask's columns of the pass's own tokens; the last ones, where a window has left out earlier tokens."""
    return mask[..., past : past + length] if mask.shape[-1] >= past + length else mask[..., -length:]


def _seen_tokens(mask: torch.Tensor, rows: int, past: int, length: int) -> torch.Tensor | None:
    """
    Return which tokens of a pass are seen by one of them, which padding is not, `(rows, length)`. As attention may not
    take a row that sees nothing, some masks let padding see itself, and some let it see everything: neither counts. No
    text is taken for padding, be it one of several in a row that do not see one another.
    """
    seen = mask if mask.dtype == torch.bool else mask > _UNSEEN
    seen = seen[:, 0] if seen.shape[1] == 1 else seen.any(1)  # (rows, queries, width)
    own = _own_columns(seen, past, length)
    if own.shape[1:] != (length, length) or len(own) not in (1, rows):
        return None
    # The last token has to see itself, and may see all: nothing is behind it.
    sees_all, sees_itself_alone = own.all(-1), own.diagonal(dim1=1, dim2=2) & (seen.sum(-1) == 1)
    sees_all[:, -1], sees_itself_alone[:, -1] = False, False
    return (own.sum(1) > sees_all.sum(-1, keepdim=True) + sees_itself_alone).expand(rows, -1)


def _stack_of(model: Any, block: nn.Module) -> nn.Module | None:
    """Return the module that runs a model's blocks, `None` where that is the model itself."""
    stack = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(stack, nn.Module) or stack is model:
        return None
    return stack if any(one is block for one in stack.modules()) else None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a module's arguments by name."""
    if not args:
        return kwargs
    names = [*inspect.signature(type(module).forward).parameters][1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _warn_of_paged_cache() -> None:
    """Say that where edits with a scope act is wrong in continuous batching."""
    logger.warning_once(
        "edits with a scope do not act where they should in continuous batching (generate_batch): it lays the tokens "
        "of all requests side by side, and its paged cache keeps nothing of what a scope has read; call generate with "
        "padded batches instead, or unload() for the model without edits"
    )


def _no_bank() -> None:
    """Return the bank of a gate that is no model's yet."""
