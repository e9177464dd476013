"""What keeps a training sound: losses and gradients that are finite, and checkpoints that are whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..hub.files import WEIGHTS_NAME, index_name


_ADVICE = (
    "The editor has the weights of the step before, and the checkpoints are whole. Lower learning_rate or the "
    "method's edit_lr, or look for a fact that the base model computes no finite values for"
)


def check_loss(parts: Mapping[str, float], step: int) -> None:
    """
    Check the parts of a step's loss before anything is learned from it.

    Args:
        parts (`Mapping[str, float]`): Name -> value.
        step (`int`): Number of the step, from 1.

    Raises:
        FloatingPointError: One is not finite.
    """
    wrong = {name: value for name, value in parts.items() if not math.isfinite(value)}
    if wrong:
        said = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        raise FloatingPointError(f"the training stopped at step {step}: its loss is not finite ({said}). {_ADVICE}")


class FiniteGradients(TrainerCallback):
    """
    Stop a training before it makes a step along gradients that are not finite, after which the editor would be lost.

    Args:
        module (`nn.Module`): What is trained.
    """

    def __init__(self, module: nn.Module):
        self._module = module

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients; under fp16 a step along such ones is skipped by the scaler anyway."""
        grads = [(n, p.grad) for n, p in self._module.named_parameters() if p.grad is not None]
        if args.fp16 or not grads or bool(torch.stack([_is_finite(grad) for _, grad in grads]).all()):
            return
        wrong = [name for name, grad in grads if not _is_finite(grad)]
        raise FloatingPointError(
            f"the training stopped at step {state.global_step + 1}: the gradient of {', '.join(wrong[:3])} is not "
            f"finite. {_ADVICE}"
        )


def _is_finite(grad: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(grad).all().cpu()


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state is its last file."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any((checkpoint / name).is_file() for name in (WEIGHTS_NAME, index_name(WEIGHTS_NAME)))


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint in a folder that was written to its end, if there is one."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((str(path) for path in newest_first if is_whole(path)), None)


def checkpoint_to_resume(chosen: str | bool | None, folder: str) -> str | None:
    """
    Return the checkpoint to resume from, if any.

    Args:
        chosen (`str` or `bool`, *optional*): A checkpoint, or `True` for the newest whole one.
        folder (`str`): The folder of the training's checkpoints.

    Raises:
        FileNotFoundError: There is none, or it is one that a killed process has left unfinished.
    """
    if not chosen:
        return None
    found = last_whole_checkpoint(folder) if chosen is True else str(chosen)
    if found is None or not is_whole(Path(found)):
        where = f"{folder} holds" if found is None else f"{found} is"
        raise FileNotFoundError(
            f"{where} no checkpoint that was written to its end; resume from an earlier one, or train anew"
        )
    return found
