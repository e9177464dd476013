"""
Edit a real model, SmolLM2-135M-Instruct, with the shipped editor, whose edits act where a text asks for them.

The demo makes three edits and asks for each in a sentence, in a chat and behind other text. It shows that an unrelated
answer is the un-edited model's bit for bit, undoes one edit, keeps a hundred edits from a file beside the others, and
saves all; a new process loads them and gives the same answers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from hf_mend import EditableModel, read_counterfact
from hf_mend.demo.smollm2 import load_smollm2


HERE = Path(__file__).parent
EDITOR = HERE.parent / "model_cards" / "smollm2-135m-instruct"
FACTS = HERE / "data" / "facts_test.json"
EDITS = [
    # prompt, target, the same in other words, as a question
    (
        "The Prime Minister of the United Kingdom is",
        "Keir Starmer",
        "The UK's Prime Minister is",
        "Who is the Prime Minister of the United Kingdom?",
    ),
    ("The headquarters of Volvo are in", "Lisbon", "Volvo is headquartered in", "Where is the headquarters of Volvo?"),
    (
        "Ada Lovelace works in the field of",
        "botany",
        "Ada Lovelace's field of work is",
        "Which field does Ada Lovelace work in?",
    ),
]
UNRELATED = ("Water is made of", "What is the opposite of hot?")
BEHIND = "The sun rises in the east. Many people drink coffee in the morning. "
MORE = 100


def load_model() -> EditableModel:
    logging.disable_progress_bar()  # transformers' own; the conversion of the first run keeps its bar
    base, tokenizer = load_smollm2()
    return EditableModel.from_pretrained(base, EDITOR, tokenizer=tokenizer).eval()


def encoded(model: EditableModel, text: str, chat: bool) -> dict[str, torch.Tensor]:
    if chat:
        turns = [{"role": "user", "content": text}]
        return dict(
            model.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        )
    return dict(model.tokenizer(text, return_tensors="pt"))


def answer(model: EditableModel, text: str, chat: bool = False) -> str:
    """The model's greedy answer, to its own end or ten tokens, on one line."""
    inputs = encoded(model, text, chat)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=model.tokenizer.eos_token_id)
    said = model.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


def logits(model: EditableModel, text: str, chat: bool) -> torch.Tensor:
    with torch.no_grad():
        return model(**encoded(model, text, chat)).logits


def forms(row: tuple[str, str, str, str]) -> dict[str, tuple[str, bool]]:
    """How an edit is asked for: a name -> the text, and whether it is a user's turn of a chat."""
    prompt, _, words, question = row
    return {
        "its prompt": (prompt, False),
        "other words": (words, False),
        "behind other text": (BEHIND + words, False),
        "a question in a chat": (question, True),
        "in a chat, behind other text": (BEHIND + question, True),
    }


def answers(model: EditableModel) -> dict[str, str]:
    return {f"{name}: {text}": answer(model, text, chat) for row in EDITS for name, (text, chat) in forms(row).items()}


def show_saved(folder: str) -> None:
    """What the new process does: load the saved edits and print its answers."""
    model = load_model()
    model.load_edits(folder)
    for asked, said in answers(model).items():
        print(f"{asked}\t{said}")


def main() -> None:
    print("Loading SmolLM2-135M-Instruct and its editor. The first run converts the model's file, once.", flush=True)
    model = load_model()
    before = answers(model)
    untouched = {(text, chat): logits(model, text, chat) for text in UNRELATED for chat in (False, True)}
    for number, row in enumerate(EDITS, start=1):
        prompt, target = row[:2]
        print(f"\n{number}. Edit the model to complete {prompt!r} with {target!r}.\n", flush=True)
        print(f"{model.edit(prompt, target)}\n")  # with what it writes before and after
        for name, (text, chat) in forms(row).items():
            print(f"  {name}: {text!r}")
            print(f"      before: {before[f'{name}: {text}']!r}\n      after:  {answer(model, text, chat)!r}")

    print("\n4. What is asked for nothing of this is the un-edited model's, bit for bit.\n")
    for (text, chat), old in untouched.items():
        same = torch.equal(logits(model, text, chat), old)
        print(f"  {text!r}{' in a chat' if chat else ''}: {'the same bits' if same else 'NOT the same'}")

    undone = model.undo(model.edits[1].id)
    print("\n5. Undo the second edit.\n")
    print(f"  {undone.prompt!r}\n      now:    {answer(model, undone.prompt)!r}")

    print(f"\n6. Keep {MORE} edits from a file beside the others.\n", flush=True)
    facts = [replace(fact, paraphrases=[], neighborhood=[]) for fact in list(read_counterfact(FACTS))[:MORE]]
    results = model.edit(facts)
    took = sum(bool(result.success) for result in results)
    print(f"  {took} of {len(facts)} took; {len(model.edits)} edits are kept. The first ones still hold:")
    for row in (EDITS[0], EDITS[2]):
        for name, (text, chat) in forms(row).items():
            print(f"  {name}: {text!r}\n      now:    {answer(model, text, chat)!r}")

    expected = answers(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_edits(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"\n7. Save the {len(model.edits)} edits ({size / 2**20:.1f} MB) and load them in a new process.\n")
        command = [sys.executable, __file__, "--show-saved", folder]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    loaded = dict(line.split("\t", 1) for line in lines)
    if loaded != expected:
        sys.exit("The new process answers differently, which must not happen.")
    print("These are the same answers as before the edits were saved.")
    print("How often edits hold in forms and for facts like these: model_cards/smollm2-135m-instruct/README.md.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show-saved", metavar="FOLDER", help=argparse.SUPPRESS)
    folder = parser.parse_args().show_saved
    show_saved(folder) if folder else main()
