"""A file of the finished parts of a long computation, from which it resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        known (`Sequence[Path]`): Further files of finished parts, which are only read.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], known: Sequence[Path] = ()):
        self.path = None if path is None else Path(path)
        self.left_out = False  # whether `only` left a missing part to others
        self._numbers: dict[str, int] | None = None
        self._share = (0, 1)
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.parts: dict[str, Any] = {}
        for file in dict.fromkeys([*known, *([] if self.path is None else [self.path])]):
            if file.exists():
                self._read(file)

    def _read(self, file: Path) -> None:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["key"] == self.key:
                    self.parts[entry["part"]] = entry["found"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # an incomplete line

    @contextmanager
    def only(self, number: int, count: int) -> Iterator[None]:
        """Leave the parts within the context to others but for each that is the `number`-th of `count`, in turn."""
        self._numbers, self._share = {}, (number, count)
        try:
            yield
        finally:
            self._numbers = None

    def is_missing(self, name: str) -> bool:
        """Whether a part is to be computed here."""
        if self._numbers is None:
            return name not in self.parts
        number, count = self._share
        is_own = self._numbers.setdefault(name, len(self._numbers)) % count == number
        self.left_out |= name not in self.parts and not is_own
        return name not in self.parts and is_own

    def part(self, name: str, find: Callable[[], Any]) -> Any:
        """
        Return the stored part of this name; if there is none, compute it with `find` and store it. What is left to
        others is empty.
        """
        missing = self.is_missing(name)
        if not missing and name not in self.parts:
            return {}
        if missing:
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
