"""
Train an editor for SmolLM2-135M-Instruct whose edits act everywhere, measure it on the test facts and write the table.

    python benchmarks/quality.py --data DIR --hold-out P27,P106,P178 --output build/editor/base

`DIR` (or the environment variable HF_MEND_DATA) holds facts_train.json, facts_test.json, nq_open_train.jsonl and
nq_open_test.jsonl. Facts of the held-out relations never enter training; the table reports them apart. With
`--evaluate`, the editor in `--output` is measured without being trained again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from common import DATA, DEVICE, PARAPHRASES_ALONE, config_options, load_base, parse_with_data, write_results

from hf_mend import (
    EditableModel,
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
from hf_mend.hub.cards import CardNotes, machine, metrics_table, write_card
from hf_mend.hub.files import read_tensors
from hf_mend.training.soundness import last_whole_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--output", type=Path, required=True, help="folder of the editor")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/quality"), help="table, without suffix"
    )
    parser.add_argument("--hold-out", default="", help="relations, separated by commas, that training never sees")
    parser.add_argument("--evaluate", action="store_true", help="measure the editor in --output, train nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--start-from", type=Path, help="a saved editor whose weights training starts from")
    parser.add_argument("--checkpoints", type=Path, help="where training keeps its checkpoints (a temporary folder)")
    parser.add_argument("--hidden-states", type=Path, help="where the hidden states below the edited blocks are kept")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scale-steps", type=float, default=1.0, help="makes the trained edits larger or smaller")
    parser.add_argument("--neighborhood-weight", type=float, default=1.5)
    parser.add_argument("--unrelated-weight", type=float, default=20.0)
    parser.add_argument("--general-rows", type=int, default=1)
    parser.add_argument("--neighborhood-rows", type=int, default=2)
    parser.add_argument(
        "--group-size", "--edits-together", type=int, default=1, help="train on up to this many edits at once"
    )
    parser.add_argument(
        "--micro-batch-size", "--edits-at-once", type=int, help="edits a step whose texts are in memory at a time"
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 mixed precision")
    parser.add_argument("--limit", type=int, help="measure on this many test facts only")
    parser.add_argument("--target-modules", default="default", help="as EditorConfig takes it, or a comma list")
    parser.add_argument("--layers", help="blocks to edit, separated by commas")
    parser.add_argument("--max-steps-of-an-edit", type=int, default=3, help="as EditableModel.edit's max_steps")
    parser.add_argument(
        "--facts", default="facts_test.json", help="what to measure on; settings: facts_validation.json"
    )
    parser.add_argument("--together", default="", help="also apply so many edits at once (3,10)")
    parser.add_argument("--option", action="append", default=[], help="EditorConfig's name=value (JSON), repeatable")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse_with_data(parser)
    arguments.results = arguments.results or Path(__file__).parent / "results" / arguments.output.name
    return arguments


def start_from(model: EditableModel, folder: Path) -> None:
    """Takes a saved editor's weights; a MEND editor's are MALMEN's, whose ridges then begin as they are configured."""
    tensors = dict(read_tensors(folder / "editor.safetensors")[0])
    if model.editor_config.method == "malmen":
        tensors.setdefault("log_ridge", model.editor.log_ridge.detach())
    model.editor.load_state_dict(tensors)


