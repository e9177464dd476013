"""
How well a model carries many edits: each method with 1, 10, 100 and 1,000 edits, made in one call or in calls of ten.

    python benchmarks/many_edits.py --data DIR

`DIR` (or HF_MEND_DATA) holds facts_test.json and nq_open_test.jsonl. Every state is measured on `--measured` of its
facts: edit success, generality (paraphrases), neighbourhood and unrelated locality against the un-edited model, and
the model's own perplexity on text that has nothing to do with the facts (Python's documentation, which comes with the
interpreter). Writes JSON, a Markdown table and a plot. States that the JSON holds already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from hf_mend import (
    EditableModel,
    EditorConfig,
    EditRecord,
    evaluate_records,
    read_counterfact,
    read_questions,
    summarize,
)
from hf_mend.data import Query, Rows, length_batches
from hf_mend.losses import row_means
from hf_mend.smollm2 import SMOLLM2_ID, load_smollm2
from hf_mend.tracing import HiddenState, logits_of


KINDS = ("edit success", "generality", "neighbourhood", "unrelated")
NAMES = ("edit_success", "generality", "neighborhood", "unrelated")
NEIGHBOURS = 2  # neighbouring prompts measured of a fact
EDITOR = "model_cards/smollm2-135m-instruct-mend"


class Probes:
    """
    The rows of some facts, of one kind, with what the un-edited model says there and the hidden states below the
    edited blocks, which no edit changes.
    """

    def __init__(self, model: EditableModel, queries: Sequence[Query], owners: Sequence[int], local: bool):
        self.local = local
        self.parts: list[tuple[torch.Tensor, Rows, HiddenState, torch.Tensor]] = []
        encoder = model.encoder
        lengths = [sum(map(len, encoder.tokens(query))) for query in queries]
        for chosen in length_batches(lengths, 64, 2048):
            rows = encoder([queries[i] for i in chosen])
            state = model.split.run_below(rows.inputs)
            expected = rows.next_tokens[rows.positions]
            if local:
                with torch.no_grad():
                    expected = logits_of(model.split, rows, state).argmax(-1)
            self.parts.append((torch.tensor([owners[i] for i in chosen]), rows, state, expected))

    @torch.no_grad()
    def measure(self, model: EditableModel, facts: range) -> list[float]:
        """A value a row of these facts: whether all is said, or the share of tokens that stayed."""
        values: list[float] = []
        for owners, rows, state, expected in self.parts:
            chosen = (owners >= facts.start) & (owners < facts.stop)
            if not chosen.any():
                continue
            index = chosen.nonzero()[:, 0]
            wanted = expected.split(rows.positions.sum(-1).tolist())
            right = logits_of(model.split, rows[index], state.rows(index)).argmax(-1)
            share = row_means((right == torch.cat([wanted[i] for i in index.tolist()])).float(), rows[index])
            values += (share if self.local else (share == 1).float()).tolist()
        return values


def make_probes(model: EditableModel, records: Sequence[EditRecord]) -> dict[str, Probes]:
    """The probes of all records."""
    rows = {
        "edit success": [(i, Query(r.prompt, r.target)) for i, r in enumerate(records)],
        "generality": [(i, Query(text, r.target)) for i, r in enumerate(records) for text in r.paraphrases],
        "neighbourhood": [(i, Query(text)) for i, r in enumerate(records) for text in r.neighborhood[:NEIGHBOURS]],
        "unrelated": [(i, Query(*pair)) for i, r in enumerate(records) for pair in r.unrelated],
    }
    local = ("neighbourhood", "unrelated")
    return {
        kind: Probes(model, [query for _, query in pairs], [i for i, _ in pairs], kind in local)
        for kind, pairs in rows.items()
    }


@torch.no_grad()
def perplexity(model: EditableModel, passages: int = 12, length: int = 128) -> float:
    """Of text that the model reads, under its active edits."""
    ids = model.tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"]  # type: ignore[misc]
    spread = len(ids) // passages
    batch = torch.tensor([ids[i * spread : i * spread + length] for i in range(passages)])
    total = sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in batch.split(4))
    return math.exp(total / passages)


def measure_state(
    model: EditableModel, probes: dict[str, Probes], measured: Sequence[EditRecord], others: Sequence[EditRecord],
    count: int, in_calls_of: int | None,
) -> dict[str, float]:  # fmt: skip
    """
    Makes `count` edits and measures those of `measured` that are among them: a group after the other, or, where there
    are fewer than `count`, all of them spread evenly among others.
    """
    values: dict[str, list[float]] = {kind: [] for kind in KINDS}
    perplexities, made, seconds = [], 0, 0.0
    each = max(1, count // len(measured))
    for start in range(0, len(measured), min(count, len(measured))):
        group: list[EditRecord] = []
        for i, record in enumerate(measured[start : start + count]):
            group += [record, *others[i * (each - 1) : (i + 1) * (each - 1)]]
        began = time.perf_counter()
        for first in range(0, len(group), in_calls_of or count):
            call = group[first : first + (in_calls_of or count)]
            model.edit([record.prompt for record in call], [record.target for record in call], force=True)
        seconds += time.perf_counter() - began
        made += len(group)
        for kind in KINDS:
            values[kind] += probes[kind].measure(model, range(start, min(start + count, len(measured))))
        if start == 0:
            perplexities.append(perplexity(model))
        model.undo_all()
    means = {kind: sum(found) / len(found) for kind, found in values.items() if found}
    return {**means, "perplexity": perplexities[0], "measured": len(measured), "seconds an edit": seconds / made}


def measure_alone(model: EditableModel, records: Sequence[EditRecord], timed: int = 5) -> dict[str, float]:
    """Edits made alone, several in one pass, each row under its own; a few more are timed, and one read under."""
    fewer = [replace(record, neighborhood=record.neighborhood[:NEIGHBOURS]) for record in records]
    if not model.editor.is_calibrated:
        with model.edited(records[0].prompt, records[0].target, force=True):
            pass
    summary = summarize(
        evaluate_records(
            model.split, model.targets, model.editor, model.encoder, fewer, 20, model.editor.max_steps, progress=False
        )
    )
    began = time.perf_counter()
    for record in records[:timed]:
        model.edit(record.prompt, record.target, force=True)
        if record is not records[timed - 1]:
            model.undo()
    seconds = (time.perf_counter() - began) / timed
    read = perplexity(model)
    model.undo_all()
    means = {kind: summary[name] for kind, name in zip(KINDS, NAMES, strict=True)}
    return {**means, "perplexity": read, "measured": len(records), "seconds an edit": seconds}


def load(method: str, tokenizer: Any, base: Any, options: dict[str, Any]) -> EditableModel:
    """A model whose editor is a folder's, or a method that needs no training."""
    if (Path(method) / "editor_config.json").exists():
        return EditableModel.from_pretrained(base, method, tokenizer)
    if method == "gradient" and not options:
        return EditableModel(base, tokenizer=tokenizer)
    return EditableModel(base, EditorConfig(method=method, **options), tokenizer)


