"""
Edit models past 10 billion parameters from disk: memory and time against one forward pass, and what larger ones need.

    python benchmarks/large.py --folder DIR --shape llama-13b --shape t5-xxl

Writes each shape with random bfloat16 weights under DIR (26 and 22 GB; kept for the next run), loads it with every
block on disk, attaches an untrained MEND editor, edits, undoes. Without `--shape` it prints the formula alone; what
the results hold of other shapes stays. Memory is what the process holds for itself (RssAnon) and, beside it, its whole
peak with mapped file pages that the system may drop at any time (VmHWM), which the formula is of.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from common import write_results
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from hf_mend import EditorConfig, get_editable_model
from hf_mend.bases.targets import block_lists, find_targets
from hf_mend.data.encoding import Query


LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": ("llama", {**LLAMA, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
                           "num_attention_heads": 16}),
    "llama-13b": ("llama", {**LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                            "num_attention_heads": 40}),
    "t5-xxl": ("t5", {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
                      "num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                      "decoder_start_token_id": 0}),
    "llama-70b": ("llama", {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
                            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}),
    "llama-405b": ("llama", {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
                             "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8}),
}  # fmt: skip
PROMPT = "the man who was prime minister of the united kingdom in the year 1990 was"
TARGET = "john major"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", default=[], choices=list(SHAPES))
    parser.add_argument("--folder", type=Path, help="where the shapes are kept, on a disk with room for them")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "large")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--rank", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.shape and arguments.folder is None:
        parser.error("give a folder for the weights with --folder")
    return arguments


# ---- a model on disk ----


def config_of(shape: str) -> PretrainedConfig:
    kind, values = SHAPES[shape]
    return AutoConfig.for_model(kind, dtype="bfloat16", bos_token_id=1, eos_token_id=2, pad_token_id=0, **values)


def empty_model(shape: str) -> Any:
    """The shape without weights."""
    config = config_of(shape)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with init_empty_weights():
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return model


def write_shape(shape: str, folder: Path, shard_bytes: int = 2**30) -> None:
    """
    Writes random weights shard by shard. The values repeat after 16 million, so that writing is not all the time.
    """
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = empty_model(shape)
    torch.manual_seed(0)
    noise = torch.randn(2**24).mul(0.02).to(torch.bfloat16)

    def values(parameter: torch.Tensor) -> torch.Tensor:
        if parameter.dim() < 2:
            return torch.ones(parameter.shape, dtype=torch.bfloat16)
        return noise.repeat(-(-parameter.numel() // noise.numel()))[: parameter.numel()].view(parameter.shape)

    where: dict[str, str] = {}
    for number, shard in enumerate(shards(model, shard_bytes)):
        name = f"model-{number:05}.safetensors"
        save_file({key: values(parameter) for key, parameter in shard.items()}, folder / name, {"format": "pt"})
        where |= dict.fromkeys(shard, name)
    model.config.save_pretrained(folder)
    index = {"metadata": {"total_size": bytes_of(model)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def shards(model: nn.Module, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if shard and sum(p.numel() * 2 for p in shard.values()) + parameter.numel() * 2 > limit:
            yield shard
            shard = {}
        shard[name] = parameter
    yield shard


def load_on_disk(shape: str, folder: Path) -> Any:
    """The model with every block on disk, and what is around the blocks in memory."""
    model = empty_model(shape)
    lists = block_lists(model)
    blocks = {f"{block_list.name}.{i}": "disk" for block_list in lists for i in range(len(block_list.blocks))}
    inside = tuple(f"{block_list.name}." for block_list in lists)
    others = {name.rpartition(".")[0]: "cpu" for name, _ in model.named_parameters() if not name.startswith(inside)}
    others |= {name.rpartition(".")[0]: "cpu" for name, _ in model.named_buffers() if not name.startswith(inside)}
    auto: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(
        folder, device_map={**others, **blocks}, dtype=torch.bfloat16, offload_folder=str(folder / "offload")
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: with random weights no other vocabulary means more."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *dict.fromkeys(f"{PROMPT} {TARGET}".split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


# ---- measuring ----


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_of(function: Callable[[], Any]) -> tuple[float, dict[str, int]]:
    """Seconds of a call, and the most memory that the process had meanwhile, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    try:
        function()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        thread.join()
    return seconds, {"RssAnon": max(most[0], status("RssAnon")), "VmHWM": status("VmHWM")}


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.folder / shape
    write_shape(shape, folder)
    base = load_on_disk(shape, folder)
    config = EditorConfig(target_modules="paper", rank=arguments.rank, normalize=False, whiten=False, edit_lr=1e-6)
    model = get_editable_model(base, config, word_tokenizer())
    rows = model.encoder([Query(PROMPT, TARGET)])

    def forward() -> None:
        with torch.no_grad():
            base(**rows.inputs, use_cache=False)

    def edit(check: bool) -> None:
        model.edit(PROMPT, TARGET, max_steps=1, force=True, check=check)
        model.undo()

    size = bytes_of(base)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in base.parameters()), "bytes": size}
    figures["editor bytes"] = sum(t.numel() * t.element_size() for t in model.editor.state_dict().values())
    with torch.no_grad():
        before = base(**rows.inputs, use_cache=False).logits
    first, _ = peak_of(lambda: edit(True))
    times: dict[str, list[float]] = {"forward": [], "edit": [], "edit with check": []}
    peaks: list[dict[str, int]] = []
    for _ in range(arguments.repeat):  # in turn, so that a slower disk meets all alike
        for name, call in (
            ("forward", forward), ("edit", lambda: edit(False)), ("edit with check", lambda: edit(True))
        ):  # fmt: skip
            seconds, peak = peak_of(call)
            times[name].append(seconds)
            peaks.append(peak)
            print(f"{shape}: {name} {seconds:.1f} s, {peak['RssAnon'] / 1e9:.2f} GB", flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    figures["forward pass, s"] = median["forward"]
    figures["first edit, with the check of the shortcut / forward pass"] = first / median["forward"]
    figures["edit / forward pass"] = median["edit"] / median["forward"]
    figures["edit with the check / forward pass"] = median["edit with check"] / median["forward"]
    figures["peak memory / model"] = max(peak["RssAnon"] for peak in peaks) / size
    figures["peak memory with mapped pages / model"] = max(peak["VmHWM"] for peak in peaks) / size
    figures["peak memory, bytes"] = max(peak["RssAnon"] for peak in peaks)
    with torch.no_grad():
        figures["undo is exact"] = bool(torch.equal(base(**rows.inputs, use_cache=False).logits, before))
    return figures


# ---- on paper ----


def formula(shape: str, rank: int, tokens: int = 15, choice: str = "paper") -> dict[str, float]:
    """
    What an editor needs, from the shapes alone.

    For each shape `(d_in, d_out)` of the `L` edited layers, with `w = d_in + d_out`, an editor of one hidden layer has
    two low-rank layers of `2 rank w + w + 2 L w` weights and statistics of `L (2 w + 2)` values. An edit's factors are
    `tokens * w` values a layer. An offloaded edit holds one block's weights, what lies around the blocks, and the
    editor; its blocks above the cut are read and run again for the backward pass, which computes as much once more.
    """
    model = empty_model(shape)
    targets = find_targets(model, EditorConfig(target_modules=choice))
    groups: dict[tuple[int, int], int] = {}
    for target in targets:
        groups[(target.d_in, target.d_out)] = groups.get((target.d_in, target.d_out), 0) + 1
    editor = sum(
        2 * (2 * rank * w + w + 2 * layers * w) + layers * (2 * w + 2) + layers
        for (d_in, d_out), layers in groups.items()
        for w in [d_in + d_out]
    )
    lists = block_lists(model)
    block = max(bytes_of(block) for block_list in lists for block in block_list.blocks)
    around = bytes_of(model) - sum(bytes_of(block) for block_list in lists for block in block_list.blocks)
    first = min((t.side != "encoder", t.block) for t in targets)
    above = sum(
        bytes_of(block)
        for block_list in lists
        for index, block in enumerate(block_list.blocks)
        if (block_list.kind != "encoder", index) >= first
    )
    f = above / bytes_of(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model bytes": bytes_of(model),
        "editor bytes": 4.0 * editor,
        "bytes of an edit": 4.0 * tokens * sum((t.d_in + t.d_out) for t in targets),
        "cache bytes a token": 2.0 * getattr(model.config, "hidden_size", 0),
        "share of the model above the cut": f,
        "edit / forward pass, in memory": 1 + f,
        "edit / forward pass, offloaded, where reading takes the time": 1 + f,
        "edit / forward pass, offloaded, where computing does": 1 + 2 * f,
        "peak bytes, offloaded": block + around + 4.0 * editor,
    }


def main() -> None:
    arguments = parse_arguments()
    path = arguments.results.with_suffix(".json")
    measured = json.loads(path.read_text(encoding="utf-8"))["measured"] if path.exists() else {}
    measured |= {shape: measure(shape, arguments) for shape in arguments.shape}
    paper = {shape: formula(shape, arguments.rank) for shape in SHAPES}
    for shape, figures in measured.items():
        figures["editor bytes by the formula"] = paper[shape]["editor bytes"]
        figures["peak memory by the formula / model"] = paper[shape]["peak bytes, offloaded"] / figures["bytes"]
        times = ("where reading takes the time", "where computing does")
        low, high = (paper[shape][f"edit / forward pass, offloaded, {time}"] for time in times)
        figures |= {"edit by the formula, from": low, "edit by the formula, to": high}
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    lines = []
    if measured:
        names = list(next(iter(measured.values())))
        lines += ["| measured | " + " | ".join(measured) + " |", "|---|" + "---|" * len(measured)]
        lines += [f"| {name} | " + " | ".join(_cell(m[name]) for m in measured.values()) + " |" for name in names]
        lines.append("")
    names = list(next(iter(paper.values())))
    lines += ["| on paper | " + " | ".join(paper) + " |", "|---|" + "---|" * len(paper)]
    lines += [f"| {name} | " + " | ".join(_cell(p[name]) for p in paper.values()) + " |" for name in names]
    print("\n".join(lines))
    if measured:
        result = {"machine": machine, "rank": arguments.rank, "measured": measured, "on paper": paper}
        write_results(path, result, "\n".join(lines))


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, bool) else f"{value:.3g}"


if __name__ == "__main__":
    main()
