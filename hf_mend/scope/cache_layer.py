"""What a scope keeps of a text, as one more layer of the model's own cache."""

from __future__ import annotations

from typing import Any

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .network import TokenStates


class ScopeLayer(DynamicLayer):
    """
    The token states of a scope in a transformers `Cache`, behind the layers of the model. The cache reorders, crops,
    repeats and selects it with the others, so that a decision is the same in beam search, assisted generation and a
    conversation that goes on, as in one pass over the whole text.

    Args:
        scope_id (`str`): The scope's id; states of another scope are of no use.
        is_compileable (`bool`, defaults to `False`): What the cache's other layers say of themselves.
    """

    def __init__(self, scope_id: str = "", is_compileable: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.scope_id = scope_id
        # As the model's own layers say: where all of a cache's do, attention masks what a static cache has not filled.
        self.is_compileable = is_compileable

    @property
    def states(self) -> TokenStates | None:
        """The states of the tokens so far, `None` where there are none."""
        if self.keys is None or self.values is None or self.get_seq_length() == 0:
            return None
        return TokenStates(self.keys, self.values)

    def append(self, states: TokenStates) -> None:
        """Add the states of further tokens."""
        self.update(states.gates, states.values)


def scope_layer(cache: Cache, scope_id: str) -> ScopeLayer | None:
    """Return the layer of a scope in a cache, `None` where there is none."""
    found = [layer for layer in cache.layers if isinstance(layer, ScopeLayer) and layer.scope_id == scope_id]
    return found[0] if found else None


def past_length(cache: Cache, block: int) -> int:
    """
    Return how many tokens a cache holds when a block begins its pass.

    Args:
        cache (`Cache`): The cache.
        block (`int`): The number of the block.
    """
    layers = [layer for layer in cache.layers[block:] if not isinstance(layer, ScopeLayer)]
    for layer in layers:
        if isinstance(layer, CacheLayerMixin):  # others, of linear attention, have no length
            return int(layer.get_seq_length())
    return 0
