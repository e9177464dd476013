"""Atomic writing: a folder or a file is replaced whole or not at all, whenever the process is killed."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """
    Yield a copy of a folder that takes the folder's place when the context ends without an error.

    A process killed at any point leaves the earlier folder whole: under its own name, or, in the instant between the
    two renames, under the name from which [`recover_folder`] brings it back. Files that the context does not write are
    kept, permissions stay, and a new file can be read by all. Links that lead out of the folder stay links: what they
    lead to is neither read nor written. In a folder that cannot be renamed (a mounted volume, the working directory)
    the files are replaced singly.

    Args:
        path (`str` or `Path`): The folder to replace; it need not exist.
    """
    path = Path(path).resolve()
    check_is_folder(path)
    made_folder(path.parent)
    recover_folder(path)
    fixed = path.is_dir() and _is_fixed(path)
    within, prefix = path if fixed else path.parent, f".{path.name}.new-"
    _clean_up(within, prefix)
    work = Path(tempfile.mkdtemp(prefix=f"{prefix}{_writer()}-", dir=within))
    try:
        if path.is_dir():
            _copy_into(work, path, with_folders=not fixed)
        earlier, links = {entry.name for entry in work.iterdir()}, _links_out(path)
        os.chmod(work, _mode(path, 0o755))
        yield work
        for file in work.iterdir():
            if file.is_file():
                if file.stat().st_nlink == 1:  # no link to a file of before; safetensors' own is for the user alone
                    os.chmod(file, _mode(path / file.name, 0o644))
                _flush(file)
        if not fixed:
            for name, target in links.items():
                if not os.path.lexists(work / name):
                    os.symlink(target, work / name)
        flush_folder(work)
        if fixed:
            _move_files(work, path, earlier)
            flush_folder(path)
            return
        previous = _previous(path)
        if path.is_dir():
            os.rename(path, previous)
        os.rename(work, path)
        flush_folder(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """
    Check, before the work whose result it is to hold, that a folder can be written, or made where it is missing.

    Args:
        path (`str` or `Path`): The folder.

    Raises:
        OSError: It cannot; nothing has changed.
    """
    path = Path(path)
    place = path.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be a folder, since {place} is a file; name another folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise PermissionError(f"{path} cannot be written ({error.strerror or error}); name another folder") from error


def _is_fixed(path: Path) -> bool:
    """Return whether a folder cannot, or should not, be renamed."""
    here = Path.cwd()
    return os.path.ismount(path) or path == here or path in here.parents or not os.access(path.parent, os.W_OK)


def _copy_into(work: Path, folder: Path, with_folders: bool) -> None:
    """
    Copy a folder's own files, and link the files in its folders, which may be large or open and are not written here.

    A link among its own files to another becomes that file, so that nothing is written through the link.
    """
    out = _links_out(folder)
    for entry in folder.iterdir():
        if entry.name in out:
            continue
        if entry.is_file():
            shutil.copy2(entry, work / entry.name)
        elif with_folders and entry.is_dir() and entry != work:
            if entry.is_symlink():
                os.symlink(os.readlink(entry), work / entry.name)
            else:
                shutil.copytree(entry, work / entry.name, symlinks=True, copy_function=link_or_copy)


def _links_out(folder: Path) -> dict[str, str]:
    """Return the links among a folder's own files that lead out of it, and where to."""
    links = [entry for entry in folder.iterdir() if entry.is_symlink()] if folder.is_dir() else []
    return {link.name: os.readlink(link) for link in links if not link.is_dir() and not stays_within(link, folder)}


def stays_within(path: Path, folder: Path) -> bool:
    """Whether a file of a folder is not a link out of it, or one as the Hub's cache makes them."""
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return any(place in target.parents for place in [folder, *blobs])


def _move_files(work: Path, path: Path, earlier: set[str]) -> None:
    """Move the files of `work` to `path`, and delete those of the earlier files that `work` no longer has."""
    files = sorted(work.iterdir(), key=lambda file: (file.suffix == ".json", file.name))  # a configuration last
    for file in files:
        os.replace(file, path / file.name)
    for name in earlier - {file.name for file in files}:
        (path / name).unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link to a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def recover_folder(path: str | Path) -> None:
    """Restore a folder that a killed process had moved aside and not yet replaced."""
    path = Path(path).resolve()
    previous = _previous(path)
    if previous.is_dir():
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, path)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """
    Yield a new file that takes a file's place when the context ends without an error. The permissions stay; a new
    file can be read by all.
    """
    path = Path(path)
    prefix = f".{path.name}.new-"
    _clean_up(path.parent, prefix)
    handle, name = tempfile.mkstemp(prefix=f"{prefix}{_writer()}-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, _mode(path, 0o644))
        _flush(Path(name))
        os.replace(name, path)
        flush_folder(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def made_folder(path: Path) -> None:
    """
    Make a folder and those above it where they are missing, so that a power failure does not take them back.

    Raises:
        NotADirectoryError: It is a file.
    """
    check_is_folder(path)
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def check_is_folder(path: Path) -> None:
    """
    Raises:
        NotADirectoryError: The path is a file's.
    """
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file, and what is saved needs a folder; name another path")


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system lets folders be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _mode(path: Path, default: int) -> int:
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else default


def _writer() -> str:
    """Return the name of this process for the files that it is writing: its machine's, and its id."""
    return f"{_machine()}-{os.getpid()}"


@cache
def _machine() -> str:
    names = [os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")]
    with suppress(OSError):  # tells containers and restarts apart, where it is there
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        names.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]


def _clean_up(folder: Path, prefix: str) -> None:
    """Delete what processes of this machine that are no more have left behind in writing."""
    for entry in folder.glob(f"{glob.escape(prefix)}{_machine()}-*"):
        process = entry.name.removeprefix(prefix).split("-")[1]
        if process.isdigit() and not _is_alive(int(process)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where os.kill ends a process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
