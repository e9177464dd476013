"""
Train a small T5 as a closed-book question answerer, then a MEND editor for it, measure both and write the table.

    python benchmarks/seq2seq.py --data DIR --folder BUILD --output model_cards/t5-closed-book-mend

`DIR` (or HF_MEND_DATA) holds facts_train.json and facts_test.json. The T5 (about 20 million parameters, SmolLM2's
tokenizer with a vocabulary of its own) learns the true answers of the test facts and of training facts, `--facts` in
all; it is kept in BUILD and not trained again when it is there. The editor learns from counterfactual edits of those
training facts alone, of which some are held out to choose the size of its steps, and is measured on those of the test
facts. What must stay is what the model says to its other facts: unrelated ones are any, neighbours of the same
relation, with the same answer as far as there are such.

With `--scope-steps` the edits have a scope: they act where a text asks for them, which is learned after the editor, on
the same facts in several forms. With `--kept` edits are also measured that the model carries together, in free
answers. The trainings of model and editor go on from their last checkpoints when they are started again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DATA, PARAPHRASES_ALONE, config_options, parse_with_data, write_results
from seq2seq_kept import (
    FORMS,
    Known,
    asked,
    kept_table,
    kept_together,
    trained_forms,
    with_locality,
    with_targets,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_mend import (
    EditableModel,
    EditorConfig,
    EditorTrainer,
    EditorTrainingArguments,
    EditRecord,
    evaluate_records,
    get_editable_model,
    read_counterfact,
    summarize,
)
from hf_mend.bases.split import logits_at
from hf_mend.data.encoding import IGNORE, Encoder, Query, batches
from hf_mend.demo.smollm2 import smollm2_path
from hf_mend.evaluation.metrics import measure_with_scope
from hf_mend.hub.cards import CardNotes, machine, metrics_table, write_card
from hf_mend.training.examples import Asking, TrainingExamples
from hf_mend.training.scope_training import ScopeTrainingArguments, train_scope


NAME = "t5-closed-book"
COMMAND = """# trains the base model (16 minutes on 2 CPU cores) and an editor (12), measures both; DIR holds the facts
python benchmarks/seq2seq.py --data DIR --folder build/t5 --output model_cards/t5-closed-book-mend"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--folder", type=Path, required=True, help="where the question answerer is kept")
    parser.add_argument("--output", type=Path, required=True, help="folder of the editor")
    parser.add_argument(
        "--results", type=Path, help="table, without suffix; benchmarks/results/ and the editor's name"
    )
    parser.add_argument("--facts", type=int, default=5000, help="facts that the model learns, test facts included")
    parser.add_argument("--test-facts", type=int, help="at most so many of the test facts; the others are left out")
    parser.add_argument(
        "--width", type=int, default=384, help="the model's; its feed-forward layers have four times it"
    )
    parser.add_argument("--blocks", type=int, default=4, help="of the encoder and of the decoder")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--base-steps", type=int, default=2000)
    parser.add_argument("--base-batch-size", type=int, default=64)
    parser.add_argument("--base-learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scope-steps", type=int, default=0, help="of a scope; without one, edits act everywhere")
    parser.add_argument("--kept", type=int, nargs="*", default=[], help="numbers of edits to measure together")
    parser.add_argument("--alone", type=int, default=100, help="facts that are measured where one edit is kept")
    parser.add_argument("--save-steps", type=int, default=200)
    parser.add_argument("--neighborhood-weight", type=float, default=0.7)
    parser.add_argument("--unrelated-weight", type=float, default=5.0)
    parser.add_argument("--variants", type=int, default=4, help="targets that each fact is trained to be edited to")
    parser.add_argument("--held-out", type=int, default=200, help="training facts that choose the size of the steps")
    parser.add_argument(
        "--generality", type=float, default=0.96, help="the steps are the smallest that reach this on those facts"
    )
    parser.add_argument(
        "--target-modules",
        default=r"decoder\.block\.\d+\..*\.wo",
        help="as EditorConfig takes it; in this model the decoder's position of the answer tells facts apart best",
    )
    parser.add_argument("--option", action="append", default=[], help="EditorConfig's name=value (JSON), repeatable")
    parser.add_argument("--limit", type=int, help="measure on this many test facts only")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse_with_data(parser)
    arguments.results = arguments.results or Path(__file__).parent / "results" / arguments.output.name
    return arguments