def table(states: dict[str, dict[str, Any]], before: float) -> str:
    """The states as Markdown."""
    names = [*KINDS, "perplexity", "seconds an edit"]
    lines = ["| method | edits | calls | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for state in states.values():
        cells = [f"{state[name]:.{'3f' if name in KINDS else '3g'}}" if name in state else "" for name in names]
        calls = f"of {state['in_calls_of']}" if state["in_calls_of"] else "one"
        lines.append(f"| {state['method']} | {state['count']} | {calls} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Perplexity without edits: {before:.3g}.", ""])


def plot(states: dict[str, dict[str, Any]], path: Path) -> None:
    """The four metrics over the number of edits, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.4), sharey=True)
    series = list(dict.fromkeys((s["method"], bool(s["in_calls_of"])) for s in states.values()))
    for panel, kind in zip(panels, KINDS, strict=True):
        for method, sequential in series:
            points = sorted(
                (s["count"], s[kind])
                for s in states.values()
                if (s["method"], bool(s["in_calls_of"])) == (method, sequential)
            )
            label = f"{method}, calls of 10" if sequential else method
            panel.plot(*zip(*points, strict=True), marker="o", linestyle="--" if sequential else "-", label=label)
        panel.set(xscale="log", title=kind, xlabel="edits kept", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_MEND_DATA"), help="folder of the facts")
    parser.add_argument("--facts", default="facts_test.json", help="settings are chosen on facts_validation.json")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/many_edits"), help="without suffix")
    parser.add_argument("--methods", default=f"mend={EDITOR},gradient=gradient", help="name=folder or method, ...")
    parser.add_argument("--option", action="append", default=[], help="EditorConfig's name=value (JSON), repeatable")
    parser.add_argument("--counts", default="1,10,100,1000", help="edits in one call")
    parser.add_argument("--sequential", default="10,100,1000", help="edits in calls of --call")
    parser.add_argument("--call", type=int, default=10)
    parser.add_argument("--measured", type=int, default=100, help="facts measured in each state")
    parser.add_argument("--seed", type=int, default=0, help="order of the facts")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of facts with --data or HF_MEND_DATA")
    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.option)}
    path = arguments.results.with_suffix(".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"states": {}}
    questions = read_questions(Path(arguments.data) / "nq_open_test.jsonl")
    read = read_counterfact(Path(arguments.data) / arguments.facts, questions)
    records = list({" ".join(record.prompt.split()): record for record in read}.values())  # one target a prompt
    random.Random(arguments.seed).shuffle(records)
    one_call = [(int(count), None) for count in arguments.counts.split(",") if count]
    many = [(int(count), arguments.call) for count in arguments.sequential.split(",") if count]
    states = kept["states"]
    base, tokenizer = load_smollm2()
    for item in arguments.methods.split(","):
        title, method = item.split("=")
        missing = [s for s in [*one_call, *many] if f"{title}/{s[0]}/{s[1]}" not in states]
        if not missing:
            continue
        model = load(method, tokenizer, base, options)
        kept["perplexity_before"] = perplexity(model)
        measured, others = records[: arguments.measured], records[arguments.measured :]
        probes: dict[str, Probes] = {}
        for count, in_calls_of in missing:
            if count == 1 and in_calls_of is None:
                state = measure_alone(model, measured)
            else:
                probes = probes or make_probes(model, measured)
                state = measure_state(model, probes, measured, others, count, in_calls_of)
            name = f"{title}/{count}/{in_calls_of}"
            states[name] = {"method": title, "count": count, "in_calls_of": in_calls_of, **state}
            print(name, {key: round(value, 3) for key, value in state.items()}, flush=True)
            kept |= {
                "base_model": SMOLLM2_ID,
                "facts": arguments.facts,
                "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    markdown = table(states, kept["perplexity_before"])
    arguments.results.with_suffix(".md").write_text(markdown, encoding="utf-8")
    plot(states, arguments.results.with_suffix(".png"))
    print(markdown)


if __name__ == "__main__":
    main()
