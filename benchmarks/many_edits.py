"""
Measure how well a model carries 1, 10, 100 and 1,000 edits, made in one call or in calls of ten, by each method.

    python benchmarks/many_edits.py --data DIR

`DIR` (or HF_MEND_DATA) holds facts_test.json and nq_open_test.jsonl. Every state is measured on `--measured` of its
facts: edit success, generality (paraphrases), neighbourhood and unrelated locality against the un-edited model, and
the model's own perplexity on text that has nothing to do with the facts (Python's documentation, which comes with the
interpreter). Writes JSON, a Markdown table and a plot. States that the JSON holds already are not measured again.

    python benchmarks/many_edits.py --data DIR --methods "" --scoped model_cards/smollm2-135m-instruct

keeps 100, 1,000 and 10,000 edits of an editor with a scope, made in calls of ten, and measures them in the wild as
`in_the_wild.py` does; facts_train.json fills up. The edits stay in a store beside the results, and finished parts in
a `.progress.jsonl`: a run that is interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from common import DATA, config_options, load_base, parse_with_data
from held_out import HELD_OUT_TEXTS

from hf_mend import EditableModel, EditorConfig, EditRecord, read_counterfact, read_questions
from hf_mend.config import config_class
from hf_mend.data.forms import FormTemplates, Surroundings, packaged_texts, with_forms
from hf_mend.demo.smollm2 import SMOLLM2_ID
from hf_mend.evaluation.asking import all_asked
from hf_mend.evaluation.evaluate import evaluate
from hf_mend.evaluation.scores import held_out_passages, perplexity
from hf_mend.evaluation.wild import WildSettings, measure_in_the_wild
from hf_mend.evaluation.wild_figures import figures_table, wild_means
from hf_mend.hub.cards import machine
from hf_mend.hub.plots import series_colors


KINDS = ("edit success", "generality", "neighbourhood", "unrelated")
NAMES = ("edit_success", "generality", "neighborhood", "unrelated")
NEIGHBOURS = 2  # neighbouring prompts measured of a fact
EDITOR = "model_cards/smollm2-135m-instruct"


def measure_state(
    model: EditableModel, records: Sequence[EditRecord], count: int, edits_per_call: int | None, arguments: Any
) -> dict[str, float]:
    """A state as the JSON keeps it; the metrics are those of `hf-mend eval`."""
    (state,) = evaluate(
        model, records, edits=(count,), edits_per_call=edits_per_call, limit=arguments.measured, seed=arguments.seed,
        metrics=("success", "generality", "neighborhood", "unrelated", "perplexity"), batch_size=20,
    )  # fmt: skip
    means = {kind: state.metrics[name] for kind, name in zip(KINDS, NAMES, strict=True)}
    return {
        **means,
        "perplexity": state.metrics["perplexity"],
        "measured": state.measured,
        "seconds an edit": state.seconds_an_edit,
    }


def load(
    method: str, tokenizer: Any, base: Any, options: dict[str, Any], texts: Sequence[tuple[str, str]]
) -> EditableModel:
    """A model whose editor is a folder's, or a method that needs no training and has seen these texts."""
    if (Path(method) / "editor_config.json").exists():
        return EditableModel.from_pretrained(base, method, tokenizer)
    if method == "gradient" and not options:
        model = EditableModel(base, tokenizer=tokenizer)
    else:
        names = {item.name for item in fields(config_class(method))}
        own = {name: value for name, value in options.items() if name in names}
        model = EditableModel(base, EditorConfig(method=method, **own), tokenizer)
    if texts:
        model.observe(texts)
    return model


def table(states: dict[str, dict[str, Any]], before: float) -> str:
    """The states as Markdown."""
    names = [*KINDS, "perplexity", "seconds an edit"]
    lines = ["| method | edits | calls | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for state in states.values():
        cells = [f"{state[name]:.{'3f' if name in KINDS else '3g'}}" if name in state else "" for name in names]
        calls = f"of {state['edits_per_call']}" if state["edits_per_call"] else "one"
        lines.append(f"| {state['method']} | {state['count']} | {calls} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Perplexity without edits: {before:.3g}.", ""])


