"""Reading and writing an editor's and an edit collection's files: atomically, and validated before use."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


WEIGHTS_NAME = "editor.safetensors"
EDITS_NAME = "edits.safetensors"


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """
    Yields a copy of a folder that takes the folder's place when the context ends well.

    A process killed at any point leaves the earlier folder whole: under its own name, or, in the instant between the
    two renames, under the name from which [`recover_folder`] brings it back. Files that the context does not write are
    kept.

    Args:
        path (`str` or `Path`): The folder to replace; it need not exist.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
    try:
        if path.is_dir():
            shutil.copytree(path, work, dirs_exist_ok=True, symlinks=True)
        os.chmod(work, 0o755)
        yield work
        for file in work.iterdir():
            if file.is_file():
                _flush(file)
        previous = _previous(path)
        if path.is_dir():
            os.rename(path, previous)
        os.rename(work, path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """Brings back a folder that a killed process had moved aside and not yet replaced."""
    path = Path(path)
    previous = _previous(path)
    if previous.is_dir():
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, path)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        plain = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
        save_file(plain, name, metadata={"format": "pt", **metadata})
        os.chmod(name, 0o644)
        _flush(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def read_tensors(
    path: str | Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Reads a safetensors file after checking names, shapes and dtypes against its header, then values.

    Args:
        path (`str` or `Path`): The file.
        expected (`Mapping[str, tuple[int, ...]]`, *optional*): Name -> shape of every tensor that must be there.

    Returns:
        `tuple`: The tensors in their stored dtype, and the header's metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, altered, or does not hold what is expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the folder of a saved editor or of saved edits?")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            if expected is not None:
                missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
                if missing or extra:
                    raise ValueError(
                        f"{path} does not fit its configuration: missing tensors {missing[:5]}, unexpected "
                        f"{extra[:5]}. "
                        "Was the configuration altered by hand, or is the file another editor's?"
                    )
            for name in sorted(names):
                piece = file.get_slice(name)
                shape = tuple(piece.get_shape())
                if expected is not None and shape != tuple(expected[name]):
                    raise ValueError(
                        f"{path}: {name} has shape {shape}, its configuration says {tuple(expected[name])}; the file "
                        f"or "
                        "the configuration was altered, or they belong to different editors"
                    )
                if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{path}: {name} has dtype {piece.get_dtype()}, expected a floating-point one")
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or save it again") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; the file is damaged or its training diverged")
    return tensors, metadata


def read_json_object(text: str, source: str | Path) -> dict[str, Any]:
    """
    Parses JSON text that must be an object.

    Raises:
        ValueError: It is not; the message names the source.
    """
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}); download or save it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}, expected a JSON object; save it again")
    return values


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
