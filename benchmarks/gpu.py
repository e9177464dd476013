"""
Measure what edits cost on a GPU, within minutes: for a machine that may be gone in a quarter of an hour.

    python benchmarks/gpu.py --minutes 6 --output gpu.json

Writes JSON after each figure, those that say most first: for every shape a forward pass, an edit without and with its
check and many in a call, then training steps and generation. What does not fit into the memory or the minutes is left
out, and the JSON says why. Models have random weights and texts random words, so nothing is read or downloaded; what
is measured is time, memory and how often the host waits, for which the values do not matter. `--shape tiny` runs
anywhere; `benchmarks/speed.py` is the CPU's.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import DEVICE
from speed import our_training_step, papers_training_step
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedTokenizerFast

from hf_mend import EditableModel, EditorConfig, EditRecord
from hf_mend.bases.targets import block_lists, lowest_block
from hf_mend.data.encoding import Query
from hf_mend.hub.cards import machine
from hf_mend.scope.network import KEY_PARTS, KEY_WIDTH, MEANING_WIDTH
from hf_mend.training.examples import EditCollator, TrainingExamples


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "70b": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
# In the order of what is most wanted.
RUNS = [("8b", "bfloat16"), ("135m", "float32"), ("135m", "bfloat16"), ("1b", "bfloat16"), ("70b", "4bit")]
BATCHES = (16, 64, 256, 1024)
KEPT = (0, 1, 1_000, 10_000)
WORDS = [f"word{i}" for i in range(4000)]

Figure = tuple[str, Callable[[], dict[str, float]]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no figure after these")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated; all but tiny")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--most", type=int, default=max(KEPT), help="most edits in a call, and kept")
    parser.add_argument(
        "--compile", nargs="*", default=["default", "reduce-overhead"] if DEVICE.type == "cuda" else [],
        help="modes or backends of torch.compile with which edits are measured too",
    )  # fmt: skip
    return parser.parse_args()


# ---- models and texts ----


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def bytes_needed(shape: str, dtype: str) -> float:
    """Bytes of a shape's weights."""
    one = SHAPES[shape]
    width, heads = one["hidden_size"], one["num_key_value_heads"] / one["num_attention_heads"]
    block = width * (2 * width * (1 + heads) + 3 * one["intermediate_size"])
    vocabulary = one["vocab_size"] * width * (1 if one.get("tie_word_embeddings") else 2)
    in_blocks = {"float32": 4, "bfloat16": 2, "4bit": 0.56}[dtype]
    return one["num_hidden_layers"] * block * in_blocks + vocabulary * max(in_blocks, 2)


def random_base(shape: str, dtype: str) -> Any:
    """A Llama of a shape with random weights, made where it runs, a block after the other."""
    config = AutoConfig.for_model(
        "llama", max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPES[shape]
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if dtype == "float32" else torch.bfloat16)
    torch.manual_seed(0)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if dtype == "4bit" and isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, _in_four_bits(child))
        for parameter_name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                values = values.normal_(0, 0.02) if parameter.dim() > 1 else values.fill_(1.0)
                setattr(module, parameter_name, nn.Parameter(values, requires_grad=False))
    rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not drawn
    model.model.rotary_emb = rotary.to(DEVICE)
    model.tie_weights()
    return model.eval()


