"""The training loss as a module, which DDP, FSDP and DeepSpeed can wrap: their hooks act in a module's forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..model import EditableModel
from .examples import EditBatch
from .losses import EditingLoss, editing_loss


class EditingObjective(nn.Module):
    """
    Map a batch of edits to the editor's training loss. Only the editor's parameters have a gradient.

    Args:
        model ([`EditableModel`]): The model whose editor is trained.
    """

    def __init__(self, model: EditableModel):
        super().__init__()
        self.model = model

    @property
    def config(self) -> PretrainedConfig:
        """Return the base model's configuration, which `Trainer` and DeepSpeed read."""
        return self.model.config

    def to(self, *args: Any, **kwargs: Any) -> EditingObjective:
        """Move the model; a base that a device map or offloading placed stays where it is."""
        self.model.to(*args, **kwargs)
        return self

    def forward(self, edit_batch: EditBatch, **options: Any) -> EditingLoss:
        """
        Return the loss of a batch.

        Args:
            edit_batch ([`EditBatch`]): The batch.
            options: The other arguments of [`~hf_mend.training.losses.editing_loss`].
        """
        loss: EditingLoss = editing_loss(self.model.context, edit_batch, **options)
        return loss
