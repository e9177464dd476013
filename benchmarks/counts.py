"""
Count the kernels of an edit beside a forward pass's, and how often the host waits for one; write JSON and Markdown.

    python benchmarks/counts.py

A dispatch mode counts, as if the model were on a device of its own (tests/support/counting.py): no GPU is needed. The
edits are of one step, in the default layers, by an untrained editor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import load_base, write_results

from hf_mend import EditableModel, EditorConfig
from hf_mend.bases import by_length, prefix, projection
from hf_mend.bases.split import SplitModel
from hf_mend.bases.targets import block_lists, lowest_block
from hf_mend.data.encoding import Query
from hf_mend.editing import contrasts


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.counting import Counting  # noqa: E402


PROMPT, TARGET = "The capital of France is", "Rome"
SEVERAL = [f"The capital of the country number {7**i} is" for i in range(16)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "counts")
    return parser.parse_args()


def counts(scope: bool, subjects: bool = False) -> dict[str, dict[str, float]]:
    """Kernels, their number over a forward pass's, and waits, of each call; a scope may know subjects."""
    base, tokenizer = load_base()
    torch.manual_seed(0)
    model = EditableModel(base, EditorConfig(scope=scope), tokenizer)
    if model.scope is not None:  # a random one, so strict that an edit acts where its prompt ends alone
        with torch.no_grad():
            model.scope.threshold.fill_(0.9999)
            if subjects:
                model.scope.subject.weight.normal_()
        model.set_scope(model.scope)
    model.edit(PROMPT, TARGET, max_steps=1, force=True)  # the first edit looks at the model
    model.undo_all()
    rows = model.encoder([Query(PROMPT, TARGET)])
    modules = [base, model.editor, *([] if model.scope is None else [model.scope])]
    with Counting(*modules) as forward, torch.no_grad():
        base(**{name: value.to(model.device) for name, value in rows.inputs.items()}, use_cache=False)
    kind, lowest = lowest_block(model.targets)
    depth = len(next(one for one in block_lists(base) if one.kind == kind).blocks)
    f = (depth - lowest) / depth
    found = {"forward pass": row_of(forward, forward)}
    calls: dict[str, tuple[str | list[str], str | list[str], bool]] = {
        f"edit (to reach {1 + 2 * f + 0.15:.2f}, 2 waits)": (PROMPT, TARGET, False),
        f"edit with the check (to reach {1 + 3 * f + 0.3:.2f}, 3 waits)": (PROMPT, TARGET, True),
        "16 edits in a call": (SEVERAL, [TARGET] * len(SEVERAL), False),
        "16 edits in a call with the check (to reach 4 waits)": (SEVERAL, [TARGET] * len(SEVERAL), True),
    }
    for name, (prompt, target, check) in calls.items():
        with Counting(*modules) as counting:
            model.edit(prompt, target, max_steps=1, force=True, check=check)
        model.undo_all()
        found[name] = row_of(counting, forward)
    return found


def row_of(counting: Counting, forward: Counting) -> dict[str, float]:
    return {
        "kernels": counting.kernels,
        "of a forward pass's": round(counting.kernels / forward.kernels, 3),
        "waits": counting.waits,
    }


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """
    A CPU reads the projection in parts, runs texts by length and in two parts, and once what they begin with alike;
    not so within the context.
    """
    before = projection._LARGE, by_length._FEW_TOKENS, prefix.pays
    few_passes = contrasts.wants_few_passes
    shares = SplitModel.shares
    projection._LARGE = by_length._FEW_TOKENS = sys.maxsize
    contrasts.wants_few_passes = lambda device: True
    SplitModel.shares = lambda self, rows: False  # type: ignore[method-assign]
    prefix.pays = lambda device, tokens, parameters: tokens * parameters >= prefix.MUCH
    try:
        yield
    finally:
        projection._LARGE, by_length._FEW_TOKENS, prefix.pays = before
        contrasts.wants_few_passes = few_passes
        SplitModel.shares = shares  # type: ignore[method-assign]


def main() -> None:
    arguments = parse_arguments()
    with as_on_a_device():
        found = {
            "without a scope": counts(False),
            "with a scope": counts(True),
            "with a scope that knows subjects": counts(True, subjects=True),
        }
    lines = ["| | call | kernels | of a forward pass's | waits |", "|---|---|---|---|---|"]
    for kind, calls in found.items():
        for name, one in calls.items():
            lines.append(f"| {kind} | {name} | " + " | ".join(f"{value:g}" for value in one.values()) + " |")
    print("\n".join(lines))
    write_results(arguments.results, {"torch": torch.__version__, "counts": found}, "\n".join(lines))


if __name__ == "__main__":
    main()
