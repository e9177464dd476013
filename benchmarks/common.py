"""What the benchmarks share: the folder of facts, options of a configuration, and how results are kept."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mend.demo.smollm2 import load_smollm2


# Of the option `--data`.
DATA: dict[str, Any] = {
    "type": Path,
    "default": os.environ.get("HF_MEND_DATA"),
    "help": "folder of facts and questions (HF_MEND_DATA)",
}


DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

# Arguments of a training that draws paraphrases alone, as the first part of the shipped editor's does.
PARAPHRASES_ALONE: dict[str, Any] = {
    "forms": {"paraphrase": 1.0},
    "context_rate": 0.0,
    "same_subject_rows": 0,
    "continuation_rows": 0,
}


def parse_with_data(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line of a script that has `--data`."""
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of facts with --data or HF_MEND_DATA")
    return arguments


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct on `DEVICE`, and its tokenizer."""
    base, tokenizer = load_smollm2()
    return base.to(DEVICE), tokenizer


def config_options(items: Sequence[str]) -> dict[str, Any]:
    """`EditorConfig`'s arguments from `name=value`, the values in JSON."""
    return {name: json.loads(value) for name, value in (item.split("=", 1) for item in items)}


def write_results(path: Path, result: Mapping[str, Any], markdown: str) -> None:
    """Writes `path`, without suffix, as JSON and as Markdown; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")
