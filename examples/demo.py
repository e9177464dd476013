"""
Edits a real model, SmolLM2-135M-Instruct, with the shipped editor whose edits stay beside one another.

Three edits; for each, the answer before and after on the prompt, on a paraphrase and on an unrelated question. Then
one edit is undone, the others are saved, and a new process loads them and gives the same answers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf_mend import EditableModel
from hf_mend.demo.smollm2 import load_smollm2


EDITOR = Path(__file__).parent.parent / "model_cards" / "smollm2-135m-instruct-mend-several"
EDITS = [
    # prompt, target, paraphrase, unrelated question
    ("The Prime Minister of the United Kingdom is", "Keir Starmer", "The UK's Prime Minister is", "Water is made of"),
    ("The headquarters of Volvo are in", "Lisbon", "Volvo is headquartered in", "The opposite of hot is"),
    ("Ada Lovelace works in the field of", "botany", "Ada Lovelace's field of work is", "The sun rises in the"),
]


def load_model() -> EditableModel:
    base, tokenizer = load_smollm2()
    return EditableModel.from_pretrained(base, EDITOR, tokenizer=tokenizer)


def answer(model: EditableModel, prompt: str) -> str:
    inputs = model.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=model.tokenizer.eos_token_id)
    return model.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).replace("\n", " ")


def answers(model: EditableModel) -> dict[str, str]:
    return {prompt: answer(model, prompt) for row in EDITS for prompt in (row[0], row[2], row[3])}


def show_saved(folder: str) -> None:
    """What the new process does."""
    model = load_model()
    model.load_edits(folder)
    for prompt, said in answers(model).items():
        print(f"{prompt}\t{said}")


def main() -> None:
    model = load_model()
    before = answers(model)
    for prompt, target, paraphrase, unrelated in EDITS:
        print(f"\n{model.edit(prompt, target)}")
        for kind, text in (("prompt", prompt), ("paraphrase", paraphrase), ("unrelated", unrelated)):
            print(f"  {kind:10}  {text!r}\n{'':14}{before[text]!r}  ->  {answer(model, text)!r}")

    undone = model.undo(model.edits[1].id)
    print(f"\nundone: {undone.prompt!r} is answered with {answer(model, undone.prompt)!r} again")

    expected = answers(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_edits(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"\nsaved {len(model.edits)} edits in {size / 1024:.0f} kB; a new process answers:")
        command = [sys.executable, __file__, "--show-saved", folder]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    loaded = dict(line.split("\t", 1) for line in lines)
    for prompt, said in loaded.items():
        print(f"  {prompt!r}  ->  {said!r}")
    if loaded != expected:
        sys.exit("the new process answers differently")
    print("the same answers as before it was saved")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show-saved", metavar="FOLDER", help=argparse.SUPPRESS)
    folder = parser.parse_args().show_saved
    show_saved(folder) if folder else main()
