"""
A store of edits on disk: one file that only grows, for edits that are to stay for years.

Each edit is a record that holds its text, time, editor and state, and its factors as safetensors; disabling, enabling
and undoing are small records after it. That a second edit of a prompt supersedes the first follows from their order
(see [`~hf_mend.edits.edit.active_edits`]). [`~hf_mend.edits.log`] frames the records, and
[`~hf_mend.edits.packing`] writes the edits in them.
"""

from __future__ import annotations

import json
import mmap
import os
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any, BinaryIO

from ..data.deprecation import renamed_method
from ..hub.atomic import flush_folder, replaced_file
from ..hub.files import read_json_object, shortened
from .collection import Edits, check_apart, check_known, with_enabled
from .edit import Edit
from .edits_file import has_edits
from .log import COMMIT_SIZE, EDIT, FORMAT, MAGIC, NOTE, VERSION, Framer, Place, Record, framed, read_head, scan
from .packing import packed, uncollected, unpacked
from .store_lock import locked_file, moved


_CHANGES = ("undo", "off", "on")  # the words of a note, each with a list of ids
_SMALL = 16 << 20  # largest number of new bytes that are read, not mapped


class EditStore:
    """
    Edits in a file that only grows.

    Several processes may append to it at the same time, by any of the file's names: a lock puts them in a row, and
    none loses an edit. A call is in the file whole or not at all, also if the process is killed or the power fails;
    readers leave out what such a call has left, and the next writer cuts it off. Each call is on the disk when it
    returns. Several threads may use one object.

    An object has the edits that the file held when it last read or appended; [`~EditStore.refresh`] reads the newer
    ones. The factors stay in the file, memory-mapped, until something computes with them; nothing but a store may
    write to it meanwhile.

    Args:
        path (`str` or `Path`): The file; the first append creates it where it does not exist. A relative path is that
            of the working directory at this moment.
        base_fingerprint (`dict`, *optional*): The fingerprint of the base model that the edits are for, as
            [`~hf_mend.bases.fingerprint.fingerprint_of`] gives it. A new file gets it; one that exists has its own.
        check_base (`Callable`, *optional*): Called with the file's own fingerprint before anything is appended to a
            file that another process has put there since; raises if it is another base's. By default such a
            fingerprint has to be equal to `base_fingerprint`.

    Raises:
        IsADirectoryError: The path is a folder's.
        ValueError: The file is no store, or a record was altered; the message names the record and its place.
    """

    def __init__(
        self,
        path: str | Path,
        base_fingerprint: dict[str, Any] | None = None,
        check_base: Callable[[Any], None] | None = None,
    ):
        self.path = Path(os.path.abspath(path))
        _check_is_no_folder(self.path)
        self._own_base, self._check_base = base_fingerprint, check_base
        self._alone = RLock()  # one thread at a time
        self._seen = _Seen(base_fingerprint)
        self.refresh()
        self._accepted = self._seen.start  # of the file whose base is not checked again

    def __len__(self) -> int:
        return len(self._seen.edits)

    @property
    def base_fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of the base model that the edits are for."""
        return self._seen.base_fingerprint

    @property
    def edits(self) -> Edits:
        """The edits, oldest first, without those that were undone."""
        return Edits(list(self._seen.edits.values()))

    def refresh(self) -> Edits:
        """
        Read the records appended since the last look, here or by other processes.

        Raises:
            FileNotFoundError: The file was moved or deleted; the edits read before stay.
            ValueError: A record was altered; the edits read before stay.
        """
        with self._alone:
            if self._seen.start or self.path.exists():
                self._look()
            return self.edits

    def append(self, edits: Sequence[Edit]) -> None:
        """
        Add edits. An edit whose id is there already replaces the earlier one, in its place.

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

        def check(seen: _Seen) -> None:
            edits = list(seen.edits.values())
            check_known(edits, ids)
            check_apart(edits, set(ids))

        self._append(check=check, undo=list(ids))

    def disable_edit(self, ids: Sequence[str]) -> None:
        """Disable edits, with the errors of [`EditableModel.disable_edit`]."""
        self._append(check=lambda seen: with_enabled([*seen.edits.values()], ids, False), off=list(ids))

    def enable_edit(self, ids: Sequence[str]) -> None:
        """Enable edits again, with the errors of [`EditableModel.enable_edit`]."""
        self._append(check=lambda seen: with_enabled([*seen.edits.values()], ids, True), on=list(ids))

    turn_off = renamed_method("turn_off", "disable_edit")
    turn_on = renamed_method("turn_on", "enable_edit")

    def follow(self, before: Sequence[Edit], after: Sequence[Edit]) -> None:
        """
        Append the differences between two states of a model's edits. Records of other processes stay.

        Args:
            before, after (`Sequence[Edit]`): The model's edits in the two states.

        Raises:
            ValueError: Another process has undone an edit whose scope is changed or that a new one was compressed
                from, or has compressed one that is undone or changed here; nothing is appended.
        """
        earlier, now = {edit.id: edit for edit in before}, {edit.id: edit for edit in after}
        # An edit whose scope was changed is written again.
        new = [edit for edit in after if edit.id not in earlier or edit.scope is not earlier[edit.id].scope]
        gone = [one for one in earlier if one not in now]
        changed = [edit for edit in after if edit.id in earlier and edit.enabled != earlier[edit.id].enabled]
        touched = {*gone, *(edit.id for edit in changed)}
        # New ones first: an edit that one of them replaces does not go before it is there.
        self._append(
            new,
            check=lambda seen: self._check_parts(seen, new, earlier, touched),
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
        with self._alone:
            if not self._seen.start and not self.path.exists():
                return 0
            with locked_file(self._file, create=False) as old:
                if os.fstat(old.fileno()).st_nlink > 1:
                    raise ValueError(
                        f"{self.path} has other names, hard links, which would keep the old content; compact a copy "
                        "of it, and put that in the place of all"
                    )
                self._catch_up()
                size, accepted = os.fstat(old.fileno()).st_size, self._accepted == self._seen.start
                with replaced_file(self._file) as work, open(work, "wb") as file:
                    framer = Framer(Place(end=len(MAGIC)))
                    file.write(MAGIC + framer.frame(NOTE, self._head()))
                    for edit in self._seen.edits.values():
                        file.write(framer.frame(EDIT, packed(edit)))
                    file.write(framer.commit())
                self._catch_up()
                self._accepted = self._seen.start if accepted else self._accepted
            return size - self._file.stat().st_size

    # ---- reading ----

    @property
    def _file(self) -> Path:
        """The file itself, where the path is a symbolic link."""
        return Path(os.path.realpath(self.path))

    def _look(self) -> None:
        """Read what is new, without the lock unless what is seen makes no sense: a writer may be at work."""
        try:
            self._catch_up()
        except ValueError as error:
            try:
                with locked_file(self._file, create=False):
                    self._catch_up()
            except OSError:  # where only reading is allowed
                raise error from None

    def _catch_up(self) -> None:
        """Read what is new, or leave everything as it was."""
        seen = self._seen
        with self._opened() as file:
            # Another one after compaction, or when a copy was put in its place.
            whole = os.fstat(file.fileno()).st_size >= seen.place.end
            same = bool(seen.start) and whole and file.read(len(seen.start)) == seen.start
            known = seen if same else _Seen(self._own_base)
            records, place = scan(file, self.path, known.place)
            if seen.start and not place.end:
                raise ValueError(f"{self.path} is empty, and was a store when it was opened; restore it from a copy")
            if records:
                known = known.copy()
                buffer, base = _buffer(file, known.place.end, place.end)
                with uncollected():
                    for record in records:
                        first = record.start - base
                        known.take(record, buffer[first : first + record.length])
            self._seen = replace(known, place=place)

    def _opened(self) -> BinaryIO:
        try:
            return open(self._file, "rb")
        except FileNotFoundError as error:
            raise moved(self.path) from error

    # ---- writing ----

    def _append(
        self, edits: Sequence[Edit] = (), check: Callable[[_Seen], object] | None = None, **note: list[str]
    ) -> None:
        """Append edits, then a note of changes, if a check of what the file holds by then does not raise."""
        changes = {word: ids for word, ids in note.items() if ids}
        if not edits and not changes:
            return
        with self._alone, locked_file(self._file, create=not self._seen.start) as file:
            self._catch_up()
            self._check_file()
            if check is not None:
                check(self._seen)
            known = self._seen.copy()
            for edit in edits:
                known.add(edit)
            known.change(changes)
            try:
                known.place = self._write(file, known, edits, changes)
                if not self._seen.start:
                    flush_folder(self._file.parent)
                self._accepted = known.start
                self._seen = known  # here it has happened
            except BaseException:
                file.truncate(self._seen.place.end)
                raise

    def _write(self, file: BinaryIO, known: _Seen, edits: Sequence[Edit], changes: dict[str, list[str]]) -> Place:
        """Write a group of records and, once they are on the disk, its commit."""
        place = known.place
        file.truncate(place.end)
        file.seek(place.end)
        if known.start and not place.in_groups:  # of version 1: what it holds is committed first
            place = _committed(file, Framer(place))
            known.place = place
        framer = Framer(place if known.start else Place(end=len(MAGIC)))
        if not known.start:
            known.start = MAGIC + framer.frame(NOTE, self._head())
            _write(file, known.start)
        for edit in edits:
            _write(file, framer.frame(EDIT, packed(edit)))
        if changes:
            _write(file, framer.frame(NOTE, _encoded(changes)))
        return _committed(file, framer)

    def _head(self) -> bytes:
        head = {"format": FORMAT, "version": VERSION, "base_fingerprint": self.base_fingerprint}
        return _encoded({**head, "file": uuid.uuid4().hex})

    def _check_file(self) -> None:
        """Refuse a file of another base that has come into the place of the one that was opened, or of none."""
        start, theirs = self._seen.start, self._seen.base_fingerprint
        if not start or start == self._accepted:
            return
        if self._check_base is not None:
            self._check_base(theirs)
        elif None not in (theirs, self._own_base) and theirs != self._own_base:
            raise ValueError(
                f"{self.path} was made by another process since it was opened here, for another base model; use "
                "another path for this one"
            )

    def _check_parts(
        self, seen: _Seen, new: Sequence[Edit], earlier: Collection[str], touched: Collection[str]
    ) -> None:
        rewritten = [edit.id for edit in new if edit.id in earlier and edit.id not in seen.edits]
        if rewritten:
            raise ValueError(
                f"{self.path}: another process has undone the edits {shortened(rewritten)}, whose scope would be "
                "changed; close the store and open it again, which leaves them out"
            )
        for edit in new:
            lost = [one for one in edit.replaces if one in earlier and one not in seen.edits]
            if lost:
                raise ValueError(
                    f"{self.path}: another process has undone the edits {shortened(lost)}, which are in the "
                    "compressed edit; close the store, open it again and compress anew"
                )
        for whole in seen.wholes.keys() - touched:
            parts = [one for one in seen.wholes[whole] if one in touched and one in seen.edits]
            if parts:
                raise ValueError(
                    f"{self.path}: another process has compressed the edits {shortened(parts)} into {whole!r}, which "
                    "would not change with them; close the store and open it again to undo that one first"
                )


@dataclass
class _Seen:
    """What an object has seen of its file."""

    base_fingerprint: dict[str, Any] | None
    start: bytes = b""  # the file's first bytes, which no other has
    place: Place = Place()  # behind the last commit
    edits: dict[str, Edit] = field(default_factory=dict)
    wholes: dict[str, list[str]] = field(default_factory=dict)  # id of an edit that replaces others -> theirs

    def copy(self) -> _Seen:
        return replace(self, edits=dict(self.edits), wholes=dict(self.wholes))

    def take(self, record: Record, payload: memoryview) -> None:
        if record.kind == EDIT:
            self.add(unpacked(payload, record.where))
            return
        if record.number == 0:
            self.start = MAGIC + framed(record.kind, 0, bytes(payload))
            self.base_fingerprint = read_head(bytes(payload), record.where).get("base_fingerprint")
            return
        note = read_json_object(bytes(payload).decode("utf-8", "replace"), record.where)
        for word in _CHANGES:
            ids = note.get(word, [])
            if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
                raise ValueError(
                    f"{record.where} says {shortened(note)}, expected lists of ids; restore the file from a copy"
                )
        self.change(note)

    def add(self, edit: Edit) -> None:
        self.edits[edit.id] = edit  # in the place of an earlier one of its id: of a prompt's edits the last acts
        if edit.replaces:
            self.wholes[edit.id] = edit.replaces

    def change(self, note: dict[str, list[str]]) -> None:
        gone = set(note.get("undo", []))
        required = set()
        if any(one in self.edits and self.edits[one].is_base_delta for one in gone):
            # Another process's edit may require the base delta that went with the last edit here.
            required = {edit.requires for edit in self.edits.values() if edit.id not in gone}
        for word in _CHANGES:
            for one in note.get(word, []):
                if one not in self.edits:  # another process has undone it too
                    continue
                if word != "undo":
                    self.edits[one] = replace(self.edits[one], enabled=word == "on")
                elif one not in required:
                    del self.edits[one]
                    self.wholes.pop(one, None)


def _check_is_no_folder(path: Path) -> None:
    """
    Raises:
        IsADirectoryError: The path is a folder's.
    """
    if not path.is_dir():
        return
    saved = f"; the edits that save_edits wrote into {path} are for load_edits" if has_edits(path) else ""
    raise IsADirectoryError(
        f"{path} is a folder, and a store of edits is one file; give the file's path, such as "
        f"{path / 'corrections.store'}{saved}"
    )


def _buffer(file: BinaryIO, start: int, end: int) -> tuple[memoryview, int]:
    """Return committed bytes of the file, which nobody cuts off, and the place where they begin."""
    if end - start <= _SMALL:
        file.seek(start)
        return memoryview(bytearray(file.read(end - start))), start
    base = start - start % mmap.ALLOCATIONGRANULARITY
    # A copy of its own for whoever writes to it.
    return memoryview(mmap.mmap(file.fileno(), end - base, offset=base, access=mmap.ACCESS_COPY)), base


def _committed(file: BinaryIO, framer: Framer) -> Place:
    """Put what was written on the disk, with room for its commit, and then the commit."""
    start = framer.place.end
    _write(file, bytes(COMMIT_SIZE))
    os.fsync(file.fileno())
    file.seek(start)
    _write(file, framer.commit())
    os.fsync(file.fileno())
    return framer.place


def _encoded(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8")


def _write(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
