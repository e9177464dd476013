"""Training a scope in a launch of several processes: one of them trains it, and the others get it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..model import EditableModel
from ..scope.network import ScopeNetwork
from .examples import TrainingExamples
from .scope_training import ScopeTrainingArguments, train_scope


# Longer than any scope is trained: the others wait for it.
_WAIT = timedelta(days=2)


def train_scope_once(
    model: EditableModel, examples: TrainingExamples | None = None, args: ScopeTrainingArguments | None = None
) -> None:
    """
    Train a model's scope as [`~hf_mend.training.scope_training.train_scope`] does; of several processes only the first
    one trains, and the others get its scope.

    Args:
        model, examples, args: As for [`~hf_mend.training.scope_training.train_scope`].
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        train_scope(model, examples, args)
        return
    group = dist.new_group(backend="gloo", timeout=_WAIT)
    trained: list[Any] = [None]
    if dist.get_rank() == 0:
        train_scope(model, examples, args)
        assert model.scope is not None
        trained = [{name: value.cpu() for name, value in model.scope.state_dict().items()}]
    dist.broadcast_object_list(trained, src=0, group=group)
    if dist.get_rank() > 0:
        assert model.scope is not None
        scope = ScopeNetwork(model.scope.width).to(model.scope.centre.device).requires_grad_(False)
        scope.load_state_dict(trained[0])
        model.set_scope(scope)
    dist.destroy_process_group(group)
