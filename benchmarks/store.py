"""
Measure the edit store and the cost of many edits: `python benchmarks/store.py`.

Appends and loads a file of edits of SmolLM2-135M-Instruct's width (three layers, rank 15, random factors), runs the
model under a growing number of them, takes the memory that 1,000 need, and compresses real edits of the packaged
facts, made without a trained editor, which act everywhere: edits with a scope have no sum. Times are the process's own
seconds of computing on one thread, so that other work on the machine counts little. Prints a table and writes JSON and
Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_mend import Edit, EditableModel, EditorConfig, EditStore, read_counterfact
from hf_mend.bases.fingerprint import fingerprint_of
from hf_mend.bases.split import logits_of
from hf_mend.data.encoding import Query
from hf_mend.demo.smollm2 import load_smollm2
from hf_mend.editing.scoring import score_targets


ROOT = Path(__file__).parent.parent
BLOCKS = [27, 28, 29]
RANK, D_IN, D_OUT = 15, 1536, 576
PARTS = ["store", "forward", "memory", "compress"]
LAYERS = [f"model.layers.{block}.mlp.down_proj" for block in BLOCKS]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10_000, help="edits in the store")
    parser.add_argument("--compressed", type=int, default=8, help="real edits to compress")
    parser.add_argument("--repeat", type=int, default=3, help="forward passes of which the median counts")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "store"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of what is measured; others stay")
    parser.add_argument("--memory-of", metavar="STORE", help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


def synthetic_edits(count: int) -> list[Edit]:
    """Edits of small norm; the factors of some hundred, again and again, so that they take no memory to speak of."""
    torch.manual_seed(0)
    pool = [
        {name: (torch.randn(RANK, D_IN) * 1e-3, torch.randn(RANK, D_OUT) * 1e-3) for name in LAYERS}
        for _ in range(min(count, 100))
    ]
    metadata = {"time": "2026-01-01T00:00:00+00:00", "chat": "false", "editor": "mend-000000000000"}
    return [
        Edit(f"{i:012x}", f"The capital of the country number {i} is", f"City {i}", pool[i % len(pool)], metadata)
        for i in range(count)
    ]


def seconds_of(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of computing, and seconds that passed."""
    start, began = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - start, time.perf_counter() - began


def small_model() -> EditableModel:
    """The model with the last three MLPs' output matrices as what is edited."""
    base, tokenizer = load_smollm2()
    config = EditorConfig(target_modules=["down_proj"], layers_to_transform=BLOCKS)
    return EditableModel(base, config, tokenizer)


