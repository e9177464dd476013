"""Evaluations that several processes or machines share: each measures its part, and one result is made of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..bases.threads import set_within
from .resume import Progress


Found = TypeVar("Found")


@dataclass(frozen=True)
class Share:
    """
    The share of an evaluation that is measured here.

    Args:
        number (`int`, defaults to 0): Its number, from 0 on.
        count (`int`, defaults to 1): The number of shares.
        together (`bool`, defaults to `False`): The others are measured at the same time by further processes of this
            launch, which tell one another what they have found. Otherwise their files are joined later.
        joined (`Sequence[Path]`): Folders of what other machines have measured.
    """

    number: int = 0
    count: int = 1
    together: bool = False
    joined: Sequence[Path] = ()

    @property
    def is_first(self) -> bool:
        """Whether results are written here, of those that make them."""
        return not self.together or self.number == 0


_ALL = Share()
_share: ContextVar[Share] = ContextVar("share", default=_ALL)  # noqa: B039, which is frozen


def sharing(share: Share) -> AbstractContextManager[Share]:
    """Measure only a share of the evaluations within the context, which all shares must begin in the same order."""
    return set_within(_share, share)


def share_of(text: str | None, joined: Sequence[Path] = ()) -> Share:
    """
    Return the share of this process: of those that `accelerate launch` or `torchrun` has started, or a machine's.

    Args:
        text (`str`, *optional*): A machine's share, such as `"2/3"`: the second of three.
        joined (`Sequence[Path]`): Folders of what other machines have measured.

    Raises:
        FileNotFoundError: A folder holds no measurements.
        ValueError: The share has another form, or was given to one of several processes.
    """
    for folder in joined:
        if not any(Path(folder).glob("progress*.jsonl")):
            raise FileNotFoundError(f"{folder} holds no measurements; give a folder that --output named")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if text is None:
        if processes == 1:
            return Share(joined=joined)
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return Share(state.process_index, state.num_processes, True, joined)
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--share is {text!r}, expected a number of how many, such as 2/3 for the second of three")
    if processes > 1:
        raise ValueError("--share is for machines by themselves; processes of one launch share by themselves")
    return Share(int(number) - 1, int(count), False, joined)


def progress_of(path: str | Path | None, settings: dict[str, Any]) -> Progress:
    """Return the finished parts of an evaluation, other machines' too, and where this process adds its own."""
    share = _share.get()
    own = None if path is None else Path(path)
    known = [] if own is None else _beside(own)
    for folder in share.joined:
        known += sorted(Path(folder).glob("progress*.jsonl"))
    if own is not None and share.together and share.number:
        own = own.with_name(f"{own.stem}.{share.number}{own.suffix}")  # two cannot append to one file
    return Progress(own, settings, known)


class PartsMissingError(ValueError):
    """Parts that other machines measure are not there yet."""


def in_shares(progress: Progress, measure: Callable[[], Found]) -> Found:
    """
    Return what `measure` makes of the parts of an evaluation: each process measures its share of those that are
    missing, and gets the others' from them.

    Args:
        progress ([`~hf_mend.evaluation.resume.Progress`]): The finished parts.
        measure (`Callable`): Goes through the parts. It goes through them twice, and gets nothing for those of other
            shares the first time.

    Raises:
        PartsMissingError: Parts that other machines measure are missing; those of this one are measured.
    """
    share = _share.get()
    if share.count == 1:
        return measure()
    with progress.only(share.number, share.count):
        measure()
        is_whole = not progress.left_out
    if share.together:
        every: list[Any] = [None] * share.count
        torch.distributed.all_gather_object(every, progress.parts)
        for parts in every:
            progress.parts.update({name: found for name, found in parts.items() if name not in progress.parts})
        is_whole = True
    if not is_whole:
        raise PartsMissingError(
            f"share {share.number + 1} of {share.count} is measured; measure the others, and join their folders"
        )
    return measure()


def _beside(path: Path) -> list[Path]:
    """Return a file of finished parts, and those of further processes beside it."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))]
