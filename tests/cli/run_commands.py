"""Runs commands one after another and notes what each gave; run by test_shared_edits.py, in two processes."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

from typer.testing import CliRunner

import hf_mend.model
from hf_mend.cli import app
from hf_mend.scope.files import scope_id
from hf_mend.scope.network import ScopeNetwork
from hf_mend.training import scope_processes


def counting(counts: Counter[str], module: object, name: str) -> None:
    """Count the calls of a module's function."""
    function = getattr(module, name)

    def counted(*args: object, **kwargs: object) -> object:
        counts[name] += 1
        return function(*args, **kwargs)

    setattr(module, name, counted)


def noting_scopes(ids: list[str]) -> None:
    """Note the id of each scope that a model is given."""
    set_scope = hf_mend.EditableModel.set_scope

    def noted(model: hf_mend.EditableModel, scope: ScopeNetwork) -> None:
        ids.append(scope_id(scope))
        set_scope(model, scope)

    hf_mend.EditableModel.set_scope = noted


def main(file: Path, output: Path) -> None:
    counts: Counter[str] = Counter()
    scopes: list[str] = []
    noting_scopes(scopes)
    counting(counts, hf_mend.model, "write_card")
    counting(counts, scope_processes, "train_scope")
    found = []
    for words in json.loads(file.read_text()):
        counts.clear()
        scopes.clear()
        done = CliRunner().invoke(app, words)
        error = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
        found.append({"exit": done.exit_code, "stdout": done.stdout, "stderr": done.stderr + error,
                      "scopes": [*scopes], **counts})  # fmt: skip
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