def store_figures(path: Path, edits: list[Edit]) -> dict[str, float]:
    """Appending and loading."""
    store = EditStore(path)
    figures: dict[str, float] = {"edits": len(edits)}
    single, batch = edits[:100], 100
    spent = [seconds_of(lambda edit=edit: store.append([edit])) for edit in single]  # type: ignore[misc]
    figures["append of one edit, ms of computing"] = 1000 * sorted(cpu for cpu, _ in spent)[len(spent) // 2]
    figures["append of one edit with fsync, ms that passed"] = (
        1000 * sorted(wall for _, wall in spent)[len(spent) // 2]
    )

    def append_rest() -> None:
        for start in range(len(single), len(edits), batch):
            store.append(edits[start : start + batch])

    cpu, wall = seconds_of(append_rest)
    figures["append of the rest in hundreds, s of computing"], figures["append of the rest, s that passed"] = cpu, wall
    figures["file, GB"] = path.stat().st_size / 1e9
    figures["factors alone, GB"] = sum(u.nbytes + v.nbytes for edit in edits for u, v in edit.updates.values()) / 1e9
    loaded: list[EditStore] = []
    cpu, wall = seconds_of(lambda: loaded.append(EditStore(path)))
    assert len(loaded[0]) == len(edits)
    figures["load, every checksum compared, s of computing"], figures["load, s that passed"] = cpu, wall
    return figures


def forward_figures(model: EditableModel, edits: list[Edit], repeat: int) -> dict[str, dict[str, float]]:
    """A forward pass of 4 rows of 32 tokens under so many edits."""
    tokens = torch.arange(4 * 32).reshape(4, 32) + 1000
    figures = {}
    for count in (0, 1, 10, 27, 28, 100, 1000):
        with model.carrying(edits[:count]), torch.no_grad():
            first, _ = seconds_of(lambda: model(input_ids=tokens))
            again = sorted(seconds_of(lambda: model(input_ids=tokens))[0] for _ in range(repeat))[repeat // 2]
            rank = min(count * RANK, D_IN * D_OUT // (D_IN + D_OUT))
            form = "none" if not count else "dense" if count * RANK > rank else f"two of rank {rank}"
            held = model._active.nbytes / 1e6
        figures[f"{count:,}"] = {"form": form, "first pass, s": first, "later passes, s": again, "sum, MB": held}
    return figures


def memory_of(path: str) -> None:
    """Prints how much a process grows by opening a store and running once."""
    model = small_model()
    tokens = torch.arange(32)[None] + 1000
    with torch.no_grad():
        model(input_ids=tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.open_store(path)
    with torch.no_grad():
        model(input_ids=tokens)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def compress_figures(count: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Real edits of the packaged facts in one call, and how many targets are still said after compressing them."""
    base, tokenizer = load_smollm2()
    model = EditableModel(base, tokenizer=tokenizer)
    records = list(read_counterfact(ROOT / "examples" / "data" / "facts_test.json"))[:count]
    model.edit([r.prompt for r in records], [r.target for r in records], force=True, keep_failed=True)
    rows = model.encoder([Query(r.prompt, r.target) for r in records])

    def said() -> float:
        with torch.no_grad():
            right = score_targets(rows, logits_of(model.split, rows, model.split.run_below(rows.inputs))).correct
        return sum(map(all, right)) / len(right)

    whole: dict[str, float] = {"edits": len(model.edits), "targets said": said()}
    ranks = {}
    for rank in (4, 16, 64):
        cpu, _ = seconds_of(lambda rank=rank: ranks.update(last=model.compress_edits(rank)))  # type: ignore[misc]
        report = ranks.pop("last")
        whole["rank before"] = max(report.ranks_before.values())
        errors = list(report.errors.values())
        ranks[str(rank)] = {
            "error, largest of the layers": max(errors),
            "error, mean": sum(errors) / len(errors),
            "targets said": said(),
            "s of computing": cpu,
        }
        model.undo(report.id)
    assert said() == whole["targets said"], "the undo brought them back"
    return whole, ranks


def as_markdown(results: dict[str, Any]) -> str:
    def plain(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    def table(name: str, rows: dict[str, dict[str, Any]]) -> list[str]:
        head = [name, *next(iter(rows.values()))]
        body = [[key, *map(plain, row.values())] for key, row in rows.items()]
        return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]

    def single(name: str, title: str) -> list[str]:
        return table(title, {key: {"": value} for key, value in results[name].items()})

    lines = [
        "# The edit store",
        "",
        f"`python benchmarks/store.py`, {results['machine']}. Edits of three layers ({D_IN} x {D_OUT}, rank {RANK}), "
        "one thread. Seconds of computing are the process's own; those that passed include the waiting for the disk "
        "and for other work on the machine.",
    ]
    if "store" in results:
        lines += ["", *single("store", "store")]
    if "forward" in results:
        lines += ["", "A forward pass of 128 tokens under so many edits; the first one sums them up:", ""]
        lines += table("edits", results["forward"])
    if "memory" in results:
        lines += ["", *single("memory", "memory of 1,000 edits")]
    if "compressed" in results:
        real = results["compressed"]
        lines += [
            "",
            f"Compressing {real['edits']} real edits of six layers (together of rank {real['rank before']}, "
            f"{plain(real['targets said'])} of their targets said), relative error in the "
            "Frobenius norm:",
            "",
            *table("rank", results["ranks"]),
        ]
    return "\n".join(lines) + "\n"


def memory_figures(edits: list[Edit]) -> dict[str, float]:
    """What 1,000 edits take in a process that opens their store and runs the model."""
    model = small_model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        EditStore(path, fingerprint_of(model.base_model, model.targets)).append(edits[:1000])
        command = [sys.executable, __file__, "--memory-of", str(path)]
        grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {
            "factors, GB, mapped from the file": path.stat().st_size / 1e9,
            "a process that opens the store and runs grows by, GB": int(grown.split()[-1]) / 1e9,
            "to reach: below, GB": 1,
        }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.memory_of:
        memory_of(arguments.memory_of)
        return
    found: dict[str, Any] = {"machine": f"{platform.machine()}, torch {torch.__version__}, float32"}
    edits = synthetic_edits(max(arguments.edits, 1000))
    for part in arguments.parts:
        if part == "store":
            with tempfile.TemporaryDirectory() as folder:
                found[part] = store_figures(Path(folder) / "store", edits[: arguments.edits])
        elif part == "forward":
            found[part] = forward_figures(small_model(), edits, arguments.repeat)
        elif part == "memory":
            found[part] = memory_figures(edits)
        else:
            found["compressed"], found["ranks"] = compress_figures(arguments.compressed)
    output = Path(arguments.output).with_suffix(".json")
    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    results.update(found)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = as_markdown(results)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
