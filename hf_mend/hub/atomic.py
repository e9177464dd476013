"""Writing in one step: a folder or a file is replaced whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """
    Yields a copy of a folder that takes the folder's place when the context ends well.

    A process killed at any point leaves the earlier folder whole: under its own name, or, in the instant between the
    two renames, under the name from which [`recover_folder`] brings it back. Files that the context does not write are
    kept. A folder that cannot be renamed (a mounted volume, the working directory) keeps its place, and its files are
    replaced one by one.

    Args:
        path (`str` or `Path`): The folder to replace; it need not exist.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    fixed = path.is_dir() and _is_fixed(path)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path if fixed else path.parent))
    try:
        if path.is_dir():
            _copy_into(work, path, with_folders=not fixed)
        earlier = {entry.name for entry in work.iterdir()}
        os.chmod(work, 0o755)
        yield work
        for file in work.iterdir():
            if file.is_file():
                _flush(file)
        if fixed:
            _move_files(work, path, earlier)
            return
        previous = _previous(path)
        if path.is_dir():
            os.rename(path, previous)
        os.rename(work, path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_fixed(path: Path) -> bool:
    """Whether a folder cannot be renamed, or should not be."""
    here = Path.cwd()
    return os.path.ismount(path) or path == here or path in here.parents or not os.access(path.parent, os.W_OK)


def _copy_into(work: Path, folder: Path, with_folders: bool) -> None:
    """
    Copies a folder's own files. Those further down may be large, or open, and are not written to here: links them.

    A link among the files becomes the file that it leads to, so that nothing is written through it to another place.
    """
    for entry in folder.iterdir():
        if entry.is_file():
            shutil.copy2(entry, work / entry.name)
        elif with_folders and entry.is_dir() and entry != work:
            if entry.is_symlink():
                os.symlink(os.readlink(entry), work / entry.name)
            else:
                shutil.copytree(entry, work / entry.name, symlinks=True, copy_function=link_or_copy)


def _move_files(work: Path, path: Path, earlier: set[str]) -> None:
    """Brings a folder's files to another, and takes away those that are in it no more."""
    files = sorted(work.iterdir(), key=lambda file: (file.suffix == ".json", file.name))  # a configuration last
    for file in files:
        os.replace(file, path / file.name)
    for name in earlier - {file.name for file in files}:
        (path / name).unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name of a file, where the file system has such; a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def recover_folder(path: str | Path) -> None:
    """Brings back a folder that a killed process had moved aside and not yet replaced."""
    path = Path(path).resolve()
    previous = _previous(path)
    if previous.is_dir():
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, path)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a new file that takes a file's place when the context ends well, whole or not at all."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        _flush(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
