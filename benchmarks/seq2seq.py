"""
Train a small T5 as a closed-book question answerer, then a MEND editor for it, measure both and write the table.

    python benchmarks/seq2seq.py --data DIR --folder BUILD --output model_cards/t5-closed-book-mend

`DIR` (or HF_MEND_DATA) holds facts_train.json and facts_test.json. The T5 (about 20 million parameters, SmolLM2's
tokenizer with a vocabulary of its own) learns the true answers of the test facts and of training facts, `--facts` in
all; it is kept in BUILD and not trained again when it is there. The editor learns from counterfactual edits of those
training facts alone, of which some are held out to choose the size of its steps, and is measured on those of the test
facts. What must stay is what the model says to its other facts: unrelated ones are any, neighbours of the same
relation, with the same answer as far as there are such.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DATA, PARAPHRASES_ALONE, config_options, parse_with_data, write_results
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
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
from hf_mend.hub.cards import CardNotes, machine, metrics_table, write_card


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
    parser.add_argument("--base-steps", type=int, default=2000)
    parser.add_argument("--base-batch-size", type=int, default=64)
    parser.add_argument("--base-learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
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


def new_tokenizer(facts: Sequence[EditRecord], size: int = 8192) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with a vocabulary of the facts' own: names are fewer tokens, and the projection is small."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    texts = [text for fact in facts for text in (fact.prompt, *fact.paraphrases, " " + fact.ground_truth)]
    tokenizer = tokenizer.train_new_from_iterator(texts, size)
    tokenizer.pad_token = "<|endoftext|>"  # the chat model pads with its end of turn, which here ends an answer
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    """A T5 of about 20 million parameters, its output projection tied to the embeddings."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=384,
        d_kv=64,
        d_ff=1536,
        num_layers=4,
        num_heads=6,
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
    tokenizer = new_tokenizer(facts)
    torch.manual_seed(arguments.seed)
    model = new_model(tokenizer)
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
            save_strategy="no",
            seed=arguments.seed,
            remove_unused_columns=False,
            report_to=[],
        ),
        partial(pad, encoder),
        examples,
        optimizers=(optimizer_of(model, arguments.base_learning_rate), None),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(arguments.folder / NAME)
    tokenizer.save_pretrained(arguments.folder / NAME)
    (arguments.folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


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


@dataclass
class Known:
    """Facts and what the model says to them."""

    facts: list[EditRecord]
    said: list[str]

    @property
    def questions(self) -> list[tuple[str, str]]:
        return [(fact.prompt, said) for fact, said in zip(self.facts, self.said, strict=True) if said]


def with_locality(facts: Sequence[EditRecord], known: Known, seed: int, rows: int = 5) -> list[EditRecord]:
    """
    The facts, each with other facts of the model's own to leave alone: neighbours are of the same relation, with the
    same true answer as far as there are such; the unrelated ones are any.
    """
    draw = random.Random(seed)
    by_relation: dict[str | None, list[EditRecord]] = {}
    for fact in known.facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    records = []
    for fact in facts:
        others = [other for other in by_relation[fact.relation] if other.subject != fact.subject]
        draw.shuffle(others)
        others.sort(key=lambda other: other.ground_truth != fact.ground_truth)
        questions = draw.sample(known.questions, rows + 1)
        records.append(
            replace(
                fact,
                neighborhood=[other.prompt for other in others[:rows]],
                unrelated=[pair for pair in questions if pair[0] != fact.prompt][:rows],
            )
        )
    return records


def with_targets(facts: Sequence[EditRecord], count: int, seed: int) -> list[EditRecord]:
    """
    Each fact with its own target, and again with others of its relation: an editor that sees a fact with one target
    alone learns the pair.
    """
    draw = random.Random(seed)
    answers: dict[str | None, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, []).extend((fact.target, fact.ground_truth or fact.target))
    records = []
    for fact in facts:
        others = sorted({*answers[fact.relation]} - {fact.target, fact.ground_truth})
        targets = [fact.target, *draw.sample(others, min(len(others), count - 1))]
        records += [replace(fact, target=target) for target in targets]
    return records


def train_editor(
    model: EditableModel, records: Sequence[EditRecord], known: Known, arguments: argparse.Namespace
) -> float:
    trainer = EditorTrainer(
        model,
        EditorTrainingArguments(
            output_dir=str(arguments.folder / "editor-checkpoints"),
            **PARAPHRASES_ALONE,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            neighborhood_weight=arguments.neighborhood_weight,
            unrelated_weight=arguments.unrelated_weight,
            lr_scheduler_type="linear",
            warmup_steps=20,
            logging_steps=25,
            save_strategy="no",
            seed=arguments.seed,
            report_to=[],
        ),
        list(records),
        questions=known.questions,
    )
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def measure(model: EditableModel, records: Sequence[EditRecord], generate: bool = False) -> dict[str, float]:
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


def main() -> None:
    arguments = parse_arguments()
    test = [fact for fact in read_counterfact(arguments.data / "facts_test.json") if fact.ground_truth]
    train = list(read_counterfact(arguments.data / "facts_train.json"))[: arguments.facts - len(test)]
    if not (arguments.folder / NAME).is_dir():
        train_base([*test, *train], arguments)
    base_seconds = json.loads((arguments.folder / "seconds.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / NAME)
    base = T5ForConditionalGeneration.from_pretrained(arguments.folder / NAME)
    base.config._name_or_path = base.name_or_path = NAME

    torch.manual_seed(arguments.seed)
    options = config_options(arguments.option)
    config = EditorConfig(target_modules=arguments.target_modules, **options)
    model = get_editable_model(base, config, tokenizer)
    facts = [*test, *train]
    known = Known(facts, answers_of(base, model.encoder, [fact.prompt for fact in facts]))
    right = sum(fact.ground_truth == said for fact, said in zip(facts, known.said, strict=True))
    print(f"the model answers {right} of {len(facts)} facts ({right / len(facts):.3f})")
    learned, held_out = train[: -arguments.held_out], train[-arguments.held_out :]
    records = with_locality(with_targets(learned, arguments.variants, arguments.seed), known, arguments.seed)
    seconds = train_editor(model, records, known, arguments)
    factor = choose_step(model, with_locality(held_out, known, arguments.seed + 2), arguments.generality)
    model.save_pretrained(arguments.output, dtype=torch.bfloat16)  # measured as it is shared
    model.load_editor(arguments.output / "editor.safetensors")

    started = time.perf_counter()
    values = {"all": measure(model, with_locality(test[: arguments.limit], known, arguments.seed + 1), generate=True)}
    markdown = metrics_table(values)
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
    }
    write_results(arguments.results, result, markdown)
    print(markdown)
    if not arguments.limit:
        notes = CardNotes(measured=values, command=COMMAND)
        write_card(arguments.output, model.editor_config, [target.name for target in model.targets], notes)


if __name__ == "__main__":
    main()
