"""The training loss as a module: what DDP, FSDP and DeepSpeed wrap, since their hooks act where a forward runs."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..model import EditableModel
from .examples import EditBatch
from .losses import EditingLoss, editing_loss


class EditingObjective(nn.Module):
    """
    Maps a batch of edits to the editor's training loss. The editor's parameters are the only ones with a gradient.

    Args:
        model ([`EditableModel`]): The model whose editor is trained.
    """

    def __init__(self, model: EditableModel):
        super().__init__()
        self.model = model

    @property
    def config(self) -> PretrainedConfig:
        """The base model's configuration, which `Trainer` and DeepSpeed read."""
        return self.model.config

    def forward(self, edit_batch: EditBatch, **options: Any) -> EditingLoss:
        """
        The loss of a batch.

        Args:
            edit_batch ([`EditBatch`]): The texts.
            options: The other arguments of [`~hf_mend.training.losses.editing_loss`].
        """
        loss: EditingLoss = editing_loss(self.model.context, edit_batch, **options)
        return loss
