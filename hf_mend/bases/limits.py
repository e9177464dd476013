"""Limits of a model's input."""

from __future__ import annotations

from transformers import PretrainedConfig


# The fields in which configurations state their limit; LED's prompts have another than its answers, which are short.
_FIELDS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len", "max_target_positions")
# Their positions begin behind the padding's token id, which takes as many rows of the table of positions.
_BEHIND_PADDING = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)


def longest_input(config: PretrainedConfig) -> int | None:
    """
    Return the maximum number of tokens of a model's input; `None` where its configuration sets no bound.

    Args:
        config (`PretrainedConfig`): The model's configuration. Of a model of several parts, the text's counts, and of
            an encoder and a decoder with a configuration each, the encoder's.
    """
    encoder = getattr(config, "encoder", None)
    config = (encoder if isinstance(encoder, PretrainedConfig) else config).get_text_config()
    stated = [value for field in _FIELDS if isinstance(value := getattr(config, field, None), int)]
    if not stated or stated[0] < 1:  # XLNet says -1
        return None
    padding: int | None = getattr(config, "pad_token_id", None)
    return stated[0] - padding - 1 if config.model_type in _BEHIND_PADDING and padding is not None else stated[0]
