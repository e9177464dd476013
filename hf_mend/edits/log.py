"""
The records of an edit store's file: framed, numbered and checksummed.

    file    = "hf_mend\\n" record*
    record  = kind (4) | number (4) | length (8) | crc of the payload (4) | crc of these 20 bytes (4) | payload

A record begins at a multiple of 8 bytes, so that tensors in it are aligned; zeros fill the gaps.

Integers are little-endian, checksums CRC-32. The frame has a checksum of its own, so that an altered length does not
pass for the end of the file, nor the record after it for lost. A process that is killed while it appends leaves a
tail, part of a frame or a frame with part of its payload, which readers leave out and the next writer cuts off.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


MAGIC = b"hf_mend\n"
EDIT, NOTE = b"EDIT", b"NOTE"
_FRAME = struct.Struct("<4sIQII")
_KINDS = (EDIT, NOTE)
_ALIGNMENT = 8


@dataclass(frozen=True)
class Record:
    """
    A record of the file.

    Args:
        kind (`bytes`): `EDIT` or `NOTE`.
        number (`int`): Index among the records, from 0.
        end (`int`): Offset of the next record in the file, in bytes.
        payload (`memoryview`): The content, a view of the buffer that was scanned.
        where (`str`): The record's name in messages.
    """

    kind: bytes
    number: int
    end: int
    payload: memoryview
    where: str


def framed(kind: bytes, number: int, payload: bytes) -> bytes:
    """Frame a record as the file stores it."""
    head = _FRAME.pack(kind, number, len(payload), zlib.crc32(payload), 0)[:-4]
    return b"".join([head, struct.pack("<I", zlib.crc32(head)), payload, bytes(-len(payload) % _ALIGNMENT)])


def scan(buffer: memoryview, path: str | Path, base: int = 0, number: int = 0) -> Iterator[Record]:
    """
    Yield the whole records of a store, from its beginning or a later place. A torn one at the end is left out.

    Args:
        buffer (`memoryview`): The file from byte `base` on.
        path (`str` or `Path`): The file's path, for messages.
        base (`int`, defaults to 0): 0, or a record's end.
        number (`int`, defaults to 0): The number of the record there.

    Raises:
        ValueError: It is not a store, or a record was altered; the message names it and its place.
    """
    size, start = len(buffer), 0
    if base == 0:
        if buffer[: len(MAGIC)] != MAGIC[:size]:
            raise ValueError(f"{path} is not an edit store; give the path of one, or of a file that is not there yet")
        start = len(MAGIC)
    while size - start >= _FRAME.size:
        where = f"{path}, record {number} at byte {base + start}"
        frame = buffer[start : start + _FRAME.size]
        kind, found, length, checksum, own = _FRAME.unpack(frame)
        if zlib.crc32(frame[:-4]) != own or kind not in _KINDS or found != number:
            if not bytes(buffer[start:]).strip(b"\0"):
                return  # room that the file system had made for bytes that were never written
            raise ValueError(
                f"{where}: its frame was altered, so that what follows cannot be read; restore the file from a copy"
            )
        start += _FRAME.size
        payload = buffer[start : start + length]
        if len(payload) < length:
            return
        if zlib.crc32(payload) != checksum:
            raise ValueError(
                f"{where}: its {length} bytes do not fit their checksum, so they were altered or the disk is damaged; "
                "restore the file from a copy"
            )
        start += length + -length % _ALIGNMENT
        yield Record(kind, number, base + start, payload, where)
        number += 1
