"""Which base model an editor or an edit was made for: architecture, shapes, and a hash of the edited weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import EditorConfig
from .targets import Target, writable_weight


logger = logging.get_logger(__name__)

_SAMPLE = 65536


def fingerprint_of(base_model: PreTrainedModel, targets: Sequence[Target]) -> dict[str, Any]:
    """
    The base model as far as an editor depends on it.

    The hash is over an even sample of the edited weights rounded to bfloat16, so that the same model has the same hash
    in float32 and bfloat16. It is `None` where the weights cannot be read so (offloaded, quantised or
    float16).

    Args:
        base_model (`PreTrainedModel`): The model.
        targets (`Sequence[Target]`): The edited layers.
    """
    digest: Any = hashlib.sha256()
    for target in targets:
        try:
            weight = writable_weight(target.module).detach()
        except TypeError:
            digest = None
            break
        if weight.dtype == torch.float16:  # rounds a second time on its way to bfloat16, which changes some
            digest = None
            break
        flat = weight.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(sample.contiguous().numpy().tobytes())
    return {
        "architecture": type(base_model).__name__,
        "layers": {target.name: list(target.shape) for target in targets},
        "sha256": None if digest is None else digest.hexdigest(),
    }


def check_base(
    config: EditorConfig, base_model: PreTrainedModel, targets: Sequence[Target], source: str, fingerprint: Any = None
) -> None:
    """
    Compares a stored fingerprint with a base model; another base of the same shapes gives a warning that names both.

    Args:
        config ([`EditorConfig`]): Holds the editor's fingerprint and its base model's name.
        base_model (`PreTrainedModel`): The model at hand.
        targets (`Sequence[Target]`): Its edited layers.
        source (`str`): Where the editor or the edits came from, for the message.
        fingerprint (`str` or `dict`, *optional*): The stored one, when it is not the configuration's; may be JSON
            text.

    Raises:
        ValueError: The layers' shapes differ, or the fingerprint cannot be read.
    """
    stored = config.base_fingerprint if fingerprint is None else fingerprint
    if stored is None:
        return
    try:
        stored = json.loads(stored) if isinstance(stored, str) else stored
        layers = {str(name): list(shape) for name, shape in stored["layers"].items()}
        architecture, stored_hash = stored["architecture"], stored["sha256"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source}: its base_fingerprint was altered ({type(error).__name__} {error})") from error
    here = fingerprint_of(base_model, targets)
    theirs, ours = config.base_model_name_or_path, base_model.config.name_or_path or type(base_model).__name__
    if layers != here["layers"]:
        differing = sorted(set(map(str, layers.items())) ^ set(map(str, here["layers"].items())))[:4]
        raise ValueError(
            f"{source} was made for {theirs or architecture!r}, whose edited layers do not fit {ours!r}: they differ "
            f"in "
            f"{differing}. Load the base model that it was made for"
        )
    same_hash = stored_hash is None or here["sha256"] is None or stored_hash == here["sha256"]
    if not same_hash or architecture != here["architecture"]:
        logger.warning(
            f"{source} was made for {theirs or architecture!r}, and the base model is {ours!r}: the shapes fit but "
            f"the "
            "weights differ, so edits may not take. Load the base model that it was made for, or train an editor for "
            "this one"
        )
