"""
Measures all neighbours of the facts that were edited, beside all edits of a store: do they stay?

    python benchmarks/in_the_wild.py --data DIR --editor EDITOR --limit 300 --kept 10000 --store S
    python benchmarks/neighbours.py --data DIR --editor EDITOR --limit 300 --store S

`in_the_wild.py` draws one neighbour a fact, of which few are left where ten thousand edits are kept: one that another
edit is about does not count. This takes all that count, as they are, behind other text and as a turn of a chat.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
from common import DATA, load_base, parse_with_data, write_results
from held_out import HELD_OUT_TEXTS
from tqdm.auto import tqdm

from hf_mend import EditableModel, EditRecord, read_counterfact, read_questions
from hf_mend.data.encoding import Query
from hf_mend.data.forms import Surroundings, packaged_texts, writes_chats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--editor", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True, help="the edits that are kept")
    parser.add_argument("--limit", type=int, default=300, help="facts of facts_test.json")
    parser.add_argument("--results", type=Path, default=Path("build/neighbours"), help="table, without suffix")
    arguments = parse_with_data(parser)
    facts = list(read_counterfact(arguments.data / "facts_test.json"))
    base, tokenizer = load_base()
    model = EditableModel.from_pretrained(base, arguments.editor, tokenizer=tokenizer).eval()
    model.open_store(arguments.store)
    kept = {edit.prompt for edit in model.edits}
    about = {r.subject for r in [*facts, *read_counterfact(arguments.data / "facts_train.json")] if r.prompt in kept}
    texts = that_count(facts[: arguments.limit], {subject for subject in about if subject})
    questions = read_questions(arguments.data / "nq_open_test.jsonl")
    around = Surroundings(facts[arguments.limit :] or facts, questions, packaged_texts()[-HELD_OUT_TEXTS:])
    forms = {
        "neighbours": [Query(text) for text in texts],
        "behind text": [Query(text, context=around.context(random.Random(text), "")) for text in texts],
    }
    if writes_chats(tokenizer):
        forms["in a chat"] = [Query(text, chat=True) for text in texts]
    found = {name: stays(model, queries) for name, queries in forms.items()}
    lines = [f"{len(kept):,} edits, {len(texts)} neighbours of {arguments.limit} facts", ""]
    lines += ["| | next token | bits |", "|---|---|---|"]
    lines += [f"| {name} | {token:.3f} | {bits:.3f} |" for name, (token, bits) in found.items()]
    markdown = "\n".join(lines)
    write_results(arguments.results, {"edits": len(kept), "neighbours": len(texts), "stays": found}, markdown)
    print(markdown)


def that_count(facts: list[EditRecord], about: set[str]) -> list[str]:
    """The neighbours of some facts that no other edit is about."""
    found: dict[str, None] = {}
    for fact in facts:
        others = about - {fact.subject}
        found.update(dict.fromkeys(text for text in fact.neighborhood if not any(one in text for one in others)))
    return [*found]


@torch.no_grad()
def stays(model: EditableModel, queries: list[Query]) -> tuple[float, float]:
    """The shares of texts whose next token, and whose logits bit for bit, are the un-edited model's."""
    tokens = bits = 0
    for query in tqdm(queries, desc="Neighbours"):
        rows = model.encoder([replace(query, answer=None)])
        inputs = {name: value.to(model.device) for name, value in rows.inputs.items()}
        edited = model(**inputs).logits[0, -1]
        with model.disable_edits():
            plain = model(**inputs).logits[0, -1]
        tokens += int(edited.argmax() == plain.argmax())
        bits += int(torch.equal(edited, plain))
    return tokens / len(queries), bits / len(queries)


if __name__ == "__main__":
    main()
