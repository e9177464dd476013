"""Limits of a model's input."""

from __future__ import annotations

from transformers import PretrainedConfig


def longest_input(config: PretrainedConfig) -> int | None:
    """Return the maximum number of tokens of a model's input; `None` where its configuration sets no bound."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    return longest