# ---- the model that knows the facts ----


class AnswerTrainer(Trainer):
    """Trains a model on token ids of prompts and answers; logits are made where there is a label."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        with logits_at(model, labels != IGNORE):
            logits = model(**inputs, use_cache=False).logits[0]
        return nn.functional.cross_entropy(logits, labels[labels != IGNORE])


def pad(encoder: Encoder, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    rows = encoder.pad(pairs)
    return {**rows.inputs, "labels": rows.next_tokens}


def new_tokenizer(facts: Sequence[EditRecord], size: int) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with a vocabulary of the facts' own: names are fewer tokens, and the projection is small."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    texts = [text for fact in facts for text in (fact.prompt, *fact.paraphrases, " " + fact.ground_truth)]
    tokenizer = tokenizer.train_new_from_iterator(texts, size)
    tokenizer.pad_token = "<|endoftext|>"  # the chat model pads with its end of turn, which here ends an answer
    tokenizer.chat_template = None
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerBase, width: int, blocks: int) -> T5ForConditionalGeneration:
    """A T5, its output projection tied to the embeddings."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=64,
        d_ff=4 * width,
        num_layers=blocks,
        num_heads=width // 64,
        dropout_rate=0.0,
        tie_word_embeddings=False,  # that is: does not scale what enters the tied projection
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    # T5 draws them at 1, from where a rare word's would hardly move in a short training.
    nn.init.normal_(model.shared.weight, std=0.1)
    return model


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adam, slower for queries: T5 draws them small, as its attention does not scale, and Adam's steps do not know."""
    queries = [p for name, p in model.named_parameters() if name.endswith(".q.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith(".q.weight")]
    groups = [{"params": others}, {"params": queries, "lr": learning_rate / 4}]
    return torch.optim.AdamW(groups, learning_rate, weight_decay=0.0, fused=True)


def train_base(facts: Sequence[EditRecord], arguments: argparse.Namespace) -> float:
    """Trains the question answerer into `--folder`; returns the seconds it took."""
    tokenizer = new_tokenizer(facts, arguments.vocabulary)
    torch.manual_seed(arguments.seed)
    model = new_model(tokenizer, arguments.width, arguments.blocks)
    encoder = Encoder(tokenizer, True, model.config.decoder_start_token_id)
    queries = [Query(text, fact.ground_truth) for fact in facts for text in (fact.prompt, *fact.paraphrases)]
    examples = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in map(encoder.tokens, queries)]
    trainer = AnswerTrainer(
        model,
        TrainingArguments(
            str(arguments.folder / "checkpoints"),
            max_steps=arguments.base_steps,
            per_device_train_batch_size=arguments.base_batch_size,
            lr_scheduler_type="linear",
            warmup_steps=50,
            logging_steps=50,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_steps=arguments.save_steps,
            save_total_limit=1,
            seed=arguments.seed,
            remove_unused_columns=False,
            report_to=[],
        ),
        partial(pad, encoder),
        examples,
        optimizers=(optimizer_of(model, arguments.base_learning_rate), None),
    )
    seconds = timed_training(trainer, arguments.folder / "checkpoints")
    model.save_pretrained(arguments.folder / NAME)
    tokenizer.save_pretrained(arguments.folder / NAME)
    (arguments.folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def timed_training(trainer: Trainer, folder: Path) -> float:
    """Trains, from the folder's last checkpoint on if there is one; returns the seconds, earlier runs included."""
    known = sorted(folder.glob("checkpoint-*"), key=lambda one: int(one.name.split("-")[1]))
    clock = folder / "seconds.json"
    earlier = json.loads(clock.read_text(encoding="utf-8")) if known and clock.is_file() else 0.0
    started = time.perf_counter()

    class Clock(TrainerCallback):
        def on_save(self, *arguments: Any, **more: Any) -> None:
            clock.write_text(json.dumps(earlier + time.perf_counter() - started), encoding="utf-8")

    trainer.add_callback(Clock())
    trainer.train(resume_from_checkpoint=str(known[-1]) if known else None)
    return earlier + time.perf_counter() - started


@torch.no_grad()
def answers_of(model: Any, encoder: Encoder, prompts: Sequence[str], most_tokens: int = 12) -> list[str]:
    """What the model answers, decoded greedily to its own end."""
    said = []
    for chunk in batches(list(prompts), 256):
        rows = encoder([Query(prompt) for prompt in chunk])
        out = model.generate(
            input_ids=rows.inputs["input_ids"],
            attention_mask=rows.inputs["attention_mask"],
            max_new_tokens=most_tokens,
            do_sample=False,
        )
        said += [encoder.decode(tokens) for tokens in out.tolist()]
    return said


# ---- the editor ----


def train_editor(
    model: EditableModel, records: Sequence[EditRecord], known: Known, arguments: argparse.Namespace
) -> float:
    """Trains the editor, with a scope to say the target in all forms of asking; returns the seconds it took."""
    scoped = model.scope is not None
    folder = arguments.folder / ("scoped-editor-checkpoints" if scoped else "editor-checkpoints")
    asking: dict[str, Any] = {"forms": FORMS, "context_rate": 0.4, "general_rows": 3} if scoped else PARAPHRASES_ALONE
    trainer = EditorTrainer(
        model,
        EditorTrainingArguments(
            output_dir=str(folder),
            **asking,
            max_steps=arguments.steps,
            scope_steps=0,  # that of its own follows
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            neighborhood_weight=arguments.neighborhood_weight,
            unrelated_weight=arguments.unrelated_weight,
            lr_scheduler_type="linear",
            warmup_steps=20,
            logging_steps=25,
            save_steps=arguments.save_steps,
            save_total_limit=1,
            seed=arguments.seed,
            report_to=[],
        ),
        trained_forms(records) if scoped else list(records),
        questions=known.questions,
    )
    return timed_training(trainer, folder)


def train_own_scope(
    model: EditableModel, facts: Sequence[EditRecord], known: Known, arguments: argparse.Namespace
) -> float:
    """Trains the model's scope on facts in all forms of asking; returns the seconds it took."""
    started = time.perf_counter()
    records = trained_forms(with_locality(facts, known, arguments.seed))
    examples = TrainingExamples(records, known.questions, seed=arguments.seed, asking=Asking(FORMS, 0.4))
    print(train_scope(model, examples, ScopeTrainingArguments(arguments.scope_steps, seed=arguments.seed)))
    return time.perf_counter() - started


def measure(model: EditableModel, records: Sequence[EditRecord], generate: bool = False) -> dict[str, float]:
    if model.scope is not None:
        return summarize(measure_with_scope(model.eval(), records))
    measured = evaluate_records(
        model.eval().split, model.targets, model.editor, model.encoder, records, max_steps=3, generate=generate
    )
    return summarize(measured)


def choose_step(model: EditableModel, records: Sequence[EditRecord], generality: float) -> float:
    """Makes the editor's steps the smallest that reach a generality on these facts; returns by what they grew."""
    factor = 1.0
    while (reached := measure(model, records)["generality"]) < generality and factor < 2:
        print(f"steps times {factor:.2f}: generality {reached:.3f}")
        model.editor.scale_steps((factor + 0.1) / factor)
        factor += 0.1
    return factor


def measure_kept(
    model: EditableModel, test: Sequence[EditRecord], known: Known, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Of each number of edits that are kept together, the shares of answers that change and stay as they should."""
    edited, found = {fact.prompt for fact in test}, {}
    left = [(fact, said) for fact, said in zip(known.facts, known.said, strict=True) if fact.prompt not in edited]
    others = Known([fact for fact, _ in left], [said for _, said in left])
    records = with_locality(test, others, arguments.seed + 1)
    texts = asked(records, others.questions, arguments.seed + 1)
    for count in arguments.kept:
        most = arguments.alone if count == 1 else len(records) - len(records) % min(count, len(records))
        answers = partial(answers_of, model, model.encoder)
        found[f"{count:,}"] = kept_together(model, records[:most], texts[:most], count, answers)
        print(kept_table(found), flush=True)
    return found


def main() -> None:
    arguments = parse_arguments()
    test = [fact for fact in read_counterfact(arguments.data / "facts_test.json") if fact.ground_truth]
    test = test[: arguments.test_facts]
    train = list(read_counterfact(arguments.data / "facts_train.json"))[: arguments.facts - len(test)]
    if not (arguments.folder / NAME).is_dir():
        train_base([*test, *train], arguments)
    base_seconds = json.loads((arguments.folder / "seconds.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / NAME)
    base = T5ForConditionalGeneration.from_pretrained(arguments.folder / NAME)
    base.config._name_or_path = base.name_or_path = NAME

    torch.manual_seed(arguments.seed)
    options = config_options(arguments.option)
    config = EditorConfig(target_modules=arguments.target_modules, scope=arguments.scope_steps > 0, **options)
    model = get_editable_model(base, config, tokenizer)
    facts = [*test, *train]
    known = Known(facts, answers_of(base, model.encoder, [fact.prompt for fact in facts]))
    right = sum(fact.ground_truth == said for fact, said in zip(facts, known.said, strict=True))
    print(f"the model answers {right} of {len(facts)} facts ({right / len(facts):.3f})")
    learned, held_out = train[: -arguments.held_out], train[-arguments.held_out :]
    records = with_locality(with_targets(learned, arguments.variants, arguments.seed), known, arguments.seed)
    seconds, factor = train_editor(model, records, known, arguments), 1.0
    if model.scope is not None:
        seconds += train_own_scope(model, learned, known, arguments)
    else:
        factor = choose_step(model, with_locality(held_out, known, arguments.seed + 2), arguments.generality)
    model.save_pretrained(arguments.output, dtype=torch.bfloat16)  # measured as it is shared
    model.load_editor(arguments.output / "editor.safetensors")

    started = time.perf_counter()
    values = {"all": measure(model, with_locality(test[: arguments.limit], known, arguments.seed + 1), generate=True)}
    kept = measure_kept(model, test[: arguments.limit], known, arguments) if arguments.kept else {}
    markdown = metrics_table(values) + (f"\n\n{kept_table(kept)}" if kept else "")
    result = {
        "base_model": NAME,
        "base": {
            "parameters": base.num_parameters(),
            "facts": len(facts),
            "answered": right / len(facts),
            "training_seconds": base_seconds,
        },
        "settings": {
            name: str(value)
            for name, value in vars(arguments).items()
            if name not in ("data", "folder", "output", "results")
        },
        "targets": [target.name for target in model.targets],
        "training_seconds": seconds,
        "steps_times": round(factor, 2),
        "evaluation_seconds": time.perf_counter() - started,
        "machine": machine(model.device),
        "metrics": values,
        "kept": kept,
    }
    write_results(arguments.results, result, markdown)
    print(markdown)
    if not arguments.limit:
        notes = CardNotes(measured=values, command=COMMAND)
        write_card(arguments.output, model.editor_config, [target.name for target in model.targets], notes)


if __name__ == "__main__":
    main()
