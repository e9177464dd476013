"""Gradients by autograd itself, and texts to take them at."""

from __future__ import annotations

import torch

from hf_mend.bases.weights import weight_matrix
from hf_mend.data.encoding import Encoder, Query
from support.models import RECORDS


def encoder_for(model, tokenizer) -> Encoder:
    return Encoder(tokenizer, model.config.is_encoder_decoder, getattr(model.config, "decoder_start_token_id", None))


def queries(records=RECORDS[:3]) -> list[Query]:
    return [Query(r.prompt, r.target) for r in records]


def autograd_gradients(model, targets, rows) -> dict[str, torch.Tensor]:
    """The oracle: every parameter may have a gradient, one ordinary forward pass, the loss by hand."""
    model.requires_grad_(True)
    logits = model(**rows.inputs).logits
    loss = torch.nn.functional.cross_entropy(logits[rows.positions], rows.next_tokens[rows.positions], reduction="sum")
    gradients = torch.autograd.grad(loss, [t.module.weight for t in targets])
    model.requires_grad_(False)
    return {
        t.name: g.T if weight_matrix(t.module).shape != t.module.weight.shape else g
        for t, g in zip(targets, gradients, strict=True)
    }
