"""Appends edits to a store, every fifth of which it takes back again: `append_to_store.py STORE NAME COUNT`."""

from __future__ import annotations

import sys

import torch

from hf_mend import Edit, EditStore


def small_edit(name: str, seed: int = 0, rank: int = 2, layers: int = 2) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    updates = {
        f"layer.{i}": (torch.randn(rank, 3, generator=generator), torch.randn(rank, 5, generator=generator))
        for i in range(layers)
    }
    metadata = {"time": "2026-01-02T03:04:05+00:00"}
    return Edit(name, f"the prompt of {name} in ünïcode", f"target {seed}", updates, metadata)


def main() -> None:
    path, name, count = sys.argv[1:]
    torch.set_num_threads(1)
    store = EditStore(path)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()  # both at once
    for i in range(int(count)):
        store.append([small_edit(f"{name}{i}", i)])
        if i % 5 == 4:
            store.undo([f"{name}{i}"])


if __name__ == "__main__":
    main()
