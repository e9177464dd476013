"""
Compare the paper's procedure and this library's on the same model, facts and layers; print ratios and write JSON.

    python benchmarks/speed.py --data DIR

The paper's procedure (Mitchell et al. 2022, algorithms 1 and 2) is written here from the paper: an ordinary forward
and backward pass with gradients for all weights, one edit a step, a dense update of the weights, and separate passes
over the whole model for the target, for the edited and for the un-edited locality text. Times are medians of several
repetitions.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DATA, DEVICE, load_base, parse_with_data, write_results
from torch.func import functional_call

from hf_mend import (
    EditableModel,
    EditorConfig,
    EditRecord,
    HiddenStateCache,
    get_editable_model,
    read_counterfact,
    read_questions,
)
from hf_mend.bases.gradients import kl_divergence, row_means
from hf_mend.bases.targets import block_lists, lowest_block
from hf_mend.data.encoding import Query, length_batches
from hf_mend.hub.cards import machine
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditBatch, EditCollator, TrainingExample, TrainingExamples
from hf_mend.training.losses import target_nll
from hf_mend.training.objective import EditingObjective


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "speed")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--repeat-training", type=int, default=3, help="of training steps and of generation")
    parser.add_argument("--edits-only", action="store_true", help="what one edit costs, and no more")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sample", type=int, default=2000, help="texts that tell how fast the cache fills")
    return parse_with_data(parser)


def medians(calls: dict[str, Callable[[], Any]], repeat: int, warm_up: bool = True) -> dict[str, float]:
    """Median seconds of each call. They are made in turn, so that a busier or slower moment meets them all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + warm_up):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- the paper's procedure ----


def papers_update(model: EditableModel, batch: EditBatch) -> dict[str, torch.Tensor]:
    """The new weights of the edited layers, through a backward pass that makes every weight's gradient."""
    base = model.base_model
    seen: dict[str, list[torch.Tensor]] = {target.name: [] for target in model.targets}
    handles = []
    for target in model.targets:
        record = seen[target.name]
        handles.append(target.module.register_forward_hook(lambda m, args, out, r=record: r.append(args[0].detach())))
        handles.append(target.module.register_full_backward_hook(lambda m, gin, gout, r=record: r.append(gout[0])))
    rows = batch.edit
    base.requires_grad_(True)
    logits = base(**rows.inputs, use_cache=False).logits
    target_nll(logits[rows.positions], rows).backward()
    base.requires_grad_(False)
    base.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    updates = model.editor({name: (x, delta) for name, (x, delta) in seen.items()})
    return {
        f"{target.name}.weight": target.module.weight + updates[target.name][1][0].T @ updates[target.name][0][0]
        for target in model.targets
    }


def papers_training_step(model: EditableModel, batch: EditBatch) -> None:
    """One edit; its loss on the target and on the locality text; a backward pass into the editor."""
    weights = papers_update(model, batch)

    def logits(rows: Any, new: bool) -> torch.Tensor:
        arguments = {**rows.inputs, "use_cache": False}
        out = functional_call(model.base_model, weights, kwargs=arguments) if new else model.base_model(**arguments)
        return out.logits[rows.positions]

    loss = target_nll(logits(batch.general, True), batch.general)
    for rows in batch.local.values():
        with torch.no_grad():
            base = logits(rows, False)
        loss = loss + row_means(kl_divergence(logits(rows, True), base), rows).mean()
    loss.backward()
    model.editor.zero_grad(set_to_none=True)


# ---- ours ----


def our_training_step(model: EditableModel, batch: EditBatch, cache: HiddenStateCache | None = None) -> None:
    EditingObjective(model)(batch, run_below=cache).loss.backward()
    model.editor.zero_grad(set_to_none=True)


