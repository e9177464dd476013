"""What happens to a store's file: cut, zeroed, flipped, deleted and forged bytes, and what kills leave behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from support.append_to_store import small_edit
from support.edits import bits
from support.paths import TESTS

from hf_mend import Edit, EditStore
from hf_mend.edits.log import EDIT, MAGIC, Framer, Place, scan
from hf_mend.edits.packing import packed


OLD_STORE = TESTS / "fixtures" / "0.1.0" / "llama" / "edits.store"


def three(path: Path) -> tuple[bytes, int]:
    """A store of two calls, the second with two edits and an undo; the file and the place where that one begins."""
    store = EditStore(path)
    store.append([small_edit("a", 1, layers=1)])
    size = path.stat().st_size
    store.follow(store.edits, [small_edit("b", 2, layers=1), small_edit("c", 3, layers=1)])
    assert EditStore(path).edits.ids == ["b", "c"]
    return path.read_bytes(), size


def test_a_call_that_was_cut_at_any_byte_is_not_there(tmp_path):
    path = tmp_path / "store"
    data, size = three(path)
    room = len(data) - 56  # of the commit, which is on the disk before the commit itself
    for end in range(size, len(data)):
        path.write_bytes(data[:end] if end <= room else data[:room] + bytes(end - room))
        assert bits(EditStore(path).edits) == bits([small_edit("a", 1, layers=1)]), end
        if end % 7 == 0 or end < size + 30 or end > room - 9:
            EditStore(path).append([small_edit("d", 3)])
            assert bits(EditStore(path).edits) == bits([small_edit("a", 1, layers=1), small_edit("d", 3)])


def test_the_first_call_cut_at_any_byte(tmp_path):
    path = tmp_path / "store"
    EditStore(path, {"architecture": "Some"}).append([small_edit("a", layers=1)])
    data = path.read_bytes()
    for end in range(len(data) - 56):
        path.write_bytes(data[:end])
        assert len(EditStore(path)) == 0
        if end % 5 == 0 or end < 40:
            store = EditStore(path, {"architecture": "Some"})
            store.append([small_edit("b")])
            assert EditStore(path).edits.ids == ["b"] and EditStore(path).base_fingerprint == {"architecture": "Some"}


def test_what_a_power_failure_leaves_of_a_call(tmp_path):
    """Any sectors of what was not yet committed may be zeros, and the commit's own ones once its room is there."""
    path = tmp_path / "store"
    data, size = three(path)
    large, halves = [small_edit(f"l{i}", i, rank=20) for i in range(2)], 0
    for extra in range(0, 512, 56):  # the commit at different places within a sector
        path.write_bytes(data)
        EditStore(path).append([Edit("x" * extra, "p", "t", {}), *large])
        whole = path.read_bytes()
        room = len(whole) - 56
        sectors = range(len(data) // 512, len(whole) // 512 + 1)
        for lost in [[i] for i in sectors] + [list(sectors)[i:] for i in range(len(sectors))]:
            torn = bytearray(whole[:room] + bytes(56))
            for i in lost:
                first, last = max(512 * i, len(data)), min(512 * i + 512, len(torn))
                torn[first:last] = bytes(last - first)
            path.write_bytes(torn)
            assert EditStore(path).edits.ids == ["b", "c"], (extra, lost)
        edge = room + -room % 512
        if room < edge < len(whole):  # the commit lies in two sectors, of which one was written
            for torn in (whole[:edge] + bytes(len(whole) - edge), whole[:room] + bytes(edge - room) + whole[edge:]):
                path.write_bytes(torn)
                assert EditStore(path).edits.ids == ["b", "c"]
                halves += 1
    assert halves
    EditStore(path).append([small_edit("d")])
    assert EditStore(path).edits.ids == ["b", "c", "d"]


def test_every_flipped_byte_is_told_with_its_record(tmp_path):
    path = tmp_path / "store"
    data, second = three(path)
    expected = bits(EditStore(path).edits)
    told = 0
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        try:
            found = EditStore(path).edits
        except ValueError as error:
            told += 1
            assert str(path) in str(error) and (place < len(MAGIC) or "record" in str(error))
            if second <= place < second + 24:
                assert f"record 3 at byte {second}" in str(error)
        else:
            assert bits(found) == expected, "a filling byte"
    assert told >= len(data) - 6 * 7


def test_every_deleted_and_every_added_byte_is_told(tmp_path):
    path = tmp_path / "store"
    data, _ = three(path)
    expected = bits(EditStore(path).edits)
    for place in range(len(data)):
        added = [data[:place] + b"\1" + data[place:]] if place % 7 == 0 else []
        for altered in (data[:place] + data[place + 1 :], *added):
            path.write_bytes(altered)
            with pytest.raises(ValueError, match="store"):
                EditStore(path)
    path.write_bytes(data + bytes(5000))
    assert bits(EditStore(path).edits) == expected, "room that the file system had made"


def test_records_of_another_history_are_told(tmp_path):
    """Records that are whole, and numbered as they must be, but of another file."""
    path, other = tmp_path / "store", tmp_path / "other"
    data, size = three(path)
    shutil.copy(path, other)
    path.write_bytes(data[:size])
    EditStore(path).append([small_edit("d", 9)])
    grown = path.stat().st_size
    EditStore(path).append([small_edit("e", 9)])
    path.write_bytes(data[:size] + path.read_bytes()[grown:])
    with pytest.raises(ValueError, match=f"record 3 at byte {size}"):
        EditStore(path)
    EditStore(other).append([small_edit("f", 9)])
    last = other.read_bytes()[len(data) :]
    frames = bytearray(data)
    at = frames.index(b"NOTE", size)  # the undo within the second call, without its effect
    length = struct.unpack_from("<Q", frames, at + 8)[0]
    frames[at + 24 : at + 24 + length] = b'{"undo": ["%s"]}' % (b"z" * (length - 14))
    frames[at + 16 : at + 20] = struct.pack("<I", zlib.crc32(frames[at + 24 : at + 24 + length]))
    frames[at + 20 : at + 24] = struct.pack("<I", zlib.crc32(frames[at : at + 20]))
    other.write_bytes(bytes(frames) + last)
    with pytest.raises(ValueError, match="the records before it are not those that it was written for"):
        EditStore(other)


def test_a_damaged_store_is_not_appended_to(tmp_path):
    path = tmp_path / "store"
    store = EditStore(path)
    store.append([small_edit("a", 1)])
    store.append([small_edit("b", 2)])
    data = bytearray(path.read_bytes())
    data[-80] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="record 3 at byte [0-9]+: its [0-9]+ bytes do not fit their checksum"):
        EditStore(path)
    store._seen = EditStore(tmp_path / "none")._seen
    with pytest.raises(ValueError, match="checksum"):
        store.append([small_edit("c")])
    assert path.read_bytes() == data


