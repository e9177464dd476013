"""
A store of edits on disk: one file that only grows, for edits that are to stay for years.

Each edit is a record that holds its text, time, editor and state, and its factors as safetensors; disabling, enabling
and undoing are small records after it. That a second edit of a prompt supersedes the first follows from their order
(see [`~hf_mend.edits.edit.active_edits`]). [`~hf_mend.edits.log`] frames the records.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock
from safetensors.torch import save

from ..data.deprecation import renamed_method
from ..hub.atomic import replaced_file
from ..hub.files import DTYPES, check_entries, header_size, read_header, read_json_object, shortened
from .collection import Edits, check_apart, check_known, with_enabled
from .edit import Edit, is_description
from .log import EDIT, MAGIC, NOTE, Record, framed, scan
from .low_rank import Update


_FORMAT, _VERSION = "hf_mend edit store", 1
_CHANGES = ("undo", "off", "on")  # the words of a note, each with a list of ids
_SMALL = 16 << 20  # largest number of new bytes that are read, not mapped


class EditStore:
    """
    Edits in a file that only grows.

    Several processes may append to it at the same time: a lock beside the file, `<path>.lock`, puts them in a row, and
    none loses an edit. A process that is killed while it appends leaves the records before whole; readers leave out
    the torn one, and the next writer cuts it off. Each append is on the disk when it returns.

    An object has the edits that the file held when it last read or appended; [`~EditStore.refresh`] reads the newer
    ones. The factors stay in the file, memory-mapped, until something computes with them; nothing but a store may
    write to it meanwhile.

    Args:
        path (`str` or `Path`): The file; the first append creates it where it does not exist.
        base_fingerprint (`dict`, *optional*): The fingerprint of the base model that the edits are for, as
            [`~hf_mend.bases.fingerprint.fingerprint_of`] gives it. A new file gets it; one that exists has its own.

    Raises:
        ValueError: The file is no store, or a record was altered; the message names the record and its place.
    """

    def __init__(self, path: str | Path, base_fingerprint: dict[str, Any] | None = None):
        self.path = Path(path)
        self.base_fingerprint = base_fingerprint
        self._lock = FileLock(f"{self.path}.lock")
        self._edits: dict[str, Edit] = {}
        self._start = b""  # the file's first bytes, which no other has
        self._end = self._number = 0  # end and number of the records that were read
        self.refresh()

    def __len__(self) -> int:
        return len(self._edits)

    @property
    def edits(self) -> Edits:
        """The edits, oldest first, without those that were undone."""
        return Edits(list(self._edits.values()))

    def refresh(self) -> Edits:
        """
        Read the records appended since the last look, here or by other processes.

        Raises:
            ValueError: A record was altered; the edits read before stay.
        """
        before = (self._start, self._end, self._number, dict(self._edits), self.base_fingerprint)
        try:
            if self.path.exists():
                with open(self.path, "rb") as file:
                    self._read(file)
            else:
                self._forget()
        except BaseException:
            self._start, self._end, self._number, self._edits, self.base_fingerprint = before
            raise
        return self.edits

    def append(self, edits: Sequence[Edit]) -> None:
        """
        Add edits. An edit whose id is there already replaces the earlier one, and becomes the last.

        Raises:
            OSError: They could not be written; the file is as it was.
        """
        self._append(edits)

    def undo(self, ids: Sequence[str]) -> None:
        """
        Take back edits: they stay in the file until [`~EditStore.compact`], and are no longer among
        [`~EditStore.edits`].

        Raises:
            KeyError: An id is not among the edits.
            ValueError: An edit is part of a compressed one that stays, or the base delta of one.
        """
        edits = self.refresh()
        check_known(edits, ids)
        check_apart(edits, set(ids))
        self._append(undo=list(ids))

    def disable_edit(self, ids: Sequence[str]) -> None:
        """Disable edits, with the errors of [`EditableModel.disable_edit`]."""
        with_enabled(self.refresh(), ids, False)
        self._append(off=list(ids))

    def enable_edit(self, ids: Sequence[str]) -> None:
        """Enable edits again, with the errors of [`EditableModel.enable_edit`]."""
        with_enabled(self.refresh(), ids, True)
        self._append(on=list(ids))

    turn_off = renamed_method("turn_off", "disable_edit")
    turn_on = renamed_method("turn_on", "enable_edit")

    def follow(self, before: Sequence[Edit], after: Sequence[Edit]) -> None:
        """
        Append the differences between two states of a model's edits. Records of other processes stay.

        Args:
            before, after (`Sequence[Edit]`): The model's edits in the two states.
        """
        earlier, now = {edit.id: edit for edit in before}, {edit.id: edit for edit in after}
        # An edit whose scope was changed is written again.
        new = [edit for edit in after if edit.id not in earlier or edit.scope is not earlier[edit.id].scope]
        gone = [one for one in earlier if one not in now]
        changed = [edit for edit in after if edit.id in earlier and edit.enabled != earlier[edit.id].enabled]
        # New ones first: an edit that one of them replaces does not go before it is there.
        self._append(
            new,
            undo=gone,
            off=[edit.id for edit in changed if not edit.enabled],
            on=[edit.id for edit in changed if edit.enabled],
        )

    def compact(self) -> int:
        """
        Write the file anew without the edits that were undone, in one step: a process killed at any point leaves the
        old file or the new one.

        Returns:
            `int`: The number of bytes saved.
        """
        with self._locked():
            edits = self.refresh()
            if not self.path.exists():
                return 0
            old = self.path.stat().st_size
            with replaced_file(self.path) as work, open(work, "wb") as file:
                file.write(MAGIC + self._head())
                for number, edit in enumerate(edits, start=1):
                    file.write(framed(EDIT, number, _packed(edit)))
            _flush_folder(self.path.parent)
            self.refresh()
            return old - self.path.stat().st_size

    # ---- reading ----

    def _read(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        # Compacted, put in its place by hand, or cut.
        if not self._start or file.read(len(self._start)) != self._start or size < self._end:
            self._forget()
        if size <= self._end:
            return
        if size - self._end > _SMALL:
            base = self._end - self._end % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(file.fileno(), 0, offset=base, access=mmap.ACCESS_COPY)  # written to by nobody
            buffer = memoryview(mapped)[self._end - base :]
        else:
            file.seek(self._end)
            buffer = memoryview(bytearray(file.read()))
        for record in scan(buffer, self.path, self._end, self._number):
            if record.number == 0:
                self._start = MAGIC + framed(record.kind, 0, bytes(record.payload))
            self._take(record)
            self._end, self._number = record.end, record.number + 1

    def _take(self, record: Record) -> None:
        if record.kind == EDIT and record.number > 0:
            self._add(_unpacked(record))
            return
        note = read_json_object(bytes(record.payload).decode("utf-8", "replace"), record.where)
        if record.number == 0:
            if note.get("format") != _FORMAT or note.get("version") != _VERSION:
                raise ValueError(
                    f"{record.where} says {shortened(note)}, expected version {_VERSION} of an edit store; update "
                    "hf_mend if the file is newer"
                )
            self.base_fingerprint = note.get("base_fingerprint")
            return
        for word in _CHANGES:
            ids = note.get(word, [])
            if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
                raise ValueError(
                    f"{record.where} says {shortened(note)}, expected lists of ids; restore the file from a copy"
                )
        self._change(note)

    def _add(self, edit: Edit) -> None:
        self._edits.pop(edit.id, None)
        self._edits[edit.id] = edit

    def _change(self, note: dict[str, list[str]]) -> None:
        gone = set(note.get("undo", []))
        # Another process's edit may require the base delta that went with the last edit here.
        required = {edit.requires for edit in self._edits.values() if edit.id not in gone}
        for word in _CHANGES:
            for one in note.get(word, []):
                if one not in self._edits:  # another process has undone it too
                    continue
                if word != "undo":
                    self._edits[one] = replace(self._edits[one], enabled=word == "on")
                elif one not in required:
                    del self._edits[one]

    # ---- writing ----

    def _append(self, edits: Sequence[Edit] = (), **note: list[str]) -> None:
        """Append edits, then a note of changes."""
        changes = {word: ids for word, ids in note.items() if ids}
        if not edits and not changes:
            return
        with self._locked():
            self.refresh()  # to the end of the last whole record
            start, number = self._start, self._number
            with open(self.path, "ab", buffering=0) as file:
                file.truncate(self._end)
                try:
                    if not start:
                        start, number = MAGIC + self._head(), 1
                        _write(file, start)
                    for edit in edits:
                        _write(file, framed(EDIT, number, _packed(edit)))
                        number += 1
                    if changes:
                        _write(file, framed(NOTE, number, _encoded(changes)))
                        number += 1
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(self._end)
                    raise
                self._end = os.fstat(file.fileno()).st_size
            if not self._start:
                _flush_folder(self.path.parent)
            self._start, self._number = start, number
            for edit in edits:
                self._add(edit)
            self._change(changes)

    def _head(self) -> bytes:
        head = {"format": _FORMAT, "version": _VERSION, "base_fingerprint": self.base_fingerprint}
        return framed(NOTE, 0, _encoded({**head, "file": uuid.uuid4().hex}))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            yield

    def _forget(self) -> None:
        self._edits, self._start, self._end, self._number = {}, b"", 0, 0


def _encoded(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8")


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _packed(edit: Edit) -> bytes:
    """Encode an edit as safetensors: `<layer>.u` and `<layer>.v`, and the description in the header."""
    tensors = {
        f"{name}.{side}": tensor.detach().to("cpu").contiguous()
        for name, pair in edit.pairs().items()
        for side, tensor in zip("uv", pair, strict=True)
    }
    return save(tensors, metadata={"edit": json.dumps(edit.describe(), ensure_ascii=False)})


def _unpacked(record: Record) -> Edit:
    """Decode the edit of a record, its factors views of the record's payload."""
    payload, where = record.payload, record.where
    end = 8 + header_size(bytes(payload[:8]), len(payload), where)
    metadata, header = read_header(bytes(payload[8:end]), where)
    check_entries(header, where)
    described = read_json_object(metadata.get("edit", "null"), where)
    if not is_description(described):
        raise ValueError(f"{where}: {shortened(described)} does not describe an edit; restore the file from a copy")
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _views(payload[end:], header, where).items():
        layer, _, side = name.rpartition(".")
        if side not in ("u", "v") or tensor.dim() != 2:
            raise ValueError(
                f"{where}: it holds {shortened(name)} of shape {tuple(tensor.shape)}, expected factors u and v"
            )
        if tensor.numel() and not all(map(math.isfinite, map(float, tensor.aminmax()))):  # in one pass, without a copy
            raise ValueError(f"{where}: {name} holds NaN or infinity; restore the file from a copy")
        sides.setdefault(layer, {})[side] = tensor
    updates: dict[str, Update] = {}
    for layer, pair in sides.items():
        if len(pair) != 2 or len(pair["u"]) != len(pair["v"]):
            raise ValueError(f"{where}: the factors of {shortened(layer)} are no pair; restore the file from a copy")
        updates[layer] = (pair["u"], pair["v"])
    return Edit.from_file(described, updates, where)


def _views(body: memoryview, header: dict[str, Any], where: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors header as views of its body, which safetensors itself would copy."""
    tensors, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            if first != end or last > len(body):
                raise ValueError(f"{name} does not begin where the tensor before it ends, or ends outside")
            values, dtype, end = body[first:last], DTYPES[entry["dtype"]], last
            flat = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
        if end != len(body):
            raise ValueError(f"its tensors take {end} bytes of {len(body)}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} is not a whole safetensors file ({error}); restore the file from a copy") from error
    return tensors


def _flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system lets folders be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
