"""
The records of an edit store's file: framed, numbered, checksummed, and committed in groups.

    file    = "hf_mend\\n" group*
    group   = record* commit
    record  = kind (4) | number (4) | length (8) | crc of the payload (4) | crc of these 20 bytes (4) | payload

A record begins at a multiple of 8 bytes, so that tensors in it are aligned; zeros fill the gaps. Integers are
little-endian, checksums CRC-32. The frame has a checksum of its own, so that an altered length does not pass for the
end of the file, nor the record after it for lost.

The records of one call are a group, and its commit is a record whose payload is a SHA-256 over all frames before it,
chained: it says that the group, and no other, is whole. A writer puts the records and room for the commit on the disk
first, and then the commit into its room. What follows the last commit is therefore what nobody was promised: readers
leave it out and the next writer cuts it off, whatever a killed process or a power failure has left there. A commit
that is there with anything before it altered is damage, and so is a commit that is not what it must be.

In a file of version 1 (release 0.1.0) each record stands for itself until the first commit.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..hub.files import STORE_MAGIC as MAGIC
from ..hub.files import read_json_object, shortened


EDIT, NOTE, COMMIT = b"EDIT", b"NOTE", b"DONE"
FORMAT, VERSION = "hf_mend edit store", 2

_FRAME = struct.Struct("<4sIQII")
_ALIGNMENT = 8
_DIGEST = 32
COMMIT_SIZE = _FRAME.size + _DIGEST
_SECTOR = 512  # what a disk writes whole or not at all
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Record:
    """
    A record of the file.

    Args:
        kind (`bytes`): `EDIT` or `NOTE`.
        number (`int`): Index among the records, from 0.
        start, length (`int`): Where its payload lies in the file, in bytes.
        where (`str`): The record's name in messages.
    """

    kind: bytes
    number: int
    start: int
    length: int
    where: str


@dataclass(frozen=True)
class Place:
    """
    A place in the file behind a commit, or at its beginning.

    Args:
        end (`int`): Offset of the next record, in bytes.
        number (`int`): The number that it will have.
        chain (`bytes`): SHA-256 over the frames before it.
        in_groups (`bool`): Whether records count only with a commit after them.
    """

    end: int = 0
    number: int = 0
    chain: bytes = bytes(_DIGEST)
    in_groups: bool = True


class Framer:
    """
    Frames records one after another, from a place on.

    Args:
        place ([`Place`]): The place.
    """

    def __init__(self, place: Place):
        self.place = place

    def frame(self, kind: bytes, payload: bytes) -> bytes:
        """Return a record as the file stores it."""
        data = framed(kind, self.place.number, payload)
        self.place = _after(self.place, data[: _FRAME.size], len(data))
        return data

    def commit(self) -> bytes:
        """Return the commit of the records so far."""
        return self.frame(COMMIT, self.place.chain)


def framed(kind: bytes, number: int, payload: bytes) -> bytes:
    """Frame a record as the file stores it."""
    head = _FRAME.pack(kind, number, len(payload), zlib.crc32(payload), 0)[:-4]
    return b"".join([head, struct.pack("<I", zlib.crc32(head)), payload, bytes(-len(payload) % _ALIGNMENT)])


def scan(file: BinaryIO, path: str | Path, place: Place) -> tuple[list[Record], Place]:
    """
    Read and check the frames and payloads from a place on, and return the committed records and the place behind them.

    Args:
        file (`BinaryIO`): The file. It is read, not mapped: a writer may cut its tail meanwhile.
        path (`str` or `Path`): The file's path, for messages.
        place ([`Place`]): Where to begin.

    Raises:
        ValueError: It is not a store, or what was committed has been altered; the message names the record and its
            place.
    """
    size = os.fstat(file.fileno()).st_size
    if place.end == 0:
        file.seek(0)
        magic = file.read(len(MAGIC))
        if magic != MAGIC[: len(magic)] and not _Rest(file, size, 0).is_zero():
            raise ValueError(f"{path} is not an edit store; give the path of one, or of a file that is not there yet")
        if magic != MAGIC:
            return [], place
        here = replace(place, end=len(MAGIC))
    else:
        here = place
    found: list[Record] = []
    count = 0  # of the records found that count
    while size - here.end >= _FRAME.size:
        where = f"{path}, record {here.number} at byte {here.end}"
        record, after, fault = _next(file, size, here, where)
        if record is None or after is None:
            if _is_torn(file, size, place, here):
                break
            raise ValueError(fault)
        if record.kind == COMMIT:
            place, count = replace(after, in_groups=True), len(found)
            here = place
            continue
        if record.number == 0:
            after = replace(after, in_groups=_head_of(file, record)["version"] > 1)
        found.append(record)
        here = after
        if not here.in_groups:
            place, count = here, len(found)
    else:
        _check_short_tail(file, size, here, path)
    return found[:count], place


def read_head(payload: bytes, where: str) -> dict[str, Any]:
    """
    Parse the first record.

    Raises:
        ValueError: It is not that of a store that this version can read.
    """
    head = read_json_object(payload.decode("utf-8", "replace"), where)
    version = head.get("version")
    if head.get("format") != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"{where} says {shortened(head)}, expected version 1 to {VERSION} of an edit store; update hf_mend if the "
            "file is newer"
        )
    return head


def _head_of(file: BinaryIO, record: Record) -> dict[str, Any]:
    if record.kind != NOTE:
        raise ValueError(f"{record.where} is not the head of an edit store; restore the file from a copy")
    file.seek(record.start)
    return read_head(file.read(record.length), record.where)


def _next(file: BinaryIO, size: int, here: Place, where: str) -> tuple[Record | None, Place | None, str]:
    """Return the record at a place and the place behind it, or the fault that stands there."""
    file.seek(here.end)
    frame = file.read(_FRAME.size)
    if not _is_frame(frame) or _FRAME.unpack(frame)[1] != here.number:
        fault = f"{where}: its frame was altered, so that what follows cannot be read; restore the file from a copy"
        return None, None, fault
    kind, number, length, checksum, _ = _FRAME.unpack(frame)
    start = here.end + _FRAME.size
    if length > size - start:
        return None, None, f"{where}: {size - start} of its {length} bytes are there; restore the file from a copy"
    actual, left, payload = 0, length, b""
    while left and (payload := file.read(min(left, _CHUNK))):
        actual, left = zlib.crc32(payload, actual), left - len(payload)
    if left or actual != checksum:
        return (
            None,
            None,
            f"{where}: its {length} bytes do not fit their checksum, so they were altered or the disk is damaged; "
            "restore the file from a copy",
        )
    if kind == COMMIT and payload != here.chain:
        return None, None, f"{where}: the records before it are not those that it was written for; restore the file"
    after = _after(here, frame, _FRAME.size + length + -length % _ALIGNMENT)
    return Record(kind, number, start, length, where), after, ""


def _after(place: Place, frame: bytes, size: int) -> Place:
    chain = hashlib.sha256(place.chain + frame).digest()
    return Place(place.end + size, place.number + 1, chain, place.in_groups)


def _is_frame(frame: bytes) -> bool:
    return (
        len(frame) == _FRAME.size
        and frame[:4] in (EDIT, NOTE, COMMIT)
        and zlib.crc32(frame[:-4]) == int.from_bytes(frame[-4:], "little")
    )


def _is_torn(file: BinaryIO, size: int, place: Place, here: Place) -> bool:
    """Whether the fault at `here` lies in what was written behind the last commit, at `place`, and never committed."""
    rest = _Rest(file, size, here.end)
    if rest.is_zero() or _is_half_a_commit(rest.start, here):
        return True
    if not here.in_groups or here.number == 0:  # the version is not known before the head; both end in a cut record
        frame = rest.start[: _FRAME.size]
        return _is_frame(frame) and size < here.end + _FRAME.size + _FRAME.unpack(frame)[2]
    if _has_commit(file, size, place.end):
        return False
    # No commit follows, so this is a record that was being written, unless it is the commit itself that was altered.
    head = rest.start[:8]
    begins = [kind + here.number.to_bytes(4, "little") for kind in (EDIT, NOTE)]
    first = rest.start[: _SECTOR - here.end % _SECTOR]
    return head in begins or not first.strip(b"\0")


class _Rest:
    """What follows a place in the file, of which the start is at hand."""

    def __init__(self, file: BinaryIO, size: int, place: int):
        self._file, self._size, self._place = file, size, place
        file.seek(place)
        self.start = file.read(_SECTOR)

    def is_zero(self) -> bool:
        self._file.seek(self._place)
        while chunk := self._file.read(_CHUNK):
            if chunk.strip(b"\0"):
                return False
        return True


def _is_half_a_commit(start: bytes, here: Place) -> bool:
    """
    Whether the commit that belongs at a place was being written into its room: each sector has its part or zeros.
    """
    expected = framed(COMMIT, here.number, here.chain)
    room = start[:COMMIT_SIZE]
    cut = _SECTOR - here.end % _SECTOR
    parts = [(room[:cut], expected[:cut]), (room[cut:], expected[cut:])]
    return len(room) == COMMIT_SIZE and all(mine == theirs or not mine.strip(b"\0") for mine, theirs in parts)


def _has_commit(file: BinaryIO, size: int, start: int) -> bool:
    """Whether a commit's frame stands anywhere from a place on, moved or not."""
    file.seek(start)
    kept = b""
    while chunk := file.read(_CHUNK):
        chunk = kept + chunk
        at = chunk.find(COMMIT)
        while at >= 0:
            if _is_frame(chunk[at : at + _FRAME.size]):
                return True
            at = chunk.find(COMMIT, at + 1)
        kept = chunk[-_FRAME.size + 1 :]
    return False


def _check_short_tail(file: BinaryIO, size: int, here: Place, path: str | Path) -> None:
    """A tail that is shorter than a frame is torn, unless it is what is left of a commit."""
    file.seek(here.end)
    tail = file.read(size - here.end)
    begins = [kind + here.number.to_bytes(4, "little") for kind in (EDIT, NOTE)]
    if here.in_groups and tail.strip(b"\0") and not any(one.startswith(tail[:8]) for one in begins):
        raise ValueError(
            f"{path}, record {here.number} at byte {here.end}: its frame was altered; restore the file from a copy"
        )