def payload_of(body: bytes = bytes(16), **changes: Any) -> bytes:
    """A record's safetensors with a header that was altered: the factors of one layer, (1, 2) each."""
    entry = {"dtype": "F32", "shape": [1, 2]}
    entries = {"l.u": {**entry, "data_offsets": [0, 8]}, "l.v": {**entry, "data_offsets": [8, 16], **changes}}
    described = json.dumps(Edit("a", "p", "t", {}).describe())
    text = json.dumps({"__metadata__": {"edit": described}, **entries}).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "payload, message",
    [
        (payload_of(data_offsets=[0, 8]), "not a whole safetensors file .*does not begin where"),
        (payload_of(bytes(24), data_offsets=[16, 24]), "not a whole safetensors file .*does not begin where"),
        (payload_of(bytes(12)), "not a whole safetensors file .its tensors take 16 bytes of 12"),
        (payload_of(bytes(24)), "not a whole safetensors file .its tensors take 16 bytes of 24"),
        (payload_of(shape=[1, 3]), "not a whole safetensors file"),
        (payload_of(shape=[2**40, 2**40]), "not a whole safetensors file"),
        (payload_of(shape=[-1, 2]), "has the header"),
        (payload_of(dtype="I32"), "has dtype 'I32'"),
        (payload_of(data_offsets=[8]), "not a whole safetensors file"),
        (payload_of(data_offsets="8"), "not a whole safetensors file"),
        (payload_of(data_offsets=[8, 12]), "not a whole safetensors file"),
        (b"x", "not a whole safetensors file"),
        ((2**60).to_bytes(8, "little"), "not a whole safetensors file"),
        (packed(Edit("a", "p", "t", {"l": (torch.ones(1, 2), torch.ones(2, 2))})), "no pair"),
        (packed(Edit("a", "p", "t", {"l": (torch.ones(1, 2), torch.full((1, 2), float("nan")))})), "NaN or infinity"),
        (packed(Edit("a", "p", "t", {"l": (torch.ones(1), torch.ones(1))})), "expected factors u and v"),
        (packed(Edit(3, "p", "t", {})), "does not describe an edit"),  # type: ignore[arg-type]
    ],
)
def test_a_record_whose_checksum_fits_is_checked_too(tmp_path, payload, message):
    path = tmp_path / "store"
    EditStore(path).append([small_edit("a", 1)])
    size = path.stat().st_size
    with open(path, "rb") as file:
        framer = Framer(scan(file, path, Place())[1])
    with open(path, "ab") as file:
        file.write(framer.frame(EDIT, payload) + framer.commit())
    with pytest.raises(ValueError, match=f"record 3 at byte {size}.*{message}"):
        EditStore(path)