def _in_four_bits(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(DEVICE)


def random_records(count: int) -> list[EditRecord]:
    """Facts of random words, whose prompts have 10 to 14 tokens and whose targets have two."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    return [
        EditRecord(text(draw.randint(10, 14)), text(2), [text(12)], [text(12)], [(text(10), text(2))])
        for _ in range(count)
    ]


# ---- measuring ----


def seconds_of(function: Callable[[], Any], repeat: int) -> float:
    """Median of some calls, after one that warms up."""
    times = []
    for turn in range(repeat + 1):
        _wait()
        started = time.perf_counter()
        function()
        _wait()
        if turn:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def waits_of(function: Callable[[], Any]) -> float:
    """How often the host waits for the GPU in a call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return float(sum("synchroniz" in str(one.message) for one in found))


@contextmanager
def peak_into(figures: dict[str, float], name: str) -> Iterator[None]:
    """Note the most memory that a GPU had in use within the context, in GB."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    if DEVICE.type == "cuda":
        figures[f"{name}, peak GB"] = torch.cuda.max_memory_allocated() / 1e9


# ---- the figures ----


def edit_figures(model: EditableModel, arguments: argparse.Namespace) -> Iterator[Figure]:
    """A forward pass, an edit, and many in a call."""
    records = random_records(max(BATCHES))
    first = records[0]
    rows = model.encoder([Query(first.prompt, first.target)]).to(model.device)
    kind, lowest = lowest_block(model.targets)
    depth = len(next(one for one in block_lists(model.base_model) if one.kind == kind).blocks)
    known = {"f": (depth - lowest) / depth}

    def forward_pass() -> dict[str, float]:
        with torch.no_grad():
            known["forward"] = seconds_of(lambda: model.base_model(**rows.inputs, use_cache=False), arguments.repeat)
        return {"f": known["f"], "forward pass, s": known["forward"]}

    def an_edit(check: bool) -> dict[str, float]:
        def edit() -> None:
            model.edit(first.prompt, first.target, max_steps=1, force=True, check=check)
            model.undo_all()

        what = "edit with the check" if check else "edit"
        figures: dict[str, float] = {}
        with peak_into(figures, what):
            seconds = seconds_of(edit, arguments.repeat)
        figures |= {f"{what}, s": seconds, f"{what} / forward pass": seconds / known["forward"]}
        if DEVICE.type == "cuda":
            figures[f"{what}, waits of the host"] = waits_of(
                lambda: model.edit(first.prompt, first.target, max_steps=1, force=True, check=check)
            )
            model.undo_all()
        return figures

    def in_a_call(count: int) -> dict[str, float]:
        prompts, targets = [one.prompt for one in records[:count]], [one.target for one in records[:count]]

        def edits() -> None:
            model.edit(prompts, targets, max_steps=1, force=True, batch_size=min(count, 256))
            model.undo_all()

        figures: dict[str, float] = {}
        with peak_into(figures, f"{count} edits in a call"):
            seconds = seconds_of(edits, 1)
        return figures | {f"{count} edits in a call, s": seconds, f"{count} edits in a call, edits/s": count / seconds}

    def compiled(name: str) -> dict[str, float]:
        mode = name in ("default", "reduce-overhead", "max-autotune")
        given = {"mode": name} if mode else {"mode": None, "backend": name}
        started = time.perf_counter()
        model.set_compile_config(CompileConfig(fullgraph=False, **given))
        try:
            model.edit(first.prompt, first.target, max_steps=1, force=True)
            model.undo_all()
            figures = {f"compiled by {name}: first edit, s": time.perf_counter() - started}
            both = an_edit(True) | an_edit(False)
        finally:
            model.set_compile_config(None)
        return figures | {f"compiled by {name}: {figure}": value for figure, value in both.items()}

    yield "forward pass", forward_pass
    yield "edit with the check", lambda: an_edit(True)
    yield "edit", lambda: an_edit(False)
    for count in [count for count in BATCHES if count <= arguments.most]:
        yield f"{count} edits in a call", lambda count=count: in_a_call(count)  # type: ignore[misc]
    for name in arguments.compile:
        yield f"edits compiled by {name}", lambda name=name: compiled(name)  # type: ignore[misc]


def training_figures(model: EditableModel, arguments: argparse.Namespace) -> Iterator[Figure]:
    """A training step of 64 edits, and the paper's of one."""
    examples = TrainingExamples(random_records(64), neighborhood_rows=1)
    collate = EditCollator(model.encoder)

    def ours() -> dict[str, float]:
        batch = collate([examples[i] for i in range(64)]).to(model.device)
        figures: dict[str, float] = {}
        with peak_into(figures, "training, ours"):
            seconds = seconds_of(lambda: our_training_step(model, batch), 2)
        return figures | {"training, ours without cache, edits/s": 64 / seconds}

    def papers() -> dict[str, float]:
        batch = collate([examples[0]]).to(model.device)
        figures: dict[str, float] = {}
        with peak_into(figures, "training, the paper's procedure"):
            seconds = seconds_of(lambda: papers_training_step(model, batch), 2)
        return figures | {"training, the paper's procedure, edits/s": 1 / seconds}

    yield "training, ours", ours
    yield "training, the paper's procedure", papers


def generation_figures(model: EditableModel, arguments: argparse.Namespace) -> Iterator[Figure]:
    """Greedy generation with edits kept: where one is asked for, and outside every scope."""
    record, other = random_records(2)
    options = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False, "pad_token_id": 0}

    def writing(prompt: str) -> float:
        inputs = model.tokenizer(prompt, return_tensors="pt").to(model.device)
        return seconds_of(lambda: model.generate(**inputs, **options), 2)

    def with_kept(count: int) -> dict[str, float]:
        if not count:
            return {"generation of 50 tokens with 0 edits, s": writing(record.prompt)}
        keep_edits(model, record, count)
        found: dict[str, float] = {}
        with peak_into(found, f"generation with {count} edits"):
            found[f"generation of 50 tokens with {count} edits, in scope, s"] = writing(record.prompt)
            found[f"generation of 50 tokens with {count} edits, outside, s"] = writing(other.prompt)
        return found

    for count in KEPT:
        if count <= arguments.most:
            yield f"generation with {count} edits", lambda count=count: with_kept(count)  # type: ignore[misc]


