"""Trains a small editor and writes its losses; run by test_trainer.py, alone and under `accelerate launch`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from support.models import RECORDS, build_model, make_tokenizer, small_config
from support.training import QUESTIONS, arguments, losses

from hf_mend import EditorTrainer, get_editable_model


def main(folder: Path, batch_size: int, accumulation: int) -> None:
    torch.manual_seed(0)
    model = get_editable_model(build_model("llama"), small_config(), make_tokenizer())
    settings = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=6,
        hidden_states_dir=str(folder / "states"),
    )
    trainer = EditorTrainer(model, settings, RECORDS[:4], questions=QUESTIONS)
    trainer.train()
    trainer.save_model(str(folder / "editor"))
    if settings.process_index == 0:
        result = {"processes": settings.world_size, "losses": losses(trainer)}
        (folder / "losses.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
