"""
Measure what edits do to tasks of lm-evaluation-harness: before the edits, with them, and after they are undone.

    pip install -e '.[harness]'
    python examples/lm_evaluation_harness.py                                # three facts in examples/data, offline
    python examples/lm_evaluation_harness.py --tasks arc_easy,piqa --limit 200    # the harness downloads these

The harness takes the edited model as it is, `HFLM(pretrained=model)`. The script writes three small tasks as a user
would, a YAML file and JSON lines each. The correct answer of `edited` and `reworded` is the edit's target, and that of
`neighbours` the true one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_mend import EditableModel, EditRecord, read_counterfact
from hf_mend.auto import load_model


ROOT = Path(__file__).parent.parent
FACTS = ROOT / "examples" / "data" / "facts_test.json"
EDITOR = ROOT / "model_cards" / "smollm2-135m-instruct"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_tasks(facts: Sequence[EditRecord], folder: Path) -> list[str]:
    """Write tasks about some facts and return the tasks' names."""
    rows: dict[str, list[dict[str, object]]] = {"edited": [], "reworded": [], "neighbours": []}
    for fact in facts:
        new, true = fact.target, fact.ground_truth
        rows["edited"].append({"prompt": fact.prompt, "choices": [new, true]})
        rows["reworded"] += [{"prompt": prompt, "choices": [new, true]} for prompt in fact.paraphrases]
        rows["neighbours"] += [{"prompt": prompt, "choices": [true, new]} for prompt in fact.neighborhood]
    for name, lines in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        # A path in JSON is one in YAML too, whatever is in it.
        task = TASK.format(name=name, data=json.dumps(str(data)))
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return list(rows)


def measure(model: EditableModel, tasks: list[str], manager: TaskManager, limit: int | None) -> dict[str, float]:
    """Return each task's accuracy under the edits that the model carries."""
    harness = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=8)
    found = simple_evaluate(harness, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)["results"]
    return {task: found[task]["acc,none"] for task in tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editor", default=str(EDITOR), help="a folder or a repository of the Hub")
    parser.add_argument("--facts", type=int, default=3, help="how many facts are edited, all at once")
    parser.add_argument("--tasks", default="", help="the harness' own tasks to measure too, separated by commas")
    parser.add_argument("--limit", type=int, help="rows a task")
    arguments = parser.parse_args()

    model = load_model(arguments.editor)
    facts = [fact for fact in read_counterfact(FACTS) if fact.neighborhood][: arguments.facts]
    with tempfile.TemporaryDirectory() as folder:
        own = write_tasks(facts, Path(folder))
        tasks = own + [name for name in arguments.tasks.split(",") if name]
        manager = TaskManager(include_path=folder, include_defaults=bool(arguments.tasks))
        before = measure(model, tasks, manager, arguments.limit)
        for result in model.edit(facts):
            print(result)
        after = measure(model, tasks, manager, arguments.limit)
        model.undo_all()
        undone = measure(model, tasks, manager, arguments.limit)
    print(f"{'accuracy':12}  before   edited   undone")
    for task in tasks:
        print(f"{task:12}  {before[task]:6.3f}   {after[task]:6.3f}   {undone[task]:6.3f}")


if __name__ == "__main__":
    main()
