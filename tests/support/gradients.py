"""Gradients by autograd itself, and texts to take them at."""

from __future__ import annotations

import torch

from hf_mend.bases.experts import is_experts
from hf_mend.bases.weights import weight_matrix
from hf_mend.data.encoding import Encoder, Query
from support.models import RECORDS


def encoder_for(model, tokenizer) -> Encoder:
    return Encoder(tokenizer, model.config.is_encoder_decoder, getattr(model.config, "decoder_start_token_id", None))


def queries(records=RECORDS[:3]) -> list[Query]:
    return [Query(r.prompt, r.target) for r in records]


def autograd_gradients(model, targets, rows) -> dict[str, torch.Tensor]:
    """
    The oracle: every parameter may have a gradient, one ordinary forward pass, the loss by hand. Experts have a linear
    layer of zeros beside them, whose gradient is asked for.
    """
    model.requires_grad_(True)
    beside = {t.name: torch.zeros(t.shape, requires_grad=True) for t in targets if is_experts(t.module)}
    handles = [
        t.module.register_forward_hook(lambda _, args, output, zeros=beside[t.name]: output + args[0] @ zeros.T)
        for t in targets
        if t.name in beside
    ]
    logits = model(**rows.inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[rows.positions], rows.next_tokens[rows.positions], reduction="sum")
    weights = [beside.get(t.name, getattr(t.module, "weight", None)) for t in targets]
    gradients = torch.autograd.grad(loss, weights)
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    return {
        t.name: g.T if t.name not in beside and weight_matrix(t.module).shape != t.module.weight.shape else g
        for t, g in zip(targets, gradients, strict=True)
    }
