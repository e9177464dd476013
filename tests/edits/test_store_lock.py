"""One store for several names, processes and threads: nothing is lost, mixed up, or waited for without end."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.append_to_store import appender, small_edit
from support.edits import bits
from support.injection import interrupted, lines_of, some_of
from support.models import RECORDS, all_logits, build_model, editable
from support.paths import TESTS
from support.processes import FORKED, run_python

import hf_mend.edits.store_lock
from hf_mend import EditStore
from hf_mend.edits.store_lock import locked_file


def other_names(path: Path) -> list[Path]:
    """A symbolic link, a link to that, and a hard link in other folders."""
    folder = path.parent / "other"
    folder.mkdir()
    soft, far, hard = folder / "soft", folder / "far", folder / "hard"
    soft.symlink_to(path)
    far.symlink_to("soft")
    os.link(path, hard)
    return [soft, far, hard]


def test_writers_by_all_names_lose_nothing(tmp_path):
    path = tmp_path / "store"
    EditStore(path).append([small_edit("first")])
    names = [path, *other_names(path)]
    together = FORKED.Barrier(4)
    processes = [appender(name, letter, 20, together) for name, letter in zip(names, "abcd", strict=True)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    expected = {f"{letter}{i}" for letter in "abcd" for i in range(20) if i % 5 != 4} | {"first"}
    for name in names:
        edits = EditStore(name).edits
        assert set(edits.ids) == expected and len(edits) == len(expected)


@pytest.mark.parametrize("name", ["soft", "far", "hard", "store"])
def test_the_lock_is_the_same_by_all_names(tmp_path, monkeypatch, name):
    path = tmp_path / "store"
    EditStore(path).append([small_edit("a")])
    by_name = {one.name: one for one in [path, *other_names(path)]}[name]
    monkeypatch.setattr(hf_mend.edits.store_lock, "PATIENCE", 0.2)
    data = path.read_bytes()
    message = rf"has been locked by process {os.getpid()} \(.*for 0 seconds"
    with locked_file(path, create=False), pytest.raises(TimeoutError, match=message):
        EditStore(by_name).append([small_edit("b")])
    assert path.read_bytes() == data
    EditStore(by_name).append([small_edit("b")])
    assert EditStore(path).edits.ids == ["a", "b"]


def test_a_stopped_process_is_named(tmp_path, monkeypatch):
    path = tmp_path / "store"
    together = FORKED.Barrier(2)
    process = appender(path, "x", 100_000, together)
    together.wait(60)
    monkeypatch.setattr(hf_mend.edits.store_lock, "PATIENCE", 0.5)
    store, told = EditStore(path), ""
    for attempt in range(60):  # until it is stopped while it has the lock
        time.sleep(0.01 + 0.003 * attempt)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            store.append([small_edit(f"y{attempt}")])
        except TimeoutError as error:
            told = str(error)
            break
        finally:
            os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.join(60)
    assert f"process {process.pid} (" in told and "end it if it hangs" in told
    store.append([small_edit("z")])
    assert EditStore(path).edits.ids[-1] == "z"


def test_compacting_keeps_links_and_permissions(tmp_path):
    path = tmp_path / "store"
    store = EditStore(path)
    store.append([small_edit("a"), small_edit("b")])
    os.chmod(path, 0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    store.undo(["a"])
    assert EditStore(link).compact() > 0
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert store.refresh().ids == EditStore(link).edits.ids == ["b"]
    hard = tmp_path / "hard"
    os.link(path, hard)
    data = path.read_bytes()
    for name in (path, link, hard):
        with pytest.raises(ValueError, match="hard links"):
            EditStore(name).compact()
    assert path.read_bytes() == data and path.samefile(hard)


def test_a_relative_path_is_that_of_when_it_was_opened(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = EditStore("store")
    store.append([small_edit("a")])
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.append([small_edit("b")])
    assert list(Path().iterdir()) == [] and EditStore("../store").edits.ids == ["a", "b"]


@pytest.mark.parametrize("how", ["moved", "deleted", "emptied"])
def test_a_store_that_has_gone_is_not_begun_anew(tmp_path, how):
    path = tmp_path / "store"
    store = EditStore(path)
    store.append([small_edit("a")])
    if how == "moved":
        path.rename(tmp_path / "moved")
    elif how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"")
    error, message = (ValueError, "is empty") if how == "emptied" else (FileNotFoundError, "was moved or deleted")
    for call in (lambda: store.append([small_edit("b")]), store.refresh, store.compact, lambda: store.undo(["a"])):
        with pytest.raises(error, match=message):
            call()
    assert path.exists() == (how == "emptied") and store.edits.ids == ["a"]
    if how == "moved":
        (tmp_path / "moved").rename(path)
        store.append([small_edit("b")])
        assert EditStore(path).edits.ids == ["a", "b"]


def test_threads_share_one_object(tmp_path):
    path = tmp_path / "store"
    store, errors = EditStore(path), []

    def work(name: str) -> None:
        try:
            for i in range(15):
                store.append([small_edit(f"{name}{i}", i)])
                if i % 3 == 2:
                    store.undo([f"{name}{i}"])
                store.refresh()
                if i == 7:
                    store.compact()
                assert f"{name}0" in store.edits.ids
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    expected = {f"{name}{i}" for name in "abc" for i in range(15) if i % 3 != 2}
    assert set(store.edits.ids) == set(EditStore(path).edits.ids) == expected
    assert len(store) == len(expected)


def test_a_reader_beside_a_writer_that_fails(tmp_path, monkeypatch):
    """A writer on a full disk cuts off what it wrote; a reader that has mapped the file survives that."""
    path = tmp_path / "store"
    monkeypatch.setattr("hf_mend.edits.store._SMALL", 1000)
    EditStore(path).append([small_edit(f"e{i}", i) for i in range(100)])
    real, seen = os.fsync, []

    def full(handle):
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
        seen.append(EditStore(path).edits)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        EditStore(path).append([small_edit("new", rank=1000)])
    monkeypatch.setattr(os, "fsync", real)
    assert bits(seen[0]) == bits(EditStore(path).edits) == bits(small_edit(f"e{i}", i) for i in range(100))


def test_a_file_that_can_only_be_read(tmp_path):
    path = tmp_path / "store"
    EditStore(path).append([small_edit("a")])
    (tmp_path / "store.lock").unlink()
    os.chmod(path, 0o400)
    os.chmod(tmp_path, 0o500)
    try:
        assert EditStore(path).edits.ids == ["a"]
        assert not (tmp_path / "store.lock").exists()
    finally:
        os.chmod(tmp_path, 0o700)


# ---- models ----


def edit_some(model, which=slice(0, 3)):
    records = RECORDS[which]
    return model.edit([r.prompt for r in records], [r.target for r in records], max_steps=2, force=True)


def two_models(tokenizer, path):
    models = [editable(build_model("llama"), tokenizer) for _ in range(2)]
    models[0].open_store(path)
    edit_some(models[0])
    models[1].open_store(path)
    return models


@pytest.mark.parametrize("what", ["undo", "disable"])
def test_an_undo_of_what_another_has_compressed_is_refused(tokenizer, tmp_path, what):
    a, b = two_models(tokenizer, tmp_path / "store")
    first = a.edits[0].id
    whole = b.compress_edits(64).id
    before = all_logits(a, tokenizer)
    with pytest.raises(ValueError, match=f"another process has compressed the edits .*{first}.* into '{whole}'"):
        a.undo(first) if what == "undo" else a.disable_edit(first)
    assert torch.equal(all_logits(a, tokenizer), before) and len(a.edits) == 3
    a.close_store()
    a.undo_all()
    a.open_store(tmp_path / "store")
    a.undo(whole)
    a.undo(first)
    assert EditStore(tmp_path / "store").edits.ids == a.edits.ids and len(a.edits) == 2


@pytest.mark.parametrize("keep", [True, False])
def test_what_another_has_undone_is_not_compressed(tokenizer, tmp_path, keep):
    a, b = two_models(tokenizer, tmp_path / "store")
    first = a.undo(a.edits[0].id).id
    before = all_logits(b, tokenizer)
    with pytest.raises(ValueError, match=f"another process has undone the edits .*{first}"):
        b.compress_edits(64, keep=keep)
    assert torch.equal(all_logits(b, tokenizer), before) and len(b.edits) == 3
    assert EditStore(tmp_path / "store").edits.ids == a.edits.ids


def test_two_bases_that_begin_one_store(tokenizer, tmp_path):
    a, b = (editable(build_model("llama", seed), tokenizer) for seed in (0, 1))
    same = editable(build_model("llama"), tokenizer, target_modules="default")
    for model in (a, b, same):
        model.open_store(tmp_path / "store")
    edit_some(a, slice(0, 1))
    before = all_logits(b, tokenizer)
    for _ in range(2):
        with pytest.raises(ValueError, match="holds edits of another base model"):
            edit_some(b, slice(1, 2))
    assert len(b.edits) == 0 and torch.equal(all_logits(b, tokenizer), before)
    edit_some(same, slice(2, 3))
    assert EditStore(tmp_path / "store").edits.ids == a.edits.ids + same.edits.ids
    EditStore(tmp_path / "store").compact()
    edit_some(a, slice(3, 4))
    with pytest.raises(ValueError, match="holds edits of another base model"):
        edit_some(b, slice(1, 2))


def test_two_bases_without_models(tmp_path):
    one, two = (EditStore(tmp_path / "store", {"architecture": name}) for name in ("A", "B"))
    one.append([small_edit("a")])
    with pytest.raises(ValueError, match="for another base model"):
        two.append([small_edit("b")])
    assert EditStore(tmp_path / "store").edits.ids == ["a"]


KILLED = """
import os, sys
import hf_mend.edits.store as store
from hf_mend import EditStore
from support.append_to_store import small_edit

