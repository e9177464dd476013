"""How long a text a model can read."""

from __future__ import annotations

from transformers import PretrainedConfig


def longest_input(config: PretrainedConfig) -> int | None:
    """Most tokens that a model takes; `None` where its configuration sets no bound."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    return longest
