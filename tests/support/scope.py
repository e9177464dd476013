"""Models whose edits have a scope: a random one, strict enough that an edit acts for its own text alone."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_mend import EditableModel
from hf_mend.scope.network import ScopeNetwork

from .models import editable


def scoped(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: object) -> EditableModel:
    """As `editable`, with a random scope whose edits act where a key is all but their own."""
    model = editable(base, tokenizer, scope=True, **options)
    torch.manual_seed(2)
    scope = ScopeNetwork(model.scope.width)
    state = model.split.run_below(model.encoder.pad([(list(range(4, 60)), [])]).inputs)
    scope.standardise((state.hidden if state.encoder is None else state.encoder)[0])
    with torch.no_grad():
        scope.threshold.fill_(0.99)
    model.set_scope(scope.requires_grad_(False))
    return model
