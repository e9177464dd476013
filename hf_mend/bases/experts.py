"""Experts that a block holds as 3-D parameters: which module they are, and the widths of what it computes."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_experts(module: Any) -> bool:
    """Whether a module holds all experts of a block as 3-D parameters, as transformers' mixtures of experts do."""
    return experts_widths(module) is not None


def experts_widths(module: Any) -> tuple[int, int] | None:
    """
    Return the widths of the input and of the output of a block's experts, `None` for anything else.

    transformers runs the experts of all its mixtures by one interface, which states how their parameters lie:
    `(experts, d_out, d_in)`, or transposed.

    Args:
        module (`nn.Module`): The module.
    """
    transposed = getattr(module, "is_transposed", None)
    up = getattr(module, "gate_up_proj" if getattr(module, "has_gate", None) else "up_proj", None)
    down = getattr(module, "down_proj", None)
    if not isinstance(transposed, bool) or not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return None
    if up.dim() != 3 or down.dim() != 3:
        return None
    return (int(up.shape[1]), int(down.shape[2])) if transposed else (int(up.shape[2]), int(down.shape[1]))
