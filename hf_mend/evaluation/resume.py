"""A file of the finished parts of a long computation, from which it resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..bases.fingerprint import fingerprint_of
from ..model import EditableModel
from ..scope.files import scope_id


class Progress:
    """
    JSON lines, one per finished part, each with a hash of the settings that it depends on, so that a file may hold
    parts of several computations. An incomplete line is ignored.

    Args:
        path (`str` or `Path`, *optional*): The file, made with its folder for the first part. Nothing is stored
            without it.
        settings (`Mapping[str, Any]`): The settings that the parts depend on, as JSON values.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.parts: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    if entry["key"] == self.key:
                        self.parts[entry["part"]] = entry["found"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # an incomplete line

    def part(self, name: str, find: Callable[[], Any]) -> Any:
        """Return the stored part of this name; if there is none, compute it with `find` and store it."""
        if name not in self.parts:
            self.parts[name] = find()
            if self.path is not None:
                self._append({"key": self.key, "part": name, "found": self.parts[name]})
        return self.parts[name]

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # end the incomplete line
            file.write(json.dumps(entry).encode() + b"\n")


def hash_of_editor(model: EditableModel) -> str:
    """Return a hash of the configuration and weights of a model's editor, of its scope, and of its base."""
    digest = hashlib.sha256(model.editor_config.to_json().encode())
    base: list[Any] = [
        fingerprint_of(model.base_model, model.targets),
        str(model.config.name_or_path),
        str(model.dtype),
    ]
    if model.scope is not None:
        base += [scope_id(model.scope), model.scope_strictness]
    digest.update(json.dumps(base).encode())
    for name, tensor in sorted(model.editor.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_of(values: Iterable[Any]) -> str:
    """Return a hash of JSON values."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()
