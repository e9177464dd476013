"""A scope's file, and its id."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..hub.files import SCOPE_NAME, read_weights, write_weights
from .network import ScopeNetwork


def scope_id(scope: ScopeNetwork) -> str:
    """Return a scope's id, a hash of its values rounded to bfloat16: edits keep the id of the scope of their keys."""
    digest = hashlib.sha256()
    for name, value in sorted(scope.state_dict().items()):
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
    tensors, _ = read_weights(path, {name: tuple(value.shape) for name, value in scope.state_dict().items()})
    scope.load_state_dict({name: value.float() for name, value in tensors.items()})
    return scope.eval().requires_grad_(False)