def train(model: EditableModel, records: list[EditRecord], arguments: argparse.Namespace) -> float:
    """Trains the editor; returns the seconds it took."""
    questions = read_questions(arguments.data / "nq_open_train.jsonl")
    with tempfile.TemporaryDirectory() as temporary:
        trainer = EditorTrainer(
            model,
            EditorTrainingArguments(
                output_dir=str(arguments.checkpoints or temporary),
                **PARAPHRASES_ALONE,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                neighborhood_weight=arguments.neighborhood_weight,
                unrelated_weight=arguments.unrelated_weight,
                general_rows=arguments.general_rows,
                neighborhood_rows=arguments.neighborhood_rows,
                group_size=arguments.group_size,
                micro_batch_size=arguments.micro_batch_size,
                bf16=arguments.bf16,
                use_cpu=DEVICE.type == "cpu",  # without saying so, no bfloat16 there
                lr_scheduler_type="linear",
                warmup_steps=20,
                logging_steps=25,
                save_steps=100,
                save_strategy="steps" if arguments.checkpoints else "no",
                hidden_states_dir=arguments.hidden_states and str(arguments.hidden_states),
                seed=arguments.seed,
                report_to=[],
            ),
            records,
            questions=questions,
        )
        started = time.perf_counter()
        last = last_whole_checkpoint(arguments.checkpoints) if arguments.resume and arguments.checkpoints else None
        trainer.train(resume_from_checkpoint=last)
        return time.perf_counter() - started


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on: no folders, and nothing of the training where there was none."""
    measuring = ("hold_out", "limit", "max_steps_of_an_edit", "facts", "together")
    folders = ("data", "checkpoints", "hidden_states", "output", "results")
    names = measuring if arguments.evaluate else [name for name in vars(arguments) if name not in folders]
    return {name: str(getattr(arguments, name)) for name in names}


def main() -> None:
    arguments = parse_arguments()
    held_out = [name for name in arguments.hold_out.split(",") if name]
    base, tokenizer = load_base()
    seconds = None
    if arguments.evaluate:
        model = EditableModel.from_pretrained(base, arguments.output, tokenizer=tokenizer)
    else:
        facts = read_counterfact(arguments.data / "facts_train.json")
        records = [record for record in facts if record.relation not in held_out]
        random.Random(arguments.seed).shuffle(records)
        modules = arguments.target_modules
        config = EditorConfig(
            target_modules=modules.split(",") if "," in modules or arguments.layers else modules,
            layers_to_transform=[int(i) for i in arguments.layers.split(",")] if arguments.layers else None,
            **config_options(arguments.option),
        )
        torch.manual_seed(arguments.seed)
        model = get_editable_model(base, config, tokenizer)
        if arguments.start_from:
            start_from(model, arguments.start_from)
        seconds = train(model, records, arguments)
        model.editor.scale_steps(arguments.scale_steps)
        # Measured as it is shared: in bfloat16, read from its file.
        model.save_pretrained(arguments.output, dtype=torch.bfloat16)
        model.load_editor(arguments.output / "editor.safetensors")
    test_questions = read_questions(arguments.data / "nq_open_test.jsonl")
    test = list(read_counterfact(arguments.data / arguments.facts, test_questions))[: arguments.limit]
    started = time.perf_counter()
    measured = evaluate_records(model.eval().split, model.targets, model.editor, model.encoder, test,
        max_steps=arguments.max_steps_of_an_edit, generate=True,
    )  # fmt: skip
    groups = {"all": measured}
    if held_out:
        pairs = list(zip(test, measured, strict=True))
        groups["relations seen in training"] = [m for r, m in pairs if r.relation not in held_out]
        groups[f"unseen relations ({', '.join(held_out)})"] = [m for r, m in pairs if r.relation in held_out]
    for count in [int(number) for number in arguments.together.split(",") if number]:
        groups[f"all, {count} edits applied together"] = evaluate_records(
            model.split, model.targets, model.editor, model.encoder, test,
            max_steps=arguments.max_steps_of_an_edit, group_size=count,
        )  # fmt: skip
    values = {title: summarize(group) for title, group in groups.items() if group}
    markdown = metrics_table(values)
    result = {
        "base_model": SMOLLM2_ID,
        "hold_out": held_out,
        "settings": settings(arguments),
        "targets": [target.name for target in model.targets],
        "training_seconds": seconds,
        "evaluation_seconds": time.perf_counter() - started,
        "machine": machine(model.device),
        "metrics": values,
    }
    write_results(arguments.results, result, markdown)
    print(markdown)
    if not arguments.limit and arguments.facts == "facts_test.json":
        options = f" --hold-out {arguments.hold_out}" if held_out else ""
        options += f" --together {arguments.together}" if arguments.together else ""
        command = (
            "# DIR holds facts_test.json and nq_open_test.jsonl\n"
            f"python benchmarks/quality.py --data DIR --evaluate{options} \\\n"
            f"    --output {arguments.output} --results build/again"
        )
        notes = CardNotes(measured=values, command=command)
        write_card(arguments.output, model.editor_config, [target.name for target in model.targets], notes)


if __name__ == "__main__":
    main()