def plot(states: dict[str, dict[str, Any]], path: Path) -> None:
    """The four metrics over the number of edits, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(14, 4.2), sharey=True)
    series = list(dict.fromkeys((s["method"], bool(s["edits_per_call"])) for s in states.values()))
    for panel, kind in zip(panels, KINDS, strict=True):
        panel.set_prop_cycle(color=series_colors())
        for method, sequential in series:
            points = sorted(
                (s["count"], s[kind])
                for s in states.values()
                if (s["method"], bool(s["edits_per_call"])) == (method, sequential)
            )
            label = f"{method}, calls of 10" if sequential else method
            panel.plot(*zip(*points, strict=True), marker="o", linestyle="--" if sequential else "-", label=label)
        panel.set(xscale="log", title=kind, xlabel="edits kept", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=110)


def measure_scoped(
    arguments: argparse.Namespace, base: Any, tokenizer: Any, kept: dict[str, Any], write: Callable[[], None]
) -> None:
    """Measures the states of `--scoped` in the wild that `kept` lacks."""
    model = EditableModel.from_pretrained(base, arguments.scoped, tokenizer=tokenizer).eval()
    facts, more = (list(read_counterfact(arguments.data / name)) for name in (arguments.facts, "facts_train.json"))
    questions = read_questions(arguments.data / "nq_open_test.jsonl")
    records = with_forms(facts[: arguments.measured], FormTemplates.load().split()[1])
    others = facts[arguments.measured :]
    around = Surroundings(others or facts, questions, packaged_texts()[-HELD_OUT_TEXTS:])
    asked = all_asked(model, records, around, [question for question, _ in questions])
    states = kept.setdefault("in the wild", {})
    for count in (int(count) for count in arguments.scoped_counts.split(",")):
        if str(count) in states:
            continue
        found = measure_in_the_wild(
            model, records, asked, WildSettings(count, arguments.call, batch_size=50), [*more, *others],
            arguments.results.with_suffix(".progress.jsonl"), arguments.results.with_suffix(".store"),
            held_out_passages(model),
        )  # fmt: skip
        states[str(count)] = wild_means(found.values) | found.perplexity
        print(count, {key: round(value, 3) for key, value in states[str(count)].items()}, flush=True)
        write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--facts", default="facts_test.json", help="settings are chosen on facts_validation.json")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/many_edits"), help="without suffix")
    parser.add_argument("--methods", default=f"mend={EDITOR},gradient=gradient", help="name=folder or method, ...")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        help="EditorConfig's name=value (JSON), for the methods that have it; repeatable",
    )
    parser.add_argument("--counts", default="1,10,100,1000", help="edits in one call")
    parser.add_argument("--sequential", default="10,100,1000", help="edits in calls of --call")
    parser.add_argument("--call", type=int, default=10)
    parser.add_argument("--scoped", type=Path, help="an editor with a scope, to measure in the wild")
    parser.add_argument("--scoped-counts", default="100,1000,10000", help="its edits, in calls of --call")
    parser.add_argument("--measured", type=int, default=100, help="facts measured in each state")
    parser.add_argument("--seed", type=int, default=0, help="order of the facts")
    parser.add_argument(
        "--observe", type=int, default=0, help="training questions (nq_open_train.jsonl) shown to methods that look"
    )
    arguments = parse_with_data(parser)
    options = config_options(arguments.option)
    path = arguments.results.with_suffix(".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"states": {}}
    questions = read_questions(arguments.data / "nq_open_test.jsonl")
    texts = read_questions(arguments.data / "nq_open_train.jsonl")[: arguments.observe] if arguments.observe else []
    read = read_counterfact(arguments.data / arguments.facts, questions)
    once = {" ".join(record.prompt.split()): record for record in read}  # one target a prompt
    records = [replace(record, neighborhood=record.neighborhood[:NEIGHBOURS]) for record in once.values()]
    one_call = [(int(count), None) for count in arguments.counts.split(",") if count]
    many = [(int(count), arguments.call) for count in arguments.sequential.split(",") if count]
    states = kept["states"]
    base, tokenizer = load_base()
    kept |= {"base_model": SMOLLM2_ID, "facts": arguments.facts, "machine": machine(base.device)}
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    for item in filter(None, arguments.methods.split(",")):
        title, method = item.split("=")
        missing = [s for s in [*one_call, *many] if f"{title}/{s[0]}/{s[1]}" not in states]
        if not missing:
            continue
        model = load(method, tokenizer, base, options, texts)
        kept["perplexity_before"] = perplexity(model, held_out_passages(model))
        for count, edits_per_call in missing:
            state = measure_state(model, records, count, edits_per_call, arguments)
            name = f"{title}/{count}/{edits_per_call}"
            states[name] = {"method": title, "count": count, "edits_per_call": edits_per_call, **state}
            print(name, {key: round(value, 3) for key, value in state.items()}, flush=True)
            write()
    parts = []
    if states:
        parts.append(table(states, kept["perplexity_before"]))
        plot(states, arguments.results.with_suffix(".png"))
    if arguments.scoped:
        measure_scoped(arguments, base, tokenizer, kept, write)
    if "in the wild" in kept:
        columns = {f"{count} edits": figures for count, figures in kept["in the wild"].items()}
        parts.append("In the wild, of an editor with a scope:\n\n" + figures_table(columns) + "\n")
    markdown = "\n".join(parts)
    arguments.results.with_suffix(".md").write_text(markdown, encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    main()
