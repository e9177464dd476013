"""
Train and measure the MEND paper's ablations (Mitchell et al. 2022, section 5.4), each by EditorConfig alone.

    python benchmarks/ablations.py --data DIR --steps 400

`DIR` (or HF_MEND_DATA) holds facts_train.json, facts_test.json, nq_open_train.jsonl and nq_open_test.jsonl. All
variants see the same facts in the same order, from the same hidden states, which are computed once. Variants that the
JSON has already are not trained again. `--paper` takes the paper's layers and leaves out the whitening, which is not
the paper's; `--option name=value` sets any field of EditorConfig for all variants.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import DATA, DEVICE, PARAPHRASES_ALONE, config_options, load_base, parse_with_data, write_results

from hf_mend import (
    EditorConfig,
    EditorTrainer,
    EditorTrainingArguments,
    EditRecord,
    evaluate_records,
    get_editable_model,
    read_counterfact,
    read_questions,
    summarize,
)
from hf_mend.demo.smollm2 import SMOLLM2_ID
from hf_mend.evaluation.reports import TITLES
from hf_mend.hub.cards import machine, table


METRICS = ("edit_success", "generality", "neighborhood", "unrelated", "score")  # that the table shows
VARIANTS: dict[str, dict[str, Any]] = {
    "MEND": {},
    "no sharing": {"shared": False},
    "no normalisation": {"normalize": False},
    "no identity initialisation": {"init": "xavier"},
    "delta only": {"transform": "delta"},
    "x only": {"transform": "x"},
    "smaller only": {"transform": "smaller"},  # which side is narrower, a layer at a time: the paper's one-sided MEND
    "each side on its own": {"transform": "both_separate"},
}


SHOWN = ("edit_success", "generality", "neighborhood", "unrelated", "score")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "ablations")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names from the table, separated by commas")
    parser.add_argument("--paper", action="store_true", help="the paper's layers, no whitening")
    parser.add_argument("--option", action="append", default=[], help="EditorConfig's name=value (JSON), repeatable")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--facts", default="facts_test.json", help="what to measure on")
    parser.add_argument("--limit", type=int, help="measure on this many facts only")
    parser.add_argument("--train-limit", type=int, help="train on this many facts only")
    parser.add_argument("--hidden-states", type=Path, help="where the hidden states are kept (a temporary folder)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 mixed precision")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse_with_data(parser)
    arguments.variants = [name.strip() for name in arguments.variants.split(",")]
    unknown = [name for name in arguments.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants has {unknown}; the variants are {list(VARIANTS)}")
    return arguments


def config_of(variant: str, arguments: argparse.Namespace) -> EditorConfig:
    """A variant's configuration."""
    options = {"target_modules": "paper", "whiten": False} if arguments.paper else {}
    options |= config_options(arguments.option)
    return EditorConfig(**{**options, **VARIANTS[variant]})


def train_and_measure(
    variant: str, train: list[EditRecord], test: list[EditRecord], hidden_states: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """A variant's metrics, its parameters and the seconds of its training, hidden states left out."""
    base, tokenizer = load_base()
    torch.manual_seed(arguments.seed)
    model = get_editable_model(base, config_of(variant, arguments), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = EditorTrainer(
            model,
            EditorTrainingArguments(
                folder,
                **PARAPHRASES_ALONE,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=min(20, arguments.steps // 5),
                logging_steps=25,
                save_strategy="no",
                hidden_states_dir=str(hidden_states),
                seed=arguments.seed,
                bf16=arguments.bf16,
                use_cpu=DEVICE.type == "cpu",
                report_to=[],
            ),
            train,
            questions=read_questions(arguments.data / "nq_open_train.jsonl"),
        )
        seconds = trainer.train().metrics["train_runtime"]
    measured = evaluate_records(model.eval().split, model.targets, model.editor, model.encoder, test, max_steps=1)
    size = sum(parameter.numel() for parameter in model.editor.parameters())
    return {**summarize(measured), "editor_parameters": size, "training_seconds": seconds}


def table_of(result: dict[str, Any]) -> str:
    """The variants as Markdown, with the settings that all share."""
    rows = [
        (
            name,
            *(f"{found[metric]:.3f}" for metric in METRICS),
            f"{found['editor_parameters'] / 1e6:.1f} million",
            f"{found['training_seconds']:.0f}",
        )
        for name, found in result["variants"].items()
    ]
    head = ("variant", *(TITLES[metric] for metric in METRICS), "editor's parameters", "training, s")
    given = {name: value for name, value in result["settings"].items() if value not in (None, [], False)}
    shared = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"{table(head, rows)}\n\n{result['base_model']}, {result['machine']}; {shared}."


def main() -> None:
    arguments = parse_arguments()
    train = list(read_counterfact(arguments.data / "facts_train.json"))
    random.Random(arguments.seed).shuffle(train)
    train = train[: arguments.train_limit]
    questions = read_questions(arguments.data / "nq_open_test.jsonl")
    test = list(read_counterfact(arguments.data / arguments.facts, questions))[: arguments.limit]
    path = arguments.results.with_suffix(".json")
    kept = ("paper", "option", "steps", "batch_size", "learning_rate", "facts", "limit", "train_limit", "bf16", "seed")
    settings = {name: getattr(arguments, name) for name in kept}
    result = {"base_model": SMOLLM2_ID, "machine": machine(DEVICE), "settings": settings, "variants": {}}
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["settings"] != settings:
            raise SystemExit(f"{path} holds variants of other settings, {earlier['settings']}; give other --results")
        result = earlier
    write_results(path, result, table_of(result))
    with tempfile.TemporaryDirectory() as temporary:
        for variant in arguments.variants:
            if variant in result["variants"]:
                continue
            started = time.perf_counter()
            folder = arguments.hidden_states or Path(temporary)
            result["variants"][variant] = train_and_measure(variant, train, test, folder, arguments)
            print(f"{variant}: {time.perf_counter() - started:.0f} s")
            result["machine"] = machine(DEVICE)
            write_results(path, result, table_of(result))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