def keep_edits(model: EditableModel, record: EditRecord, count: int) -> None:
    """Let a model carry so many edits, of which the first is the record's own; the others have random keys."""
    model.undo_all()
    model.edit(record.prompt, record.target, max_steps=1, force=True, check=False)
    (first,) = model.edits
    scope = first.scope
    assert scope is not None
    keys = torch.randn(count, KEY_PARTS, MEANING_WIDTH // KEY_PARTS, generator=torch.Generator().manual_seed(1))
    keys = torch.cat(
        [nn.functional.normalize(keys, dim=-1).flatten(1), torch.zeros(count, KEY_WIDTH - MEANING_WIDTH)], 1
    ).half()
    more = [
        replace(
            first, id=f"{i:012x}", prompt=f"{record.prompt} {i}",
            scope=replace(scope, keys=keys[i : i + 1], thresholds=scope.thresholds[:1], texts=["prompt"]),
        )
        for i in range(1, count)
    ]  # fmt: skip
    model._active.replace([first, *more])


def standardised_scope(model: EditableModel) -> None:
    """Give the model a scope whose random keys differ from text to text, strict enough that a text finds its own."""
    scope = model.scope
    assert scope is not None
    rows = model.encoder([Query(" ".join(WORDS[:400]))]).to(model.device)
    hidden = model.split.run_below(rows.inputs).hidden
    scope.standardise(hidden[0].to(scope.centre.device))
    with torch.no_grad():
        scope.threshold.fill_(0.99)
    model.set_scope(scope)


# ---- one run ----


class Report:
    """
    The figures so far, written after each.

    Args:
        path (`Path`): The JSON file.
        minutes (`float`): No figure begins after these.
    """

    def __init__(self, path: Path, minutes: float):
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"machine": machine(DEVICE), "figures": {}, "left_out": {}}

    def take(self, run: str, figure: Figure) -> None:
        name, measure = figure
        if time.monotonic() > self.end:
            self.leave_out(run, name, "the minutes were over")
            return
        try:
            figures = measure()
        except Exception as error:  # out of memory, or whatever this machine lacks: the others are still wanted
            self.leave_out(run, name, f"{type(error).__name__}: {str(error)[:200]}")
            with suppress(Exception):
                torch.cuda.empty_cache()
            return
        self.found["figures"].setdefault(run, {}).update(figures)
        self.write()

    def leave_out(self, run: str, name: str, why: str) -> None:
        self.found["left_out"].setdefault(run, {})[name] = why
        self.write()

    def write(self) -> None:
        """Write what there is, whole or not at all."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")
        new.replace(self.path)


def loaded(shape: str, dtype: str, scope: bool) -> EditableModel:
    base = random_base(shape, dtype)
    torch.manual_seed(0)
    model = EditableModel(base, EditorConfig(scope=scope), word_tokenizer())
    if scope:
        standardised_scope(model)
    return model.eval()


def runs_of(shapes: list[str] | None) -> list[tuple[str, str]]:
    return [(shape, "float32") for shape in shapes or () if shape == "tiny"] + [
        run for run in RUNS if not shapes or run[0] in shapes
    ]


def main() -> None:
    arguments = parse_arguments()
    report = Report(arguments.output, arguments.minutes)
    room = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 16e9
    # First of all models what an edit costs, then what takes longer.
    for scope, kinds in ((False, (edit_figures, training_figures)), (True, (generation_figures,))):
        for shape, dtype in runs_of(arguments.shape):
            run = f"{shape}, {dtype}"
            if time.monotonic() > report.end or 1.2 * bytes_needed(shape, dtype) > room:
                report.leave_out(run, f"with{'' if scope else 'out'} a scope", "no memory or no minutes left for it")
                continue
            try:
                model = loaded(shape, dtype, scope)
            except Exception as error:  # such as a missing bitsandbytes
                report.leave_out(run, "the model", f"{type(error).__name__}: {str(error)[:200]}")
                continue
            for figures in kinds:
                for figure in figures(model, arguments):
                    report.take(run, figure)
            del model
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    report.write()


if __name__ == "__main__":
    main()
