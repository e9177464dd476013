"""The decision of an encoder-decoder model's pass: which edit each row's text asks for."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..edits.hook import Hook
from .gate import ScopeGate, _acting, _suspended
from .network import ScopeNetwork


class EncoderGate(ScopeGate):
    """
    Decides in an encoder-decoder model: once for each row, from the output of the encoder, which no edit with a scope
    changes. The key is that of the whole text, at its last token, and the edit that is chosen acts at all tokens of
    the row's answer.

    The decoder gets the encoder's output in each of its passes, from whatever way of generating. So nothing of a
    decision has to be kept, and no cache has a layer for it.

    Args:
        model (`nn.Module`): The base model.
        scope ([`ScopeNetwork`]): Gives the keys.
        scope_id (`str`): The scope's id.
    """

    def __init__(self, model: Any, scope: ScopeNetwork, scope_id: str):
        super().__init__(model, model.get_decoder(), 0, scope, scope_id)

    def hooks(self) -> list[Hook]:
        """Return the hooks of a model in which such edits act."""
        return [
            Hook(self.block, self._decide, options={"with_kwargs": True}),
            Hook(self.block, self._end, before=False, options={"always_call": True}),
        ]

    @torch.no_grad()
    def _decide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        self._begin(module, args)
        bank = None if kwargs is None or self in _suspended.get() else self.bank_now()
        if bank is None or kwargs is None:
            return
        named = _named(module, args, kwargs)
        hidden, mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
        if hidden is None:  # a decoder by itself, which is asked for nothing
            return
        if self.scope.centre.device != hidden.device:
            self.scope.to(hidden.device)
        present = None
        if isinstance(mask, torch.Tensor) and mask.shape == hidden.shape[:2]:
            present = mask.to(hidden.device).bool()
        with torch.autocast(hidden.device.type, enabled=False), torch.inference_mode(False):
            states = self.scope.token_states(hidden.clone() if hidden.is_inference() else hidden, present)
            # What is not there counts for nothing on either side, so the last place has the whole text's key.
            keys = self.scope.keys(states, last=1)[:, 0]  # (rows, width)
            chosen = bank.choose(keys, self.strictness)  # (rows,)
        if present is not None:
            chosen = torch.where(present.any(-1), chosen, -1)
        acting = _acting(chosen, bank)
        if self._local.current is not None and acting is not None:
            self._local.current.acting = replace(acting, by_row=True)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a module's arguments by name."""
    if not args:
        return kwargs
    names = [*inspect.signature(type(module).forward).parameters][1:]
    return dict(zip(names, args, strict=False)) | kwargs
