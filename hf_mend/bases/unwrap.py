"""The transformers model inside a user's wrappers."""

from __future__ import annotations

import inspect
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .compiled import check_uncompiled
from .quantized import restore_order


logger = logging.get_logger(__name__)


def plain_base(model: Any) -> Any:
    """
    Return the transformers model inside a user's wrappers. Adapters of a `PeftModel` stay active.

    Args:
        model (`nn.Module`): A transformers model, `torch.compile`'s wrapper of one, or a `PeftModel`.

    Raises:
        ValueError: The model was compiled in place, has a learned prompt instead of layers, or does not go from text
            to text; it cannot carry edits.
    """
    _check_is_model(model)
    if hasattr(model, "_orig_mod"):
        logger.warning(
            "edits run in the model that was compiled, not in its compiled form, which would not see them; to have "
            "both, compile what merge_and_unload() returns"
        )
        model = model._orig_mod
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"the base is a PeftModel with {model.active_peft_config.peft_type.value}, a learned prompt, which is "
                "not part of the layers; edit the model without it"
            )
        model = model.get_base_model()
    check_uncompiled(model)
    if isinstance(model, PreTrainedModel):
        _check_language_model(model)
        restore_order(model)
    return model


def _check_is_model(model: Any) -> None:
    """
    Raises:
        TypeError: It is no model, for example a model's name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"base_model is {str(model)[:80]!r}, a {type(model).__name__}; expected a model that transformers has "
            "loaded, such as AutoModelForCausalLM.from_pretrained(name), or AutoEditableModel, which loads by name"
        )


def hidden_width(model: Any) -> int:
    """
    Return the width of a model's hidden states, of an encoder-decoder model's the encoder's.

    Raises:
        ValueError: The configuration does not state it, or the encoder's output is of another width than what the
            decoder reads.
    """
    if hasattr(model, "enc_to_dec_proj"):
        raise ValueError(
            f"{type(model).__name__} maps its encoder's output to the decoder's width by enc_to_dec_proj, and a scope "
            "reads what both share; pass a model whose encoder and decoder have one width, or let edits act "
            "everywhere by scope=False (hf-mend train --no-scope)"
        )
    of_two = model.config.is_encoder_decoder
    config = model.get_encoder().config if of_two else model.config.get_text_config(decoder=True)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"the configuration of {type(model).__name__} states no hidden_size, which a scope needs; let edits act "
            "everywhere by scope=False (hf-mend train --no-scope)"
        )
    return width


def _check_language_model(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: The model has no language head, or reads more than text or something else.
    """
    kind = type(model).__name__
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if model.config.is_encoder_decoder:
        needed.append(model.main_input_name)
    others = [name for name in needed if name != "input_ids"]
    if others:
        raise ValueError(
            f"{kind} needs {' and '.join(dict.fromkeys(others))}, not text alone, and a prompt to edit is text; pass "
            "a model that reads text, alone or beside images and sound"
        )
    head = model.get_output_embeddings()
    if isinstance(head, nn.Embedding):
        raise ValueError(
            f"{kind} makes its logits with its embedding instead of an output layer, where edits are looked at, so it "
            "cannot be edited"
        )
    if head is None:
        raise ValueError(
            f"{kind} has no language head, so it says nothing that could be edited; load the base model with "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM, or pass the part of it that has one"
        )


class BaseState:
    """
    The state of a model before it was wrapped: the modules in training mode, and the parameters that require a
    gradient. Both are stored by name, so that it also restores a copy of the model.

    Args:
        model (`nn.Module`): The model.
    """

    def __init__(self, model: nn.Module):
        self._training = {_plain(name): module.training for name, module in model.named_modules()}
        self._gradients = {_plain(name): parameter.requires_grad for name, parameter in model.named_parameters()}

    def restore(self, model: nn.Module) -> None:
        """Restore modes and gradients."""
        for name, module in model.named_modules():
            module.training = self._training.get(_plain(name), module.training)
        self.restore_gradients(model)

    def restore_gradients(self, model: nn.Module) -> None:
        """Restore which parameters require a gradient."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._gradients.get(_plain(name), parameter.requires_grad))


def _plain(name: str) -> str:
    """Return a name without the adapter around its layer: merging removes the adapters."""
    return name.replace(".base_layer", "")
