"""
Measure what thousands of edits with a scope cost: `python benchmarks/scope_cost.py`.

A few facts of examples/data are edited by the shipped editor; the other edits are copies of theirs with keys that
noise has moved, under other prompts. A pass and a generation are compared with those of the un-edited model, turn
by turn in one run, for a text that no edit is meant for and for one that an edit is; the decision alone is timed at 10
to 100,000 keys. Times are the process's own seconds of computing on one thread, so that other work on the machine
counts little. Prints tables and writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import load_base, write_results

from hf_mend import Edit, EditableModel, EditStore, read_counterfact
from hf_mend.bases.fingerprint import fingerprint_of
from hf_mend.edits.edit_scope import EditScope
from hf_mend.scope.bank import KeyBank
from hf_mend.scope.network import KEY_PARTS, KEY_WIDTH, MEANING_WIDTH


ROOT = Path(__file__).parent.parent
EDITOR = ROOT / "model_cards" / "smollm2-135m-instruct"
FACTS = ROOT / "examples" / "data" / "facts_test.json"
TEXT = "The weather in the mountains changes quickly, and walkers should take warm clothes with them in summer too."
KEYS = (10, 100, 1_000, 10_000, 100_000)
TOKENS = 8  # generated


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--real", type=int, default=20, help="edits that are made, of which the others are copies")
    parser.add_argument("--repeat", type=int, default=15, help="measurements of which the median counts")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "scope_cost")
    return parser.parse_args()


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of computing."""
    start = time.process_time()
    call()
    return time.process_time() - start


def unit_keys(keys: torch.Tensor) -> torch.Tensor:
    """Keys of which each part is a unit vector, with the same words."""
    parts = keys[:, :MEANING_WIDTH].unflatten(-1, (KEY_PARTS, -1))
    return torch.cat([torch.nn.functional.normalize(parts, dim=-1).flatten(-2), keys[:, MEANING_WIDTH:]], 1)


def copies(real: list[Edit], count: int) -> list[Edit]:
    """Edits whose keys are as far from one another as those of two facts of one kind."""
    torch.manual_seed(0)
    made = []
    for i in range(count):
        edit = real[i % len(real)]
        assert edit.scope is not None
        keys = edit.scope.keys.float()
        moved = torch.cat([keys[:, :MEANING_WIDTH] + 0.2 * torch.randn(1, MEANING_WIDTH), keys[:, MEANING_WIDTH:]], 1)
        moved = unit_keys(moved).half()
        made.append(replace(edit, id=f"{i:012x}", prompt=f"{i}: {edit.prompt}", scope=replace(edit.scope, keys=moved)))
    return made


@torch.no_grad()
def ratios(model: EditableModel, prompt: str, repeat: int) -> dict[str, dict[str, float]]:
    """A pass and a generation with the edits, by the same without them."""
    found = {}
    for where, text in (("outside every scope", TEXT), ("inside one", f"{TEXT} {prompt}")):
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        for what, run in (("a pass", one_pass), (f"{TOKENS} tokens", said)):
            call = partial(run, model, ids)
            call()
            without, edited = [], []
            for _ in range(repeat):
                with model.disable_edits():
                    without.append(seconds_of(call))
                edited.append(seconds_of(call))
            base, ours = statistics.median(without), statistics.median(edited)
            found[f"{what}, {where}"] = {"base, ms": 1000 * base, "with edits, ms": 1000 * ours, "ratio": ours / base}
    return found


def one_pass(model: EditableModel, ids: torch.Tensor) -> None:
    model(input_ids=ids)


def said(model: EditableModel, ids: torch.Tensor) -> None:
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
        do_sample=False, pad_token_id=model.encoder.pad_token_id,
    )  # fmt: skip


@torch.no_grad()
def decision(repeat: int) -> dict[str, dict[str, float]]:
    """The choice among so many keys, for one token and for 32."""
    torch.manual_seed(0)
    found = {}
    for count in KEYS:
        scope = EditScope(
            "scope", unit_keys(torch.randn(count, KEY_WIDTH).clamp(-1, 1)), torch.full((count,), 0.75), ["x"] * count
        )
        bank = KeyBank([Edit("a", "", "", {}, scope=scope)])
        row = {}
        for tokens in (1, 32):
            queries = unit_keys(torch.randn(tokens, KEY_WIDTH))
            bank.choose(queries)
            times = [seconds_of(partial(bank.choose, queries)) for _ in range(repeat)]
            row[f"{tokens} token{'s' if tokens > 1 else ''}, ms"] = 1000 * statistics.median(times)
        found[f"{count:,}"] = row
    return found


def changes(model: EditableModel, edits: list[Edit], folder: str) -> dict[str, float]:
    """Loading all edits from a store, and making and undoing one beside them."""
    path = Path(folder) / "store"
    EditStore(path, fingerprint_of(model.base_model, model.targets)).append(edits)
    figures = {
        "edits": float(len(edits)),
        "kB an edit, factors and keys": sum(edit.nbytes for edit in edits) / len(edits) / 1000,
        "kB an edit, in the store": path.stat().st_size / len(edits) / 1000,
    }
    figures["opening the store, s"] = seconds_of(lambda: model.open_store(path))
    for which in ("first", "second"):
        figures[f"the {which} edit beside them, s"] = seconds_of(lambda: model.edit("The capital of Mali is", "Lyon"))
        figures[f"its undo, s ({which})"] = seconds_of(model.undo)
    figures["an undo of one in their midst, s"] = seconds_of(lambda: model.undo(edits[len(edits) // 2].id))
    return figures


def as_markdown(results: dict[str, Any]) -> str:
    def plain(value: float) -> str:
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"

    def table(name: str, rows: dict[str, dict[str, float]]) -> list[str]:
        head = [name, *next(iter(rows.values()))]
        body = [[key, *map(plain, row.values())] for key, row in rows.items()]
        return ["", *("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))]

    lines = [
        "# What thousands of edits with a scope cost",
        "",
        f"`python benchmarks/scope_cost.py`, {results['machine']}. Seconds of computing of one thread; "
        "generated tokens include the pass of their prompt.",
        *table("", {key: {"": value} for key, value in results["changes"].items()}),
        *table("", results["ratios"]),
        "",
        "The decision alone, by the number of keys; an edit has two for each of its target's tokens and the one that "
        "ends it:",
        *table("keys", results["decision"]),
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    base, tokenizer = load_base()
    model = EditableModel.from_pretrained(base, EDITOR, tokenizer).eval()
    facts = list(read_counterfact(FACTS))[: arguments.real]
    model.edit([fact.prompt for fact in facts], [fact.target for fact in facts])
    real = list(model.edits)
    model.undo_all()
    found: dict[str, Any] = {"machine": f"{platform.machine()}, torch {torch.__version__}, float32"}
    with tempfile.TemporaryDirectory() as folder:
        found["changes"] = changes(model, [*real, *copies(real, arguments.edits - len(real))], folder)
        found["ratios"] = ratios(model, real[0].prompt, arguments.repeat)
    found["decision"] = decision(arguments.repeat)
    markdown = as_markdown(found)
    write_results(arguments.results, found, markdown)
    print(markdown)


if __name__ == "__main__":
    main()
