"""Writes docs/architectures.md: the architectures tested end to end, and what an editor changes in each."""

from __future__ import annotations

import re
from pathlib import Path

from support.architectures import CAUSAL, SEQ2SEQ, build

from hf_mend import EditorConfig
from hf_mend.bases.targets import find_targets


PAGE = Path(__file__).with_name("architectures.md")


HEADER = """\
# Architectures

Each of these is tested end to end on a tiny random model (`tests/bases/test_architectures.py`): the factors are
autograd's weight gradient, a pass from the kept hidden state gives the full pass's logits, an edit changes the
target's probability, an undo is exact to the bit, and saved edits, LoRA adapters in plain PEFT and merged weights
give the same logits; it is edited without an editor, and an editor trains on it. Any other model with recognisable
blocks works by the same rules, or by your `target_modules`.

Models that read text beside images or sound (Gemma 3, LLaVA, PaliGemma, Idefics3 and SmolVLM, Qwen-VL, Qwen2-Audio and
their like, `tests/bases/test_multimodal.py`) are edited in the blocks of their text model; an edit acts with and
without an image in the prompt. A model that needs an image or sound in every prompt is refused.

This page is written by `PYTHONPATH=tests python docs/write_architectures.py`.

| model | layers of a block, default | layers of a block, the paper's choice |
|---|---|---|
"""

FOOTER = """
An MLP's layers come first, then a mixer's (Mamba and its like), then attention's output projection; a router, a norm's
scale, an adapter or one of many experts is never a default. mixtral, qwen3_moe and gpt_oss hold their experts as 3-D
parameters, which are not linear layers: an edit acts beside all experts of a block as one, where its factors are the
gradient of a linear layer of zeros beside them. Such edits are saved and loaded as others are, and cannot be merged or
exported. In deepseek_v3, the dense blocks and the shared experts are edited. PEFT takes the shared experts' names for
the fused experts', so it cannot load a LoRA adapter of them, and `save_lora` warns.

[model_types.md](model_types.md) has what an edit comes to in each of transformers' model types.
"""


def page() -> str:
    lines = HEADER.splitlines()
    for name in (*CAUSAL, *SEQ2SEQ):
        model = build(name)
        cells = []
        for choice in ("default", "paper"):
            targets = find_targets(model, EditorConfig(target_modules=choice))
            names = dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", target.name) for target in targets)
            cells.append(", ".join(f"`{relative}`" for relative in names))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, FOOTER])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