def training_figures(
    model: EditableModel, examples: TrainingExamples, one: EditBatch, many: EditBatch, arguments: argparse.Namespace
) -> dict[str, float]:
    """Edits a second, without the cache of hidden states, with it, and with filling it before the first epoch."""
    size = len(many)
    queries = list(dict.fromkeys(examples.queries(epochs=1)))
    with tempfile.TemporaryDirectory() as folder:
        cache = HiddenStateCache(model.split, folder)
        # A sample of the texts, the batch's own among them, gives the rate; an epoch needs them all once.
        own = [examples[i] for i in range(size)]
        sample = queries[:: max(1, len(queries) // arguments.sample)] + [
            query for example in own for query in queries_of(example)
        ]
        started = time.perf_counter()
        cache.fill(model.encoder, sample)
        a_text = (time.perf_counter() - started) / len(set(sample))
        stay = list(dict.fromkeys(query for example in own for query in [*example.neighborhood, *example.unrelated]))
        started = time.perf_counter()
        cache.fill_unedited(model.encoder, stay)
        an_answer = (time.perf_counter() - started) / len(stay)
        seconds = medians(
            {
                "paper": lambda: papers_training_step(model, one),
                "plain": lambda: our_training_step(model, many),
                "warm": lambda: our_training_step(model, many, cache),
            },
            arguments.repeat_training,
        )
        gigabytes = cache.nbytes / len(cache) * len(queries) / 1e9
    papers, plain, warm = seconds["paper"], seconds["plain"] / size, seconds["warm"] / size
    # Each fact has two texts whose answers must stay, of which few are drawn twice in an epoch.
    cold = warm + a_text * len(queries) / len(examples) + 2 * an_answer
    return {
        "training, the paper's procedure, edits/s": 1 / papers,
        "training, ours without cache, edits/s": 1 / plain,
        "training, ours, cache warm, edits/s": 1 / warm,
        "training, ours without cache / the paper's": papers / plain,
        "training, ours / the paper's, cache warm": papers / warm,
        "training, ours / the paper's, cache cold, first epoch": papers / cold,
        "cache, GB for an epoch's texts": gigabytes,
    }


def scoped_figures(
    choice: str, records: list[EditRecord], questions: list[tuple[str, str]], record: EditRecord, arguments: Any
) -> dict[str, float]:
    """
    The same of edits that act where they are asked for: made in plain text and in a chat, and learned from texts that
    ask for them and from what follows their targets.
    """
    base, tokenizer = load_base()
    torch.manual_seed(0)
    model = get_editable_model(base, EditorConfig(target_modules=choice, scope=True), tokenizer)
    examples = TrainingExamples(records, questions, continuation_rows=1)
    calibrate(model, examples, 16, 8)
    papers = EditCollator(model.encoder)([TrainingExamples([record], questions, neighborhood_rows=1)[0]])
    papers = papers.to(model.device)
    examples.for_a_scope()
    many = EditCollator(model.encoder, scoped=True)([examples[i] for i in range(arguments.batch_size)])
    many = many.to(model.device)
    rows = model.encoder([Query(record.prompt, record.target)]).to(model.device)

    def forward() -> None:
        with torch.no_grad():
            base(**rows.inputs, use_cache=False)

    def edit(count: int, check: bool) -> None:
        chosen = records[:count] if count > 1 else [record]
        model.edit([r.prompt for r in chosen], [r.target for r in chosen], max_steps=1, force=True, check=check)
        model.undo_all()

    calls = {"forward": forward, "edit": lambda: edit(1, False), "checked": lambda: edit(1, True)}
    seconds = medians({**calls, "ten": lambda: edit(10, True)}, arguments.repeat)
    calls = {"paper": lambda: papers_training_step(model, papers), "ours": lambda: our_training_step(model, many)}
    steps = medians(calls, arguments.repeat_training)
    return {
        "with a scope, edit / forward pass": seconds["edit"] / seconds["forward"],
        "with a scope, edit with the check / forward pass": seconds["checked"] / seconds["forward"],
        "with a scope, one of ten edits in a call, with the check / forward pass": seconds["ten"]
        / seconds["forward"]
        / 10,
        "with a scope, training, ours without cache / the paper's": steps["paper"] * len(many) / steps["ours"],
    }


def queries_of(example: TrainingExample) -> list[Query]:
    return [example.edit, *example.general, *example.neighborhood, *example.unrelated]


def memory_of(function: Callable[[], Any], model: EditableModel) -> float:
    """Peak memory that a call adds, as a share of the base model's bytes."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.base_model.parameters())
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / size
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / size


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def many_edits_figures(model: EditableModel, records: list[EditRecord]) -> dict[str, float]:
    """1,000 edits in one call against plain forward passes over the same tokens in the same batches."""
    chosen = [records[i % len(records)] for i in range(1000)]
    prompts, targets = [record.prompt for record in chosen], [record.target for record in chosen]
    pairs = [model.encoder.tokens(Query(*pair)) for pair in zip(prompts, targets, strict=True)]
    size = 16
    lengths = [len(prompt) + len(target) for prompt, target in pairs]
    groups = [model.encoder.pad([pairs[i] for i in group]) for group in length_batches(lengths, size, 4096)]

    def forwards() -> None:
        with torch.no_grad():
            for rows in groups:
                model.base_model(**rows.to(model.device).inputs, use_cache=False)

    def edits(check: bool) -> None:
        model.edit(prompts, targets, max_steps=1, force=True, check=check, batch_size=size)
        model.undo_all()

    seconds = medians({"forwards": forwards, "edits": lambda: edits(False), "checked": lambda: edits(True)}, 1, False)
    return {
        "1,000 edits in one call / forward passes": seconds["edits"] / seconds["forwards"],
        "1,000 edits with the check / forward passes": seconds["checked"] / seconds["forwards"],
    }


def edit_figures(
    model: EditableModel, record: EditRecord, one_edit: EditBatch, arguments: argparse.Namespace
) -> dict[str, float]:
    """One edit, with and without the check after it, against a plain forward pass and the paper's procedure."""
    rows = model.encoder([Query(record.prompt, record.target)]).to(model.device)
    figures: dict[str, float] = {"tokens": rows.inputs["input_ids"].numel()}
    kind, lowest = lowest_block(model.targets)
    depth = len(next(one for one in block_lists(model.base_model) if one.kind == kind).blocks)
    figures["f"] = (depth - lowest) / depth

    def forward() -> None:
        with torch.no_grad():
            model.base_model(**rows.inputs, use_cache=False)

    def edit(check: bool) -> None:
        model.edit(record.prompt, record.target, max_steps=1, force=True, check=check)
        model.undo()

    calls = {"forward": forward, "edit": lambda: edit(False), "checked": lambda: edit(True)}
    seconds = medians(calls, arguments.repeat)
    figures["forward pass, s"] = seconds["forward"]
    figures["edit / forward pass"] = seconds["edit"] / seconds["forward"]
    figures["to reach: 1.15 (1 + f)"] = 1.15 * (1 + figures["f"])
    figures["edit with the check / forward pass"] = seconds["checked"] / seconds["forward"]
    figures["to reach: 1.15 (1 + 2 f)"] = 1.15 * (1 + 2 * figures["f"])
    # Apart: giving back the memory of all weights' gradients slows down what comes next.
    seconds = medians({"paper": lambda: papers_update(model, one_edit)}, arguments.repeat) | seconds
    figures["edit, the paper's procedure / ours"] = seconds["paper"] / seconds["edit"]
    return figures


def measure(
    model: EditableModel, choice: str, records: list[EditRecord], questions: list[tuple[str, str]], arguments: Any
) -> dict[str, float]:
    """All figures of one choice of layers."""
    examples = TrainingExamples(records, questions, neighborhood_rows=1)  # as EditorTrainer draws by default
    collate = EditCollator(model.encoder)
    many = collate([examples[i] for i in range(arguments.batch_size)]).to(model.device)
    record = min(records[:500], key=lambda r: abs(len(sum(model.encoder.tokens(Query(r.prompt, r.target)), [])) - 16))
    one_edit = collate([TrainingExamples([record], questions)[0]]).to(model.device)
    figures = edit_figures(model, record, one_edit, arguments)
    if arguments.edits_only:
        return figures
    figures.update(training_figures(model, examples, one_edit, many, arguments))

    def edit() -> None:
        model.edit(record.prompt, record.target, max_steps=1, force=True)
        model.undo()

    figures["memory added by an edit / the base model's size"] = memory_of(edit, model)
    figures.update(many_edits_figures(model, records))

    inputs = model.tokenizer(record.prompt, return_tensors="pt").to(model.device)
    options = {"max_new_tokens": 100, "min_new_tokens": 100, "do_sample": False, "pad_token_id": 0}

    def generate() -> None:
        model.generate(**inputs, **options)

    edits = [r.prompt for r in records[:10]], [r.target for r in records[:10]]
    model.edit(*edits, max_steps=1, force=True)

    def generate_without() -> None:
        with model.disable_edits():
            generate()

    seconds = medians({"edited": generate, "without": generate_without}, arguments.repeat_training)
    figures["generation of 100 tokens with 10 edits / without"] = seconds["edited"] / seconds["without"]
    fresh, _ = load_base()
    merged = model.merge_and_unload()
    seconds = medians(
        {
            "merged": lambda: merged.generate(**inputs, **options),
            "fresh": lambda: fresh.generate(**inputs, **options),
        },
        arguments.repeat_training,
    )
    figures["the same after merge_and_unload / without"] = seconds["merged"] / seconds["fresh"]
    return figures | scoped_figures(choice, records, questions, record, arguments)


def main() -> None:
    arguments = parse_arguments()
    data = arguments.data
    records = list(read_counterfact(data / "facts_train.json"))
    questions = read_questions(data / "nq_open_train.jsonl")
    results: dict[str, Any] = {}
    for choice in ("paper", "default"):
        base, tokenizer = load_base()
        torch.manual_seed(0)
        model = get_editable_model(base, EditorConfig(target_modules=choice), tokenizer)
        calibrate(model, TrainingExamples(records, questions), 16, 8)
        results[choice] = measure(model, choice, records, questions, arguments)
        print(json.dumps({choice: results[choice]}), flush=True)
    names = list(results["paper"])
    lines = ["| figure | last three MLPs | default layers |", "|---|---|---|"]
    lines += [f"| {name} | {results['paper'][name]:.3g} | {results['default'][name]:.3g} |" for name in names]
    print("\n".join(lines))
    result = {"machine": machine(DEVICE), "figures": results}
    write_results(arguments.results, result, "\n".join(lines))


if __name__ == "__main__":
    main()
