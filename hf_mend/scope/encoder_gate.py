"""The decision of an encoder-decoder model's pass: which edit each row's text asks for."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..edits.hook import Acting, Hook
from .bank import KeyBank
from .gate import ScopeGate, Watch, _acting, _named, _Pass, _suspended, _watch
from .network import ScopeNetwork


class EncoderGate(ScopeGate):
    """
    Decides in an encoder-decoder model: once for each row, from the output of the encoder, which no edit with a scope
    changes. The key is that of the whole text, at its last token, and the edit that is chosen acts at all tokens of
    the row's answer.

    The decoder gets the encoder's output in each of its passes, from whatever way of generating. So no cache has to
    keep anything, and a pass on the very tensors of the one before takes over what was decided there. It does not get
    the text's tokens: any word may be said.

    Args:
        model (`nn.Module`): The base model.
        scope ([`ScopeNetwork`]): Gives the keys.
        scope_id (`str`): The scope's id.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tells what the texts of edits are about.
    """

    def __init__(
        self, model: Any, scope: ScopeNetwork, scope_id: str, tokenizer: PreTrainedTokenizerBase | None = None
    ):
        super().__init__(model, model.get_decoder(), 0, scope, scope_id, tokenizer)

    def words(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None, before: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return `None`: any word may be said."""
        return None

    def hooks(self) -> list[Hook]:
        """Return the hooks of a model in which such edits act."""
        return [
            Hook(self.block, self._decide, options={"with_kwargs": True}),
            Hook(self.block, self._end, before=False, options={"always_call": True}),
        ]

    @torch.no_grad()
    def _decide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        self._local.current = _Pass(module)
        bank = None if kwargs is None or self in _suspended.get() else self.bank_now()
        if bank is None or kwargs is None:
            return
        named = _named(module, args, kwargs)
        hidden, mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
        if hidden is None:  # a decoder by itself, which is asked for nothing
            return
        mask = mask if isinstance(mask, torch.Tensor) and mask.shape == hidden.shape[:2] else None
        watch, decision = _watch.get(), self._local.decision
        known = isinstance(decision, _Decision) and decision.is_of(hidden, mask, bank, self.strictness)
        if watch is not None or not known:
            keys, acting = self._chosen(hidden, mask, bank, watch)
            decision = _Decision(hidden, mask, bank, self.strictness, acting)
            self._local.decision = None if watch is not None else decision
            if watch is not None:
                watch.keys.append(keys)
                watch.acted |= acting is not None
        if self._local.current is not None:
            self._local.current.acting = decision.acting

    def _chosen(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, bank: KeyBank, watch: Watch | None
    ) -> tuple[torch.Tensor, Acting | None]:
        """Return the rows' keys and where edits act, from the encoder's output and its mask."""
        if self.scope.centre.device != hidden.device:
            self.scope.to(hidden.device)
        present = None if mask is None else mask.to(hidden.device).bool()
        with torch.autocast(hidden.device.type, enabled=False), torch.inference_mode(False):
            states = self.scope.token_states(hidden.clone() if hidden.is_inference() else hidden, present)
            # What is not there counts for nothing on either side, so the last place has the whole text's key.
            keys = self.scope.keys(states, last=1)[:, 0]  # (rows, width)
            only = None if watch is None else watch.numbers(bank, len(keys), 1)
            chosen = bank.choose(keys, self.strictness, only)  # (rows,)
        if present is not None:
            chosen = torch.where(present.any(-1), chosen, -1)
        acting = _acting(chosen, bank)
        return keys, None if acting is None else replace(acting, by_row=True)


class _Decision:
    """
    Where edits act in passes on some tensors.

    Args:
        hidden (`torch.Tensor`): The encoder's output.
        mask (`torch.Tensor`, *optional*): Its mask.
        bank ([`KeyBank`]): The edits' keys.
        strictness (`float`): What is added to their thresholds.
        acting ([`~hf_mend.edits.hook.Acting`], *optional*): Where edits act.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        bank: KeyBank,
        strictness: float,
        acting: Acting | None,
    ):
        self.bank, self.strictness, self.acting = bank, strictness, acting
        self._tensors = [None if one is None else (weakref.ref(one), _version(one)) for one in (hidden, mask)]

    def is_of(self, hidden: torch.Tensor, mask: torch.Tensor | None, bank: KeyBank, strictness: float) -> bool:
        """Whether these are the tensors, unchanged since, and the same edits and thresholds."""
        if bank is not self.bank or strictness != self.strictness:
            return False
        for known, one in zip(self._tensors, (hidden, mask), strict=True):
            if (known is None) != (one is None):
                return False
            if known is not None and one is not None:
                reference, version = known
                if reference() is not one or version is None or version != _version(one):
                    return False
        return True


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to, `None` where that is not counted."""
    return None if tensor.is_inference() else tensor._version
