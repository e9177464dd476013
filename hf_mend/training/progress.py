"""Files of an interrupted training's progress, with the draws and the random state that it goes on from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..hub.atomic import made_folder, replaced_file


def save_progress(path: Path, settings: Mapping[str, Any], draw: random.Random, state: Mapping[str, Any]) -> None:
    """
    Write a file of a training's progress, whole or not at all.

    Args:
        path (`Path`): The file.
        settings (`Mapping[str, Any]`): What the training depends on.
        draw (`random.Random`): The draws.
        state (`Mapping[str, Any]`): What else it goes on from, as plain values and tensors.
    """
    made_folder(path.parent)
    common = {"settings": dict(settings), "draw": draw.getstate(), "torch": torch.get_rng_state()}
    with replaced_file(path) as work:
        torch.save({**state, **common}, work)


def load_progress(
    path: Path, settings: Mapping[str, Any], draw: random.Random, what: str = "a training"
) -> dict[str, Any] | None:
    """
    Return what [`save_progress`] kept, `None` where there is no file, and set the draws and torch's random state.

    Args:
        path (`Path`): The file.
        settings (`Mapping[str, Any]`): What the training depends on; it goes on with the same alone.
        draw (`random.Random`): The draws.
        what (`str`, defaults to `"a training"`): Whose progress it is, for the error.

    Raises:
        ValueError: The file is of another training, or damaged.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        whole = isinstance(state, dict) and {"settings", "draw", "torch"} <= state.keys()
    except Exception as error:  # of whatever kind: a file that is cut or foreign may fail in many ways
        raise ValueError(_damaged(path, what, f"{type(error).__name__}: {str(error)[:80]}")) from error
    if not whole:
        raise ValueError(_damaged(path, what, "it holds something else"))
    if state["settings"] != dict(settings):
        raise ValueError(
            f"{path} is of {what} with {state['settings']}, not {dict(settings)}; give the same options and facts to "
            "go on, or remove the file to begin anew"
        )
    draw.setstate(state["draw"])
    torch.set_rng_state(state["torch"])
    return state


def _damaged(path: Path, what: str, reason: str) -> str:
    return f"{path} is no whole file of the progress of {what} ({reason}); remove it to begin anew, or name another"