left = [0]
def counted(real):
    def call(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return real(*args)
    return call

os.fsync, store._write = counted(os.fsync), counted(store._write)
for stop in range(1, 12):
    if (child := os.fork()) == 0:
        left[0] = stop
        EditStore(sys.argv[1]).append([small_edit(f"n{i}", i) for i in range(4)])
        os._exit(0)
    killed = os.waitpid(child, 0)[1]
    ids = EditStore(sys.argv[1]).edits.ids
    sys.stdout.write(f"{killed} {','.join(ids)}\\n")
    if len(ids) > 1:
        EditStore(sys.argv[1]).undo(ids[1:])
"""


def test_a_killed_call_with_several_edits_is_there_or_not(tmp_path):
    path = tmp_path / "store"
    EditStore(path).append([small_edit("first")])
    paths = os.pathsep.join([str(TESTS), *sys.path])
    found = run_python("-c", KILLED, path, env={**os.environ, "PYTHONPATH": paths})
    assert found.returncode == 0, found.stderr
    seen = found.stdout.split("\n")[:-1]
    assert set(seen) == {"9 first", "9 first,n0,n1,n2,n3", "0 first,n0,n1,n2,n3"}
    assert seen.count("9 first") >= 6 and seen[-1].startswith("0")


@pytest.mark.parametrize("change", ["append", "undo"])
def test_wherever_a_call_is_interrupted_the_object_and_the_file_have_the_same(tmp_path, change):
    def call(path):
        store = EditStore(path)
        if change == "undo":
            store.append([small_edit("a", 1), small_edit("b", 2)])
        return store, (lambda: store.append([small_edit("c")])) if change == "append" else lambda: store.undo(["a"])

    lines = lines_of(call(tmp_path / "store")[1])
    for number in some_of(lines, 10**6):
        path = tmp_path / f"store{number}"
        store, change_it = call(path)
        where = interrupted(change_it, number)
        here = store.edits.ids
        assert where is not None and EditStore(path).edits.ids == here, where
        store.append([small_edit("later")])
        assert EditStore(path).edits.ids == [*here, "later"], where