def test_no_store(tmp_path):
    path = tmp_path / "store"
    path.write_text("something else, of some length")
    with pytest.raises(ValueError, match="not an edit store"):
        EditStore(path)
    framer = Framer(Place(end=len(MAGIC)))
    path.write_bytes(MAGIC + framer.frame(EDIT, packed(small_edit("a"))) + framer.commit())
    with pytest.raises(ValueError, match="record 0"):
        EditStore(path)


def test_the_file_is_as_its_description_says(tmp_path):
    """Read by other code than the library's: the frame of log.py, safetensors inside."""
    path = tmp_path / "store"
    EditStore(path).append([small_edit("a", 1), small_edit("b", 2)])
    data = path.read_bytes()
    start, seen, chain = 8, [], bytes(32)
    while start < len(data):
        kind, number, length, checksum, own = struct.unpack_from("<4sIQII", data, start)
        payload = data[start + 24 : start + 24 + length]
        assert zlib.crc32(payload) == checksum and zlib.crc32(data[start : start + 20]) == own and number == len(seen)
        if kind == b"DONE":
            assert payload == chain
        else:
            seen.append(json.loads(payload) if kind == b"NOTE" else load(payload))
        chain = hashlib.sha256(chain + data[start : start + 24]).digest()
        start = (start + 24 + length + 7) // 8 * 8
    assert kind == b"DONE"
    assert seen[0]["format"] == "hf_mend edit store" and seen[0]["version"] == 2
    assert torch.equal(seen[2]["layer.1.v"], small_edit("b", 2).updates["layer.1"][1])


def test_a_store_of_the_first_version_goes_on(tmp_path):
    path = tmp_path / "store"
    shutil.copy(OLD_STORE, path)
    old = path.read_bytes()
    before = bits(EditStore(path).edits)
    assert before and path.read_bytes() == old
    EditStore(path).append([small_edit("new", 1), small_edit("newer", 2)])
    grown = path.read_bytes()
    assert grown[: len(old)] == old
    for end in range(len(old), len(grown) - 56, 3):
        path.write_bytes(grown[:end] if not 0 < end - len(old) < 56 else old + bytes(end - len(old)))
        assert bits(EditStore(path).edits) == before
    path.write_bytes(grown)
    edits = EditStore(path).edits
    assert bits(edits) == before + bits([small_edit("new", 1), small_edit("newer", 2)])
    EditStore(path).compact()
    assert bits(EditStore(path).edits) == bits(edits)
    for place in range(0, len(old), 97):
        altered = bytearray(old)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        try:
            assert bits(EditStore(path).edits) == before, "a filling byte"
        except ValueError as error:
            assert str(path) in str(error)
