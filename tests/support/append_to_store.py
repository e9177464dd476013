"""Appends edits to a store, every fifth of which it takes back again, in a process of its own."""

from __future__ import annotations

from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from hf_mend import Edit, EditStore
from support.processes import start


def small_edit(name: str, seed: int = 0, rank: int = 2, layers: int = 2) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        f"layer.{i}": (torch.randn(rank, 3, generator=generator), torch.randn(rank, 5, generator=generator))
        for i in range(layers)
    }
    metadata = {"time": "2026-01-02T03:04:05+00:00"}
    return Edit(name, f"the prompt of {name} in ünïcode", f"target {seed}", updates, metadata)


def append(path: Path, name: str, count: int, together: Barrier) -> None:
    torch.set_num_threads(1)
    store = EditStore(path)
    together.wait(60)  # all at once
    for i in range(count):
        store.append([small_edit(f"{name}{i}", i)])
        if i % 5 == 4:
            store.undo([f"{name}{i}"])


def appender(path: Path, name: str, count: int, together: Barrier) -> BaseProcess:
    return start(append, path, name, count, together)
