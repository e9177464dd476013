"""Greedy answers of an editable model, and the probability of a given answer."""

from __future__ import annotations

import torch

from ..bases.limits import longest_input
from ..data.encoding import Query
from ..editing.writing import greedy_tokens
from ..model import EditableModel


def answer(model: EditableModel, prompt: str, *, chat: bool = False, max_new_tokens: int = 24) -> str:
    """
    Return the model's greedy answer under its active edits.

    Args:
        model ([`EditableModel`]): The model; it has a tokenizer.
        prompt (`str`): The prompt.
        chat (`bool`, defaults to `False`): Treat the prompt as a user's turn in the chat template.
        max_new_tokens (`int`, defaults to 24): The most tokens of the answer; fewer if the model's context ends.

    Raises:
        ValueError: The prompt is empty, or longer than the model's context.
    """
    encoder = model.encoder
    tokens, _ = encoder.tokens(Query(prompt, None, chat))
    if not tokens:
        raise ValueError(f"the prompt {prompt!r} is empty; write what the model should answer to")
    longest = longest_input(model.config)
    if longest is not None:
        if len(tokens) > longest:
            raise ValueError(
                f"the prompt {prompt[:60]!r}... has {len(tokens)} tokens, the model takes {longest}; shorten it"
            )
        room = longest if encoder.is_encoder_decoder else max(1, longest - len(tokens))
        max_new_tokens = min(max_new_tokens, room)
    return encoder.decode(greedy_tokens(model, encoder, [tokens], max_new_tokens)[0])


@torch.no_grad()
def probability(model: EditableModel, prompt: str, target: str, *, chat: bool = False) -> float:
    """
    Return the probability of a whole answer after a prompt, under the model's active edits.

    Args:
        model ([`EditableModel`]): The model; it has a tokenizer.
        prompt (`str`): The prompt.
        target (`str`): The answer.
        chat (`bool`, defaults to `False`): Treat the prompt as a user's turn in the chat template.
    """
    rows = model.encoder([Query(prompt, target, chat)]).to(model.device)
    logits = model(**rows.inputs, use_cache=False).logits[rows.positions]  # (tokens, vocab)
    chosen = rows.next_tokens[rows.positions].to(logits.device)
    logs = logits.float().log_softmax(-1).gather(-1, chosen[:, None])
    return float(logs.sum().exp())
