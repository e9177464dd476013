"""
Train an editor and its scope for your own model on the facts in examples/data, measure them, and save them.

    python examples/train_editor.py --output my-editor                      # SmolLM2-135M-Instruct, offline
    python examples/train_editor.py --base-model gpt2 --output my-editor    # any causal or seq2seq model of the Hub
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_mend import (
    EditorConfig,
    EditorTrainer,
    EditorTrainingArguments,
    get_editable_model,
    read_counterfact,
    read_questions,
)
from hf_mend.auto import load_base


DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", help="a model of the Hub or a folder; SmolLM2-135M-Instruct when left out")
    parser.add_argument("--output", default="my-editor")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scope-steps", type=int, default=800, help="with 0, edits act everywhere")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-facts", type=int, default=50)
    arguments = parser.parse_args()

    base, tokenizer = load_base(arguments.base_model)
    questions = read_questions(DATA / "questions.jsonl")
    train_facts = read_counterfact(DATA / "facts_train.json")
    test_facts = list(read_counterfact(DATA / "facts_test.json", questions))[: arguments.eval_facts]

    model = get_editable_model(base, EditorConfig(scope=arguments.scope_steps > 0), tokenizer=tokenizer)
    trainer = EditorTrainer(
        model,
        EditorTrainingArguments(
            output_dir=f"{arguments.output}-checkpoints",
            max_steps=arguments.steps,
            scope_steps=arguments.scope_steps,
            per_device_train_batch_size=arguments.batch_size,
            lr_scheduler_type="linear",
            logging_steps=20,
            save_steps=100,
            report_to=[],
        ),
        train_dataset=train_facts,
        eval_dataset=test_facts,
        questions=questions,
    )
    trainer.train()
    print(trainer.evaluate())
    model.save_pretrained(arguments.output)

    print(model.edit("The capital of France is", "Lyon", paraphrases=["France's capital is"]))


if __name__ == "__main__":
    main()
