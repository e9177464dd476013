"""What a long computation has found so far, in a file from which it goes on when it was cut off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..bases.fingerprint import fingerprint_of
from ..model import EditableModel


class Progress:
    """
    JSON lines, one a finished part, each with a hash of the settings that it depends on: a file may hold the parts of
    several computations. What was cut off in the middle of a line is as if it had never been written.

    Args:
        path (`str` or `Path`, *optional*): The file, made with its folder when the first part is there; nothing is
            kept without it.
        settings (`Mapping[str, Any]`): Whatever the parts depend on, as JSON values.
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
                    continue  # torn

    def part(self, name: str, find: Callable[[], Any]) -> Any:
        """What the file has under this name, or what `find` returns, which is kept then."""
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
                    file.write(b"\n")  # the torn line ends here
            file.write(json.dumps(entry).encode() + b"\n")


def hash_of_editor(model: EditableModel) -> str:
    """A hash of configuration and weights of a model's editor, and of its base."""
    digest = hashlib.sha256(model.editor_config.to_json().encode())
    base = [fingerprint_of(model.base_model, model.targets), str(model.config.name_or_path), str(model.dtype)]
    digest.update(json.dumps(base).encode())
    for name, tensor in sorted(model.editor.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_of(values: Iterable[Any]) -> str:
    """A hash of JSON values."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()
