"""A scope's file, and its id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from ..hub.files import SCOPE_NAME, read_weights, write_weights
from .network import ScopeNetwork


# What a scope of before does not have, and what no key depends on.
_SUBJECTS = ("subject.weight", "subject.bias")
# No value that a training leaves is as large: hidden states' own are some thousands at most.
_MOST = 1e6


def scope_id(scope: ScopeNetwork) -> str:
    """
    Return a scope's id, a hash of its values rounded to bfloat16, of all that keys depend on: edits keep the id of the
    scope of their keys.
    """
    digest = hashlib.sha256()
    for name, value in sorted(scope.state_dict().items()):
        if name in _SUBJECTS:
            continue
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return f"scope-{digest.hexdigest()[:12]}"


def write_scope(folder: Path, scope: ScopeNetwork) -> None:
    """
    Write `scope.safetensors` to a folder, its matrices in bfloat16.

    Args:
        folder (`Path`): The folder.
        scope ([`ScopeNetwork`]): The scope.
    """
    state = {name: v.to(torch.bfloat16) if v.dim() > 1 else v for name, v in scope.state_dict().items()}
    write_weights(folder, SCOPE_NAME, state)


def check_scope(path: str | Path) -> None:
    """
    Check a scope's file, whatever the width of the hidden states that it is for.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        ValueError: The file is damaged.
    """
    tensors, _ = read_weights(path)
    centre = tensors.get("centre")
    read_scope(path, 1 if centre is None or centre.dim() != 1 else len(centre))


def _check_values(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check what no training leaves and no pass survives; the shapes are known to be right."""
    threshold, spread = float(tensors["threshold"]), float(tensors["spread"].min())
    size = {name: float(value.abs().max()) for name, value in tensors.items()}
    largest = max(size, key=lambda name: size[name])
    wrong = {
        f"a threshold of {threshold:g}, where scores are from -1 to 1": not -1 <= threshold <= 1,
        f"a spread of {spread:g}, which has to be above 0": not spread > 0,
        f"a value of {size[largest]:g} in {largest!r}": size[largest] > _MOST,
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ValueError(f"{path}: the scope has {found[0]}; the file was altered, restore it from a copy")


def read_scope(path: str | Path, width: int) -> ScopeNetwork:
    """
    Read a scope.

    Args:
        path (`str` or `Path`): The file.
        width (`int`): Width of the base model's hidden states.

    Raises:
        ValueError: The file is damaged, or for hidden states of another width.
    """
    scope = ScopeNetwork(width)
    state = scope.state_dict()
    tensors, _ = read_weights(path)
    if not {*_SUBJECTS} & tensors.keys():
        state = {name: value for name, value in state.items() if name not in _SUBJECTS}
    tensors, _ = read_weights(path, {name: tuple(value.shape) for name, value in state.items()})
    _check_values(path, tensors)
    scope.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    return scope.eval().requires_grad_(False)
