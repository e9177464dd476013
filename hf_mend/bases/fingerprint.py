"""Fingerprints of base models: architecture, shapes, and a hash of the edited weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import EditorConfig
from ..hub.files import read_json_object, shortened
from .fused import fetched
from .targets import Target, named_layers
from .weights import identifying_weight


logger = logging.get_logger(__name__)

_SAMPLE = 65536
_EDITOR_SAMPLE = 256

# An editor -> its parameters, each with torch's count of its changes, and their hash, which holds until one changes.
_known_digests: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int, int]], str]] = WeakKeyDictionary()


def fingerprint_of(base_model: PreTrainedModel, targets: Sequence[Target]) -> dict[str, Any]:
    """
    Return a base model's fingerprint: the properties that an editor depends on.

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
            weight = identifying_weight(target.module).detach()
        except TypeError:
            digest = None
            break
        if weight.dtype == torch.float16:  # rounding to float16 and then to bfloat16 differs from rounding once
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


def editor_id(method: nn.Module, name: str) -> str:
    """
    Return an editor's id: the method's name, and a hash of an even sample of its parameters, if it has any. It is kept
    until torch has counted a change of one of them, which a change through `parameter.data` is not.

    Args:
        method (`nn.Module`): The editor.
        name (`str`): The method's name.
    """
    plain = [parameter for parameter in method.parameters() if type(parameter.data) is torch.Tensor]  # none sharded
    if not plain:
        return name
    counted = not any(parameter.is_inference() for parameter in plain)  # torch counts no changes of those
    state = [(id(parameter), parameter.data_ptr(), parameter._version) for parameter in plain] if counted else []
    known = _known_digests.get(method)
    if known is None or not counted or known[0] != state:
        digest = hashlib.sha256()
        flat = [parameter.detach().reshape(-1) for parameter in plain]
        samples = fetched(one[:: max(1, one.numel() // _EDITOR_SAMPLE)].float().contiguous() for one in flat)
        for sample in samples:
            digest.update(sample.numpy().tobytes())
        known = _known_digests[method] = state, digest.hexdigest()[:12]
    return f"{name}-{known[1]}"


def forget_editor_id(method: nn.Module) -> None:
    """Let an editor's id be found anew, whatever torch has counted of its changes."""
    _known_digests.pop(method, None)


def check_same_base(base_model: PreTrainedModel, stored: Any, source: str) -> None:
    """
    Check that edits were made for this base model, whatever its editor is now.

    Args:
        base_model (`PreTrainedModel`): The model at hand.
        stored (`dict`, *optional*): The fingerprint of the edits' base; nothing is checked without one.
        source (`str`): Where the edits came from, for the message.

    Raises:
        ValueError: They were made for another one, or the fingerprint cannot be read.
    """
    if stored is None:
        return
    architecture, layers, stored_hash = _parts(stored, source)
    here = fingerprint_of(base_model, _in_order(base_model, list(layers)))
    ours = base_model.config.name_or_path or type(base_model).__name__
    different = [name for name, shape in layers.items() if here["layers"].get(name) != shape]
    same_hash = stored_hash is None or here["sha256"] is None or stored_hash == here["sha256"]
    if different or not same_hash or architecture != here["architecture"]:
        what = f"the layers {shortened(different[:4])}" if different else "its weights"
        raise ValueError(
            f"{source} holds edits of another base model: a {shortened(architecture)}, and {ours!r} is a "
            f"{here['architecture']} that differs in {what}. Load the base model that the edits were made on, or use "
            "another path for this one"
        )


def check_edits_base(config: EditorConfig, base_model: PreTrainedModel, stored: Any, source: str) -> None:
    """
    Run [`check_base`] for saved edits, whose layers may differ from those of the model's editor.

    Args:
        config ([`EditorConfig`]): The configuration of the model's editor; its base model's name is for the message.
        base_model (`PreTrainedModel`): The model at hand.
        stored (`str` or `dict`, *optional*): The fingerprint of the edits' base; nothing is checked without one.
        source (`str`): Where the edits came from.
    """
    if stored is not None:
        targets = _in_order(base_model, list(_parts(stored, source)[1]))
        check_base(config, base_model, targets, source, stored)


def _in_order(base_model: PreTrainedModel, names: Sequence[str]) -> list[Target]:
    """Return the model's layers of these names, in the order of the names: their hash depends on it."""
    found = {target.name: target for target in named_layers(base_model, names)}
    return [found[name] for name in names if name in found]


def check_base(
    config: EditorConfig, base_model: PreTrainedModel, targets: Sequence[Target], source: str, fingerprint: Any = None
) -> None:
    """
    Compare a stored fingerprint with a base model. Another base of the same shapes gives a warning that names both.

    Args:
        config ([`EditorConfig`]): Holds the editor's fingerprint and its base model's name.
        base_model (`PreTrainedModel`): The model at hand.
        targets (`Sequence[Target]`): Its edited layers.
        source (`str`): Where the editor or the edits came from, for the message.
        fingerprint (`str` or `dict`, *optional*): The stored fingerprint, perhaps as JSON text, when it is not the
            configuration's.

    Raises:
        ValueError: The layers' shapes differ, or the fingerprint cannot be read.
    """
    stored = config.base_fingerprint if fingerprint is None else fingerprint
    if stored is None:
        return
    architecture, layers, stored_hash = _parts(stored, source)
    here = fingerprint_of(base_model, targets)
    theirs = shortened(config.base_model_name_or_path or architecture)
    ours = base_model.config.name_or_path or type(base_model).__name__
    if layers != here["layers"]:
        differing = sorted(set(map(str, layers.items())) ^ set(map(str, here["layers"].items())))[:4]
        raise ValueError(
            f"{source} was made for {theirs}, whose edited layers do not fit {ours!r}: they differ in "
            f"{shortened(differing)}. Load the base model that it was made for"
        )
    same_hash = stored_hash is None or here["sha256"] is None or stored_hash == here["sha256"]
    if not same_hash or architecture != here["architecture"]:
        logger.warning(
            f"{source} was made for {theirs}, and the base model is {ours!r}: the shapes fit but the "
            "weights differ, so edits may not take. Load the base model that it was made for, or train an editor for "
            "this one"
        )


def _parts(stored: Any, source: str) -> tuple[str, dict[str, list[int]], str | None]:
    """Return architecture, layers and hash of a stored fingerprint."""
    if isinstance(stored, str):
        stored = read_json_object(stored, f"{source}: its base_fingerprint")
    values = stored if isinstance(stored, dict) else {}
    architecture, layers, sha256 = values.get("architecture"), values.get("layers"), values.get("sha256")
    valid = (
        isinstance(architecture, str)
        and isinstance(layers, dict)
        and all(isinstance(shape, list) and all(type(n) is int for n in shape) for shape in layers.values())
        and (sha256 is None or isinstance(sha256, str))
    )
    if not valid:
        raise ValueError(f"{source}: its base_fingerprint was altered, it is {shortened(stored)}; download it again")
    return architecture, layers, sha256  # type: ignore[return-value]
