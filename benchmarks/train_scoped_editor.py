"""
Trains the editor and the scope of SmolLM2-135M-Instruct: edits that act only where a text asks for them.

    python benchmarks/train_scoped_editor.py --data DIR --output build/editor --checkpoints build/kept

`DIR` (or the environment variable HF_MEND_DATA) holds facts_train.json and nq_open_train.jsonl; the facts of
examples/data are added to its own, and by rule facts of further kinds, about the same subjects and of questions. Held
out is what `benchmarks/held_out.py` names. `benchmarks/in_the_wild.py` measures.

An edit acts at the tokens that predict its target's: what stands before them runs once and without a gradient. Started
again with the same arguments, an interrupted training goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import DATA, DEVICE, load_base, parse_with_data
from held_out import EXAMPLES, HELD_OUT, context_texts, training_records
from transformers.trainer_utils import get_last_checkpoint

from hf_mend import EditableModel, EditorConfig, EditorTrainer, EditorTrainingArguments, read_questions
from hf_mend.data.forms import DEFAULT_FORMS
from hf_mend.data.kinds import FactKinds, more_facts, packaged_facts, with_more_asked
from hf_mend.data.statements import facts_of_questions
from hf_mend.training.examples import Asking, TrainingExamples
from hf_mend.training.scope_training import ScopeTrainingArguments, train_scope


SAVE_STEPS = 25
CONTEXT_RATE = 0.4  # of the texts that stand behind others
QUESTIONS = 2000  # of the unrelated questions, those that become facts where a rule fits


def examples_of(arguments: argparse.Namespace) -> TrainingExamples:
    """All facts that may be learned from, in all forms of asking."""
    facts = training_records(arguments, arguments.hold_out.split(","))
    unrelated = read_questions(arguments.data / "nq_open_train.jsonl")
    asked, questions = facts_of_questions(unrelated[:QUESTIONS])
    questions += unrelated[QUESTIONS:] + read_questions(arguments.examples / "questions.jsonl")
    kinds, _ = FactKinds.load().split()
    further = more_facts(facts, arguments.further_facts, arguments.seed, kinds)
    further += packaged_facts(arguments.further_facts // 3, arguments.seed, kinds)
    records = [*with_more_asked([*facts, *further], seed=arguments.seed, kinds=kinds), *asked]
    asking = Asking(DEFAULT_FORMS, CONTEXT_RATE, None, context_texts())
    return TrainingExamples(records, questions, arguments.forms, 0, 0, arguments.seed, asking, 0, 1)


def train_editor(model: EditableModel, examples: TrainingExamples, arguments: argparse.Namespace) -> None:
    """Trains the editor alone, from its newest checkpoint on if there is one."""
    folder = arguments.checkpoints / "editor"
    options = EditorTrainingArguments(
        output_dir=str(folder),
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        warmup_steps=20,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        per_device_train_batch_size=arguments.batch_size,
        continuation_weight=arguments.continuation_weight,
        continuation_tokens=0,
        scope_steps=0,
        bf16=arguments.bf16,
        use_cpu=DEVICE.type == "cpu",
        logging_steps=10,
        save_steps=SAVE_STEPS,
        seed=arguments.seed,
        report_to=[],
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    EditorTrainer(model, options, examples).train(resume_from_checkpoint=last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--examples", type=Path, default=EXAMPLES)
    parser.add_argument("--output", type=Path, required=True, help="folder of the editor")
    parser.add_argument("--start-from", type=Path, help="a saved editor")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="folder of what an interrupted run goes on from"
    )
    parser.add_argument("--hold-out", default=HELD_OUT, help="relations that training never sees")
    parser.add_argument("--facts", type=int, help="at most so many facts, drawn at random")
    parser.add_argument("--further-facts", type=int, default=5000, help="of further kinds, about the same subjects")
    parser.add_argument("--steps", type=int, default=560, help="of the editor's training")
    parser.add_argument("--batch-size", type=int, default=16, help="facts of a step")
    parser.add_argument(
        "--forms", type=int, default=4, help="of each fact in a step in which its target is to be said"
    )
    parser.add_argument("--continuation-weight", type=float, default=1.0, help="of what follows the target")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scope-steps", type=int, default=1000, help="0 leaves the scope as it is")
    parser.add_argument("--scope-rounds", type=int, default=2, help="of so many steps, whose weights are averaged")
    parser.add_argument("--scope-facts", type=int, default=13_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse_with_data(parser)
    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)  # keys of thousands of facts give many
    examples = examples_of(arguments)
    base, tokenizer = load_base()
    start = arguments.start_from
    config = EditorConfig() if start is None else EditorConfig.from_pretrained(start)
    if start is not None and config.scope:
        model = EditableModel.from_pretrained(base, start, tokenizer=tokenizer).eval()
    else:
        model = EditableModel(base, replace(config, scope=True), tokenizer).eval()
        if start is not None:
            model.load_editor(start / "editor.safetensors")
    train_editor(model, examples, arguments)
    if arguments.scope_steps:
        options = ScopeTrainingArguments(
            arguments.scope_steps, max_facts=arguments.scope_facts, further_facts=0, seed=arguments.seed, bf16=True,
            rounds=arguments.scope_rounds, checkpoint=str(arguments.checkpoints / "scope.pt"),
            hidden_states_dir=str(arguments.checkpoints / "hidden_states"),
        )  # fmt: skip
        print(train_scope(model, examples, options))
    model.save_pretrained(arguments.output, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
