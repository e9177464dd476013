"""What an interrupted training of a scope goes on from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..hub.atomic import made_folder, replaced_file
from ..scope.network import ScopeNetwork


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
        made_folder(self.path.parent)
        state = {
            "settings": dict(self.settings),
            "progress": vars(now),
            "scope": self.scope.state_dict(),
            "draw": self.draw.getstate(),
            "torch": torch.get_rng_state(),
        }
        with replaced_file(self.path) as work:
            torch.save(state, work)

    def load(self) -> ScopeProgress:
        """
        Go on from the file, if it is there; otherwise return the beginning.

        Raises:
            ValueError: The file is of another training.
        """
        if not self.path.is_file():
            return ScopeProgress()
        state = torch.load(self.path, weights_only=True)
        if state["settings"] != dict(self.settings):
            raise ValueError(
                f"{self.path} is of a scope's training with {state['settings']}, not {dict(self.settings)}; give the "
                "same options and facts to go on, or remove the file to begin anew"
            )
        self.scope.load_state_dict(state["scope"])
        self.draw.setstate(state["draw"])
        torch.set_rng_state(state["torch"])
        return ScopeProgress(**state["progress"])
