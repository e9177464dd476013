"""
Edit a real model, SmolLM2-135M-Instruct, with the shipped editor that keeps several edits.

The demo makes three edits. For each it shows the answers before and after: to the prompt, to a paraphrase and to an
unrelated prompt. Then it undoes one edit and saves the others; a new process loads these and gives the same answers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from hf_mend import EditableModel
from hf_mend.demo.smollm2 import load_smollm2


EDITOR = Path(__file__).parent.parent / "model_cards" / "smollm2-135m-instruct-mend-several"
EDITS = [
    # prompt, target, paraphrase, unrelated prompt
    ("The Prime Minister of the United Kingdom is", "Keir Starmer", "The UK's Prime Minister is", "Water is made of"),
    ("The headquarters of Volvo are in", "Lisbon", "Volvo is headquartered in", "The opposite of hot is"),
    ("Ada Lovelace works in the field of", "botany", "Ada Lovelace's field of work is", "The sun rises in the"),
]


def load_model() -> EditableModel:
    logging.disable_progress_bar()  # transformers' own; the conversion of the first run keeps its bar
    base, tokenizer = load_smollm2()
    return EditableModel.from_pretrained(base, EDITOR, tokenizer=tokenizer)


def answer(model: EditableModel, prompt: str) -> str:
    """The first eight tokens of the model's greedy answer, on one line."""
    inputs = model.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=model.tokenizer.eos_token_id)
    return model.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).replace("\n", " ")


def answers(model: EditableModel) -> dict[str, str]:
    return {prompt: answer(model, prompt) for row in EDITS for prompt in (row[0], row[2], row[3])}


def show_saved(folder: str) -> None:
    """What the new process does: load the saved edits and print its answers."""
    model = load_model()
    model.load_edits(folder)
    for prompt, said in answers(model).items():
        print(f"{prompt}\t{said}")


def main() -> None:
    print("Loading SmolLM2-135M-Instruct and its editor. The first run converts the model's file, once.", flush=True)
    model = load_model()
    before = answers(model)
    for number, (prompt, target, paraphrase, unrelated) in enumerate(EDITS, start=1):
        print(f"\n{number}. Edit the model to complete {prompt!r} with {target!r}.\n\n{model.edit(prompt, target)}\n")
        for kind, text in (("the prompt", prompt), ("a paraphrase", paraphrase), ("an unrelated prompt", unrelated)):
            print(f"  {kind}: {text!r}\n      before: {before[text]!r}\n      after:  {answer(model, text)!r}")

    undone = model.undo(model.edits[1].id)
    print("\n4. Undo the second edit.\n")
    print(f"  {undone.prompt!r}\n      now:    {answer(model, undone.prompt)!r}")

    expected = answers(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_edits(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"\n5. Save the {len(model.edits)} other edits ({size / 1024:.0f} kB) and load them in a new process.\n")
        command = [sys.executable, __file__, "--show-saved", folder]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    loaded = dict(line.split("\t", 1) for line in lines)
    for prompt, said in loaded.items():
        print(f"  {prompt!r}\n      now:    {said!r}")
    if loaded != expected:
        sys.exit("The new process answers differently, which must not happen.")
    print("\nThese are the same answers as before the edits were saved.")
    print("Edits hold in sentences like these; in a chat or behind other text they often do not: see README.md.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show-saved", metavar="FOLDER", help=argparse.SUPPRESS)
    folder = parser.parse_args().show_saved
    show_saved(folder) if folder else main()
