"""
Train a small mixture of experts that knows facts, and compare what edits without an editor change in it.

    python benchmarks/experts.py --data examples/data --folder build/mixture
    python benchmarks/experts.py --data examples/data --folder build/mixture --blocks 3,4 --max-steps 20
    python benchmarks/experts.py --data examples/data --folder build/mixture --blocks 3,4 --editor-steps 150

`DIR` (or HF_MEND_DATA) holds facts_train.json. The Mixtral (six blocks, eight experts of which a token sees two,
experts held as 3-D parameters as transformers does) learns the true facts as plain sentences, in every form that they
have; it is kept in the folder and not trained again when it is there. Then facts are edited one at a time, in the same
blocks, with the same method: in attention's output projection, in the down projections of the experts that each token
was routed to, and beside the experts, from their input to their output. Figures that the results have already stay;
`--editor-steps` measures a MEND editor trained on the other facts that the mixture knows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import DATA, PARAPHRASES_ALONE, parse_with_data, write_results
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
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
from hf_mend.data.encoding import Encoder, Query
from hf_mend.editing.calibration_text import observe_calibration_text
from hf_mend.evaluation.reports import TITLES
from hf_mend.hub.cards import machine, table
from hf_mend.methods.training_free import training_free_config


SHOWN = ("edit_success", "generality", "neighborhood", "unrelated", "score")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--folder", type=Path, required=True, help="where the mixture is kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "experts")
    parser.add_argument("--facts", type=int, default=600, help="facts that the mixture learns")
    parser.add_argument("--minutes", type=float, default=6, help="of training the mixture, at most")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--limit", type=int, default=150, help="edit this many facts")
    parser.add_argument("--max-steps", type=int, help="of an edit; the method's own by default")
    parser.add_argument("--blocks", default="3,4;1,2,3,4", help="edited blocks, the choices separated by semicolons")
    parser.add_argument(
        "--editor-steps", type=int, default=0, help="of training a MEND editor, which is then measured"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parse_with_data(parser)


# ---- a mixture that knows the facts ----


def sentences(records: Sequence[EditRecord]) -> list[tuple[str, str]]:
    """Every prompt of the facts and of their neighbours, with its true answer."""
    found = {}
    for record in records:
        for prompt in (record.prompt, *record.paraphrases, *record.neighborhood):
            found.setdefault(prompt, record.ground_truth or "")
    return list(found.items())


def new_tokenizer(texts: Sequence[str], size: int = 2048) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def new_mixture(tokenizer: PreTrainedTokenizerBase) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=256,
            router_aux_loss_coef=0.01,
            output_router_logits=True,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(known: list[tuple[str, str]], arguments: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The mixture, trained until its time is up or it knows all sentences, with transformers' load-balancing loss."""
    tokenizer = new_tokenizer([f"{prompt} {answer}" for prompt, answer in known])
    torch.manual_seed(arguments.seed)
    model = new_mixture(tokenizer).train()
    encoder = Encoder(tokenizer, False, None)
    pairs = [encoder.tokens(Query(prompt, answer)) for prompt, answer in known]
    optimizer = torch.optim.AdamW(model.parameters(), arguments.learning_rate, weight_decay=0.01)
    draw, started, spent, average = random.Random(arguments.seed), time.monotonic(), 0.0, math.inf
    step = 0
    while spent < 1 and average > 0.02:
        order = sorted(range(len(pairs)), key=lambda i: (sum(map(len, pairs[i])), draw.random()))
        chunks = [order[i : i + arguments.batch_size] for i in range(0, len(order), arguments.batch_size)]
        draw.shuffle(chunks)
        losses = []
        for chunk in chunks:
            spent = (time.monotonic() - started) / (60 * arguments.minutes)
            rows = encoder.pad([pairs[i] for i in chunk])
            rate = arguments.learning_rate * min(1, (step + 1) / 50, max(0.02, 1.2 * (1 - spent)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            found = model(**rows.inputs, labels=_all_tokens(rows.inputs))
            answers = found.logits[rows.positions]
            answer_loss = nn.functional.cross_entropy(answers, rows.next_tokens[rows.positions])
            (found.loss + answer_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(answer_loss.item())
            step += 1
            if spent >= 1:
                break
        average = sum(losses) / len(losses)
        print(f"step {step}, {spent:.0%} of the time, loss of the answers {average:.3f}", flush=True)
    model.config.output_router_logits = False
    return model.eval(), tokenizer


def _all_tokens(inputs: Any) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def load_mixture(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    base = MixtralForCausalLM.from_pretrained(folder).eval()
    return base, PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
def knows(base: PreTrainedModel, encoder: Encoder, records: Sequence[EditRecord]) -> list[EditRecord]:
    """Those of the facts of which every form is answered right."""
    right = []
    for record in records:
        prompts = [record.prompt, *record.paraphrases, *record.neighborhood]
        rows = encoder.pad([encoder.tokens(Query(prompt, record.ground_truth or "")) for prompt in prompts])
        with logits_at(base, rows.positions):
            logits = base(**rows.inputs).logits[0]
        if bool((logits.argmax(-1) == rows.next_tokens[rows.positions]).all()):
            right.append(record)
    return right


READING = """\
The places differ in what an edit is rather than in its mean: in attention, most edits that take hold for the prompt
alone, and the neighbours stay for want of an effect; at or beside the experts, an edit holds in other forms of the
prompt too, and reaches the neighbours, as edits of so small a model's MLPs do. Beside the experts is about as good as
in their down projections, whose input is as wide as all experts together (some 100,000 in models that are in use), so
it is the default; a scope keeps such an edit from where it is not asked for. All figures are of one short training of
one small model.

"""


# ---- what is edited ----


class BesideExperts(nn.Module):
    """A block's experts with a linear layer of zeros beside them, from their input to their output."""

    def __init__(self, experts: Any):
        super().__init__()
        self.experts = experts
        self.beside = nn.Linear(experts.hidden_dim, experts.hidden_dim, bias=False)
        nn.init.zeros_(self.beside.weight)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden, index, weights) + self.beside(hidden)


class ExpertsSideBySide(nn.Module):
    """
    A block's experts whose down projections are one linear layer: its input is all experts' activations side by side,
    weighted by the router, zero for experts that a token was not routed to. Its weight is the 3-D parameter, reshaped.
    """

    def __init__(self, experts: Any):
        super().__init__()
        self.gate_up, self.act_fn = experts.gate_up_proj, experts.act_fn
        count, d_out, width = experts.down_proj.shape
        self.down = nn.Linear(count * width, d_out, bias=False)
        self.down.weight.data.copy_(experts.down_proj.permute(1, 0, 2).reshape(d_out, -1))

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("eoi,ti->teo", self.gate_up, hidden).chunk(2, -1)
        routed = torch.zeros(gate.shape[:2]).scatter(1, index, weights.float())  # (tokens, experts)
        return self.down((self.act_fn(gate) * up * routed[..., None]).flatten(1))


PLACES: dict[str, tuple[type[nn.Module] | None, str]] = {
    "attention's output projection": (None, "o_proj"),
    "the experts' down projections": (ExpertsSideBySide, "down"),
    "beside the experts": (BesideExperts, "beside"),
}


def edited_in(place: str, folder: Path, blocks: Sequence[int], config: EditorConfig) -> EditableModel:
    """The mixture, to be edited in one of `PLACES`."""
    base, tokenizer = load_mixture(folder)
    wrapper, name = PLACES[place]
    if wrapper is not None:
        for block in base.model.layers:
            block.mlp.experts = wrapper(block.mlp.experts)
    config.target_modules, config.layers_to_transform = [name], list(blocks)
    return get_editable_model(base, config, tokenizer)


def measure(
    place: str, blocks: Sequence[int], records: Sequence[EditRecord], arguments: argparse.Namespace
) -> dict[str, float]:
    model = edited_in(place, arguments.folder, blocks, training_free_config()).eval()
    observe_calibration_text(model.context, model.encoder, [])
    started = time.monotonic()
    found = summarize(
        evaluate_records(
            model.split,
            model.targets,
            model.editor,
            model.encoder,
            records,
            max_steps=arguments.max_steps,
            progress=False,
        )
    )
    return {**found, "seconds": time.monotonic() - started}


def measure_trained(
    place: str, blocks: Sequence[int], split: tuple[list[EditRecord], list[EditRecord]], arguments: argparse.Namespace
) -> dict[str, float]:
    """The figures of a MEND editor that is trained for this place on the first of two lists, edits of the second."""
    train, test = split
    torch.manual_seed(arguments.seed)
    model = edited_in(place, arguments.folder, blocks, EditorConfig())
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = EditorTrainingArguments(
            folder,
            **PARAPHRASES_ALONE,
            max_steps=arguments.editor_steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            warmup_steps=10,
            logging_steps=25,
            save_strategy="no",
            seed=arguments.seed,
            use_cpu=True,
            report_to=[],
        )
        questions = [(record.prompt, record.ground_truth or "") for record in train]
        EditorTrainer(model, settings, train, questions=questions).train()
    model.eval()
    found = summarize(
        evaluate_records(model.split, model.targets, model.editor, model.encoder, test, max_steps=1, progress=False)
    )
    return {**found, "seconds": time.monotonic() - started}


def main() -> None:
    arguments = parse_arguments()
    draw = random.Random(arguments.seed)
    facts = list(read_counterfact(arguments.data / "facts_train.json"))
    records = draw.sample(facts, arguments.facts)
    known = sentences(records)
    if not (arguments.folder / "config.json").exists():
        print(f"{len(known)} sentences of {len(records)} facts")
        base, tokenizer = train(known, arguments)
        base.save_pretrained(arguments.folder)
        tokenizer.save_pretrained(arguments.folder)
    base, tokenizer = load_mixture(arguments.folder)
    right = knows(base, Encoder(tokenizer, False, None), records)
    print(f"{len(right)} of {len(records)} facts are known in every form")
    for record in right:
        others = [other for other in right if other.relation != record.relation]
        record.unrelated = [(other.prompt, other.ground_truth or "") for other in draw.sample(others, 3)]
    edited, others = right[: arguments.limit], right[arguments.limit :]
    kept = arguments.results.with_suffix(".json")
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"places": {}}
    result |= {"facts": len(records), "known": len(right), "edits": len(edited), "machine": machine()}
    for blocks in (list(map(int, choice.split(","))) for choice in arguments.blocks.split(";")):
        for place in PLACES:
            key = " | ".join((place, ", ".join(map(str, blocks)), method_name(arguments)))
            if key in result["places"]:
                continue
            if arguments.editor_steps:
                found = measure_trained(place, blocks, (others, edited), arguments)
            else:
                found = measure(place, blocks, edited, arguments)
            result["places"][key] = found
            print(key, {name: round(found[name], 3) for name in SHOWN}, round(found["seconds"]), flush=True)
            write_results(arguments.results, result, markdown(result))


def method_name(arguments: argparse.Namespace) -> str:
    if arguments.editor_steps:
        return f"MEND, trained for {arguments.editor_steps} steps"
    return f"no editor, {arguments.max_steps or 6} steps at most"


def markdown(result: dict[str, Any]) -> str:
    rows = [[*key.split(" | "), *(f"{found[name]:.3f}" for name in SHOWN)] for key, found in result["places"].items()]
    head = ["edited", "blocks", "method", *(TITLES[name] for name in SHOWN)]
    return (
        "# Where to edit a mixture of experts\n\n"
        f"A Mixtral of six blocks and eight experts, trained on {result['facts']} facts, of which it knows "
        f"{result['known']} in every form; {result['edits']} are edited, one at a time. `benchmarks/experts.py` "
        "writes this.\n\n" + READING + table(head, rows)
    )


if __name__ == "__main__":
    main()
