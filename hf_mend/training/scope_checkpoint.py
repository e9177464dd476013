"""What an interrupted training of a scope goes on from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..scope.network import ScopeNetwork
from .progress import load_progress, save_progress


@dataclass
class ScopeProgress:
    """
    How far a training is.

    Args:
        round (`int`, defaults to 0): The round.
        step (`int`, defaults to 0): The step of the round.
        order (`list[int]`): The facts that are drawn and wait.
        losses (`list[float]`): The last losses.
        rounds (`list[dict[str, torch.Tensor]]`): The weights at each finished round's end.
        optimizer (`dict`, *optional*), schedule (`dict`, *optional*): The states of the round's.
    """

    round: int = 0
    step: int = 0
    order: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rounds: list[dict[str, torch.Tensor]] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None


@dataclass
class ScopeCheckpoint:
    """
    The file of a training's progress.

    Args:
        path (`Path`): The file.
        settings (`Mapping[str, Any]`): What the training depends on; it goes on with the same alone.
        scope ([`ScopeNetwork`]): The scope.
        draw (`random.Random`): The draws.
    """

    path: Path
    settings: Mapping[str, Any]
    scope: ScopeNetwork
    draw: random.Random

    def save(self, now: ScopeProgress) -> None:
        """Write the file, whole or not at all."""
        state = {"progress": vars(now), "scope": self.scope.state_dict()}
        save_progress(self.path, self.settings, self.draw, state)

    def load(self) -> ScopeProgress:
        """
        Go on from the file, if it is there; otherwise return the beginning.

        Raises:
            ValueError: The file is of another training.
        """
        state = load_progress(self.path, self.settings, self.draw, "a scope's training")
        if state is None:
            return ScopeProgress()
        self.scope.load_state_dict(state["scope"])
        return ScopeProgress(**state["progress"])
