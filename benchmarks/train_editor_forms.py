"""
Trains the editor of SmolLM2-135M-Instruct on facts in every form of asking: questions, chats, behind other text.

    python benchmarks/train_editor_forms.py --data DIR --start-from EDITOR --output build/forms --checkpoints build/of

`DIR` (or the environment variable HF_MEND_DATA) holds facts_train.json and nq_open_train.jsonl; the facts of
examples/data are added to its own. Held out: the relations of `--hold-out`, of each other relation's templates the
last question and the last prompt about the same subject, and the last of the packaged texts. Started again with the
same arguments, it goes on from its newest checkpoint. With `--minutes` the learning rate falls to nothing in the last
third of that time, whatever number of steps that is. `benchmarks/in_the_wild.py` measures.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import DATA, DEVICE, load_base, parse_with_data
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_mend import (
    EditableModel,
    EditorTrainer,
    EditorTrainingArguments,
    EditRecord,
    read_counterfact,
    read_questions,
)
from hf_mend.data.forms import DEFAULT_FORMS, FormTemplates, packaged_texts, with_forms
from hf_mend.training.examples import Asking, TrainingExamples


EXAMPLES = Path(__file__).parent.parent / "examples" / "data"
HELD_OUT = "P27,P106,P178,iata_city,language_script,country_currency,city_us_state,airport_country"
HELD_OUT_TEXTS = 40
CONTEXT_RATE = 0.4
NEIGHBOURS = 0.4
EDIT_FORMS = {"prompt": 0.8, "question": 0.1, "chat": 0.1}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--examples", type=Path, default=EXAMPLES, help="folder of more facts and questions")
    parser.add_argument("--output", type=Path, required=True, help="folder of the editor")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, required=True, help="a saved editor")
    parser.add_argument("--hold-out", default=HELD_OUT, help="relations that training never sees")
    parser.add_argument("--facts", type=int, help="at most so many facts, drawn at random")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--minutes", type=float, help="end after so many of the processor's time, all runs together")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--save-steps", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--training", action="append", default=[], help="EditorTrainingArguments' name=value, in JSON")
    parser.add_argument("--seed", type=int, default=0)
    return parse_with_data(parser)


def training_records(arguments: argparse.Namespace, held_out: list[str], mixed: bool = True) -> list[EditRecord]:
    """
    The facts of both folders in a random order, with the forms of asking that training may see. Mixed, some have
    neighbours in place of prompts about the same subject.
    """
    packaged = FormTemplates.load().split()[0].relations
    templates = FormTemplates({name: forms for name, forms in packaged.items() if name not in held_out})
    facts = [
        record
        for folder in (arguments.data, arguments.examples)
        for record in read_counterfact(folder / "facts_train.json")
        if record.relation not in held_out
    ]
    draw = random.Random(arguments.seed)
    draw.shuffle(facts)
    records = with_forms(facts[: arguments.facts], templates)
    # A step has time for one text an edit that must stay: a neighbour, or the same subject asked for something else.
    # What has nothing to do with an edit is kept apart by its scope.
    return [
        replace(record, same_subject=record.neighborhood)
        if mixed and record.neighborhood and draw.random() < NEIGHBOURS
        else record
        for record in records
    ]


class Clock(TrainerCallback):
    """
    Ends the training after some minutes of the processor's time, those of earlier runs included, and lets the learning
    rate fall before.

    Args:
        minutes (`float`): How many.
        file (`Path`): Where the minutes that have passed are kept.
    """

    def __init__(self, minutes: float, file: Path):
        self.minutes, self.file = minutes, file
        self.earlier = float(file.read_text()) if file.is_file() else 0.0
        self.started = time.process_time()

    @property
    def passed(self) -> float:
        return self.earlier + (time.process_time() - self.started) / 60

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        factor = min(1.0, max(0.0, 3 * (1 - self.passed / self.minutes)), (state.global_step + 1) / args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * max(factor, 0.01)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        print(f"step {state.global_step} after {self.passed:.1f} minutes", flush=True)
        control.should_training_stop |= self.passed >= self.minutes

    def on_save(self, args, state, control, **kwargs) -> None:
        self.file.write_text(f"{self.passed:.3f}\n")


def context_texts() -> list[str]:
    """The packaged texts that training may see."""
    return packaged_texts()[:-HELD_OUT_TEXTS]


def main() -> None:
    arguments = parse_arguments()
    held_out = [name for name in arguments.hold_out.split(",") if name]
    base, tokenizer = load_base()
    torch.manual_seed(arguments.seed)
    model = EditableModel.from_pretrained(base, arguments.start_from, tokenizer=tokenizer)
    records = training_records(arguments, held_out)
    questions = read_questions(arguments.data / "nq_open_train.jsonl")
    questions += read_questions(arguments.examples / "questions.jsonl")
    examples = TrainingExamples(
        records,
        questions,
        general_rows=2,
        neighborhood_rows=0,
        unrelated_rows=0,
        seed=arguments.seed,
        asking=Asking(DEFAULT_FORMS, CONTEXT_RATE, EDIT_FORMS, context_texts()),
        same_subject_rows=1,
        continuation_rows=1,
    )
    options = {
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "same_subject_weight": 1.0,
        "continuation_weight": 3.0,
        "continuation_tokens": 0,
        "lr_scheduler_type": "constant" if arguments.minutes else "linear",
        "warmup_steps": 10,
        "logging_steps": 5,
        "save_steps": arguments.save_steps,
        "seed": arguments.seed,
        **{name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.training)},
    }
    trainer = EditorTrainer(
        model,
        EditorTrainingArguments(
            output_dir=str(arguments.checkpoints), use_cpu=DEVICE.type == "cpu", report_to=[], **options
        ),
        examples,
    )
    if arguments.minutes:
        trainer.add_callback(Clock(arguments.minutes, arguments.checkpoints / "minutes.txt"))
    last = get_last_checkpoint(str(arguments.checkpoints)) if arguments.checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(arguments.output, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
