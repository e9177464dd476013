"""
The paper's procedure and this library's, on the same model, facts and layers, in one run: prints ratios, writes JSON.

    python benchmarks/speed.py --data DIR

The paper's procedure (Mitchell et al. 2022, algorithms 1 and 2) is written here from the paper: an ordinary forward
and backward pass with gradients for all weights, one edit a step, a dense update of the weights, and separate passes
over the whole model for the target, for the edited and for the un-edited locality text. Times are medians of several
repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from hf_mend import EditableModel, EditorConfig, EditRecord, get_editable_model, read_counterfact, read_questions
from hf_mend.data import EditBatch, EditCollator, Query, TrainingExamples
from hf_mend.losses import kl_divergence, row_means, target_nll
from hf_mend.smollm2 import load_smollm2
from hf_mend.targets import block_stacks, lowest_block
from hf_mend.trainer import calibrate


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("HF_MEND_DATA"), help="folder of facts and questions")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "speed")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of facts with --data or HF_MEND_DATA")
    return arguments


def median_seconds(function: Callable[[], Any], repeat: int) -> float:
    """Median time of a call, after one call that does not count."""
    function()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


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


def our_training_step(model: EditableModel, batch: EditBatch) -> None:
    model(edit_batch=batch).loss.backward()
    model.editor.zero_grad(set_to_none=True)


def measure(model: EditableModel, records: list[EditRecord], questions: list[tuple[str, str]], arguments: Any) -> dict:
    """All figures of one choice of layers."""
    repeat = arguments.repeat
    examples = TrainingExamples(records, questions)
    collate = EditCollator(model.encoder)
    one = collate([examples[0]])
    many = collate([examples[i] for i in range(arguments.batch_size)])
    record = records[0]
    rows = model.encoder([Query(record.prompt, record.target)])
    figures: dict[str, float] = {"tokens": rows.inputs["input_ids"].numel()}
    kind, lowest = lowest_block(model.targets)
    depth = len(next(stack for stack in block_stacks(model.base_model) if stack.kind == kind).blocks)
    figures["f"] = (depth - lowest) / depth

    with torch.no_grad():
        forward = median_seconds(lambda: model.base_model(**rows.inputs, use_cache=False), repeat)

    def edit(check: bool) -> None:
        model.edit(record.prompt, record.target, max_steps=1, force=True, check=check)
        model.undo()

    figures["forward pass, s"] = forward
    figures["edit / forward pass"] = median_seconds(lambda: edit(False), repeat) / forward
    figures["edit with the check / forward pass"] = median_seconds(lambda: edit(True), repeat) / forward
    papers_edit = median_seconds(lambda: papers_update(model, one), repeat)
    figures["edit, the paper's procedure / ours"] = papers_edit / (figures["edit / forward pass"] * forward)
    ours = median_seconds(lambda: our_training_step(model, many), 3) / arguments.batch_size
    figures["training, edits a second"] = 1 / ours
    papers_step = median_seconds(lambda: papers_training_step(model, one), 3)
    figures["training, edits a second, ours / the paper's"] = papers_step / ours

    inputs = model.tokenizer(record.prompt, return_tensors="pt")
    options = {"max_new_tokens": 100, "min_new_tokens": 100, "do_sample": False, "pad_token_id": 0}

    def generate() -> None:
        model.generate(**inputs, **options)

    plain = median_seconds(generate, 3)
    model.edit(records[:10], max_steps=1, force=True)
    figures["generation with 10 edits / without"] = median_seconds(generate, 3) / plain
    model.undo_all()
    return figures


def main() -> None:
    arguments = parse_arguments()
    data = Path(arguments.data)
    records = list(read_counterfact(data / "facts_validation.json"))
    questions = read_questions(data / "nq_open_train.jsonl")
    results: dict[str, Any] = {}
    for choice in ("paper", "default"):
        base, tokenizer = load_smollm2()
        torch.manual_seed(0)
        model = get_editable_model(base, EditorConfig(target_modules=choice), tokenizer)
        calibrate(model, TrainingExamples(records, questions), 2, 8)
        results[choice] = measure(model, records, questions, arguments)
    names = list(results["paper"])
    lines = ["| figure | last three MLPs | default layers |", "|---|---|---|"]
    lines += [f"| {name} | {results['paper'][name]:.3g} | {results['default'][name]:.3g} |" for name in names]
    print("\n".join(lines))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    machine = f"{device}, {platform.machine()}, torch {torch.__version__}"
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "figures": results}
    arguments.results.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    arguments.results.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
