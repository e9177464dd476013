"""The lock of an edit store: one writer at a time, whatever name each of them has for the file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from ..hub.atomic import made_folder


try:
    import fcntl
except ImportError:  # Windows, where a file that is locked cannot be read by others
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0  # seconds
_PAUSE = 0.05


@contextmanager
def locked_file(path: Path, create: bool) -> Iterator[BinaryIO]:
    """
    Lock a store and yield it, open for reading and writing without a buffer.

    There are two locks: `<path>.lock` beside the file, which is all that Windows and release 0.1.0 have, and one on
    the file itself, which is the same for all its hard links.

    Args:
        path (`Path`): The file itself, not a symbolic link to it.
        create (`bool`): Whether to make the file, and its folder, where they do not exist.

    Raises:
        FileNotFoundError: There is no file, and none is to be made.
        TimeoutError: Another process holds the lock for longer than a minute; the message names it.
    """
    if create:
        made_folder(path.parent)
    elif not path.exists():
        raise moved(path)
    beside = Path(f"{path}.lock")
    until = time.monotonic() + PATIENCE
    try:
        lock = FileLock(beside, timeout=PATIENCE)
        lock.acquire()
    except Timeout as error:
        raise _timeout(path, beside) from error
    try:
        with _opened(path, create, until) as file:
            yield file
    finally:
        lock.release()


@contextmanager
def _opened(path: Path, create: bool, until: float) -> Iterator[BinaryIO]:
    """Open the file that has the name once its lock is held: compaction puts another in its place."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | getattr(os, "O_BINARY", 0), 0o666)
        except FileNotFoundError as error:
            raise moved(path) from error
        with open(handle, "r+b", buffering=0) as file:
            while not _try_lock(handle):
                if time.monotonic() > until:
                    raise _timeout(path, path)
                time.sleep(_PAUSE)
            try:
                if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(handle)):
                    continue
                yield file
                return
            finally:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_UN)  # a child process may have the handle too


def _try_lock(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def moved(path: Path) -> FileNotFoundError:
    """Return the error for a store that is no longer where it was."""
    return FileNotFoundError(
        f"the edit store {path} was moved or deleted since it was opened; put it back, or open it where it is now"
    )


def _timeout(path: Path, locked: Path) -> TimeoutError:
    holder = _holder(locked)
    who = "another process" if holder is None else f"process {holder}"
    return TimeoutError(
        f"the edit store {path} has been locked by {who} for {PATIENCE:.0f} seconds; wait until it has written, or "
        "end it if it hangs. Nothing was changed"
    )


def _holder(locked: Path) -> str | None:
    """Return the id and name of the process that holds a file's lock, where Linux tells."""
    try:
        inode = os.stat(locked).st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE <pid> <device>:<inode> 0 EOF
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
                name = Path(f"/proc/{words[4]}/comm").read_text().strip()
                return f"{words[4]} ({name})"
    except (OSError, IndexError):
        pass
    return None
