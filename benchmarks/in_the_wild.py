"""
Measures edits as people meet them: asked in every form, answered freely, each alone or beside others.

    python benchmarks/in_the_wild.py --data DIR --editor model_cards/smollm2-135m-instruct --limit 100
    python benchmarks/in_the_wild.py --data DIR --editor model_cards/smollm2-135m-instruct --limit 100 --kept 1000

With `--kept N` the measured facts are edited in calls of ten and kept beside one another, with facts of
facts_train.json up to N; a neighbour that another kept edit is about does not count.

Of the groups of N that the measured facts make, each is measured beside itself alone. `--store FILE` keeps edits, and
the un-edited model's answers stand in in_the_wild.progress.jsonl beside the results: with both, further settings cost
half of the first. An interrupted run goes on from there.

`DIR` (or the environment variable HF_MEND_DATA) holds facts_test.json and nq_open_test.jsonl. Questions, prompts
about the same subject and contexts are those that `benchmarks/held_out.py` holds out of training. Answers
are greedy, to the model's own end or `--tokens`. A right answer starts with the target, in a chat holds it; a repeat
says the target three times or more. What must stay: the next token, and the logits that predict it, bit for bit.
With `--kept`, the perplexity of held-out text (Python's documentation) is measured too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import DATA, load_base, parse_with_data, write_results
from held_out import EXAMPLES, HELD_OUT_TEXTS

from hf_mend import EditableModel, read_counterfact, read_questions
from hf_mend.data.forms import FormTemplates, Surroundings, packaged_texts, with_forms
from hf_mend.evaluation.asking import all_asked
from hf_mend.evaluation.scores import held_out_passages
from hf_mend.evaluation.wild import WildSettings, measure_in_the_wild
from hf_mend.evaluation.wild_figures import confusion, figures_table, strictness_curve, wild_means


DECISIONS = ("right edit", "missed", "wrong edit", "fired")
STRICTNESS = [round(-0.3 + 0.05 * step, 2) for step in range(13)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **DATA)
    parser.add_argument("--editor", type=Path, required=True)
    parser.add_argument("--facts", default="facts_test.json", help="a file of --data")
    parser.add_argument("--examples", action="store_true", help="measure on examples/data in its place")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--kept", type=int, default=1, help="edits beside one another")
    parser.add_argument("--strictness", type=float, default=0.0, help="added to the thresholds of the scope")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=50, help="facts asked together")
    parser.add_argument("--store", type=Path, help="store of edits, from which further runs take them")
    parser.add_argument("--no-scope", action="store_true", help="edits act everywhere, as merged and exported ones do")
    parser.add_argument("--hold-out", default="", help="relations to report apart")
    parser.add_argument("--results", type=Path, default=Path("build/in_the_wild"), help="table, without suffix")
    arguments = parse_with_data(parser)
    folder = EXAMPLES if arguments.examples else arguments.data
    templates = FormTemplates.load().split()[1]
    facts = list(read_counterfact(folder / arguments.facts))
    records = with_forms(facts, templates)[: arguments.limit]
    questions = read_questions(arguments.data / "nq_open_test.jsonl")
    around = Surroundings(facts[arguments.limit :] or facts, questions, packaged_texts()[-HELD_OUT_TEXTS:])
    base, tokenizer = load_base()
    model = EditableModel.from_pretrained(base, arguments.editor, tokenizer=tokenizer).eval()
    if model.scope is not None:
        model.scope_strictness = arguments.strictness
    asked = all_asked(model, records, around, [question for question, _ in questions])
    more = [*read_counterfact(arguments.data / "facts_train.json")] if arguments.kept > len(records) else []
    settings = WildSettings(
        arguments.kept, max_new_tokens=arguments.tokens, batch_size=arguments.batch_size, scope=not arguments.no_scope
    )
    found = measure_in_the_wild(
        model, records, asked, settings, more, arguments.results.parent / "in_the_wild.progress.jsonl",
        arguments.store, held_out_passages(model) if arguments.kept > 1 else (),
    )  # fmt: skip
    measured = found.values
    groups = {"all": {**wild_means(measured), **found.perplexity}}
    held_out = [name for name in arguments.hold_out.split(",") if name]
    if held_out:
        pairs = list(zip(records, measured, strict=True))
        for title, unseen in (("relations seen in training", False), ("unseen relations", True)):
            part = [values for record, values in pairs if (record.relation in held_out) == unseen]
            if part:
                groups[title] = wild_means(part)
    markdown = figures_table(groups)
    decisions = confusion(measured, arguments.strictness)
    curve = strictness_curve(measured, STRICTNESS)
    if decisions:
        columns = {name: {kind: row[name] for kind, row in decisions.items() if name in row} for name in DECISIONS}
        markdown += "\n\nWhat the scope decides at a text's end:\n\n" + figures_table(columns)
        points = {f"{point['strictness']:+.2f}": point for point in curve}
        markdown += "\n\nBy strictness:\n\n" + figures_table(points)
    result = {"metrics": groups, "decisions": decisions, "strictness": curve, "edits": measured}
    write_results(arguments.results, result, markdown)
    print(markdown)


if __name__ == "__main__":
    main()
