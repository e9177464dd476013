"""The edit store on disk: what is read is what was appended, whatever happened to the process or the file."""

from __future__ import annotations

import os
import time

import pytest
import torch
from support.append_to_store import appender, small_edit
from support.edits import bits
from support.models import RECORDS, all_logits, build_model, editable
from support.processes import FORKED
from support.scope import scoped

from hf_mend import EditStore
from hf_mend.edits.edit import active_edits


def test_what_is_appended_is_read_again_to_the_bit(tmp_path):
    path = tmp_path / "deep" / "store"
    edits = [small_edit(f"e{i}", i, rank=i) for i in range(4)]
    edits[1].updates = {"half": (torch.randn(3, 7).half(), torch.randn(3, 1).half())}
    edits[2].updates["double"] = (torch.randn(1, 7).double(), torch.randn(1, 2).double())
    store = EditStore(path, {"architecture": "Some"})
    assert len(store) == 0 and not path.exists()
    store.append(edits[:1])
    store.append(edits[1:])
    for seen in (store, EditStore(path)):
        assert bits(seen.edits) == bits(edits)
        assert [u.dtype for u, _ in seen.edits[1].updates.values()] == [torch.float16]
        assert seen.base_fingerprint == {"architecture": "Some"}


def test_undo_off_and_on_are_appended(tmp_path):
    path = tmp_path / "store"
    store, other = EditStore(path), EditStore(path)
    store.append([small_edit(f"e{i}", i) for i in range(4)])
    size = path.stat().st_size
    store.undo(["e1"])
    store.disable_edit(["e0", "e3"])
    store.enable_edit(["e3"])
    assert path.stat().st_size - size < 400, "small records"
    for seen in (store.edits, other.refresh(), EditStore(path).edits):
        assert [(edit.id, edit.enabled) for edit in seen] == [("e0", False), ("e2", True), ("e3", True)]
    with pytest.raises(KeyError, match="no edit has the id 'e1'"):
        other.undo(["e1"])
    store.append([small_edit("e1", 9)])
    assert other.refresh().ids == ["e0", "e2", "e3", "e1"]


def test_an_edit_that_is_written_again_keeps_its_place(tmp_path):
    path = tmp_path / "store"
    store, other = EditStore(path), EditStore(path)
    store.append([small_edit(f"e{i}", i) for i in range(3)])
    other.refresh()
    store.append([small_edit("e1", 9), small_edit("e3", 3)])
    expected = bits([small_edit("e0", 0), small_edit("e1", 9), small_edit("e2", 2), small_edit("e3", 3)])
    for seen in (store.edits, other.refresh(), EditStore(path).edits):
        assert seen.ids == ["e0", "e1", "e2", "e3"] and bits(seen) == expected
    assert store.compact() > 0, "what was there of it before"
    for seen in (store.edits, other.refresh(), EditStore(path).edits):
        assert bits(seen) == expected


def test_compacting_leaves_what_is_there(tmp_path):
    path = tmp_path / "store"
    store, other = EditStore(path, {"architecture": "Some"}), EditStore(path)
    store.append([small_edit(f"e{i}", i) for i in range(20)])
    other.refresh()
    mapped = EditStore(path).edits
    store.undo([f"e{i}" for i in range(15)])
    store.disable_edit(["e17"])
    expected = bits(store.edits)
    assert store.compact() > path.stat().st_size
    assert bits(store.edits) == bits(other.refresh()) == bits(EditStore(path).edits) == expected
    assert other.base_fingerprint == {"architecture": "Some"} == EditStore(path).base_fingerprint
    assert bits(mapped) == bits(small_edit(f"e{i}", i) for i in range(20)), "views of the old file"
    other.append([small_edit("new")])
    assert store.refresh().ids == [f"e{i}" for i in range(15, 20)] + ["new"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store", "store.lock"]


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "store"
    store = EditStore(path)
    store.append([small_edit("a", 1)])
    data = path.read_bytes()
    real = os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.append([small_edit("b", 2)])
    monkeypatch.setattr(os, "fsync", real)
    assert path.read_bytes() == data and store.edits.ids == ["a"]
    store.append([small_edit("c", 3)])
    assert EditStore(path).edits.ids == ["a", "c"]


def test_two_processes_lose_nothing(tmp_path):
    path = tmp_path / "store"
    together = FORKED.Barrier(3)
    processes = [appender(path, name, 40, together) for name in "xy"]
    together.wait(60)
    here = EditStore(path)
    for i in range(20):
        here.append([small_edit(f"z{i}", i)])
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = {f"{name}{i}" for name in "xy" for i in range(40) if i % 5 != 4} | {f"z{i}" for i in range(20)}
    edits = EditStore(path).edits
    assert set(edits.ids) == expected and len(edits) == len(expected)
    assert bits(edits) == bits(small_edit(edit.id, int(edit.id[1:])) for edit in edits)
    assert bits(here.refresh()) == bits(edits)


def test_a_process_killed_while_it_appends(tmp_path):
    path = tmp_path / "store"
    at_once = FORKED.Barrier(1)
    process = appender(path, "x", 100_000, at_once)
    while not path.exists() or path.stat().st_size < 20_000:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join(60)
    edits = EditStore(path).edits
    numbers = [int(edit.id[1:]) for edit in edits]
    assert len(numbers) > 10
    # Each append was on the disk before the next; the last may not have been undone yet.
    assert numbers in ([i for i in range(numbers[-1] + 1) if i % 5 != 4 or i == last] for last in (-1, numbers[-1]))
    assert bits(edits) == bits(small_edit(edit.id, int(edit.id[1:])) for edit in edits)
    EditStore(path).append([small_edit("after")])
    assert EditStore(path).edits.ids == [*edits.ids, "after"]


# ---- in a model ----


def edit_some(model, which=slice(0, 3)):
    records = RECORDS[which]
    return model.edit([r.prompt for r in records], [r.target for r in records], max_steps=2, force=True)


def test_a_model_comes_back_from_its_store(llama, tokenizer, tmp_path):
    path = tmp_path / "store"
    model = editable(llama, tokenizer)
    assert model.open_store(path) == []

    def reopened():
        again = editable(build_model("llama"), tokenizer)
        again.open_store(path)
        assert bits(again.edits) == bits(model.edits)
        return all_logits(again, tokenizer)

    first, second, third = edit_some(model)
    assert torch.equal(reopened(), all_logits(model, tokenizer))
    model.undo(second.id)
    model.disable_edit(first.id)
    assert torch.equal(reopened(), all_logits(model, tokenizer))
    model.edit(RECORDS[2].prompt, "cairo town", max_steps=2, force=True)
    assert torch.equal(reopened(), all_logits(model, tokenizer))
    size = path.stat().st_size
    with model.edited(RECORDS[5].prompt, RECORDS[5].target, max_steps=1, force=True):
        model.enable_edit(first.id)
    with model.carrying(list(model.edits)[:1]), model.disable_edits():
        pass
    assert path.stat().st_size == size, "what is for a while is not kept"
    model.enable_edit(first.id)
    model.compress_edits(rank=3)
    assert torch.equal(reopened(), all_logits(model, tokenizer))
    model.undo()
    assert torch.equal(reopened(), all_logits(model, tokenizer))
    model.compress_edits(rank=3, keep=False)
    assert torch.equal(reopened(), all_logits(model, tokenizer))
    model.undo_all()
    assert len(EditStore(path)) == 0
    model.close_store()
    edit_some(model)
    assert len(EditStore(path)) == 0 and len(model.edits) == 3


def test_a_store_opened_by_a_model_that_has_edits(llama, tokenizer, tmp_path):
    path = tmp_path / "store"
    model = editable(llama, tokenizer)
    model.open_store(path)
    edit_some(model)
    again = editable(build_model("llama"), tokenizer)
    edit_some(again, slice(3, 5))
    own = again.edits.ids
    again.open_store(path)
    assert again.edits.ids == model.edits.ids + own == EditStore(path).edits.ids
    with pytest.raises(RuntimeError, match="close_store"):
        again.open_store(path)
    with pytest.raises(ValueError, match="carries the edit"):
        other = editable(build_model("llama"), tokenizer)
        other.load_edits(saved(model, tmp_path))
        other.open_store(path)
    # What others append stays, and neither model sees it by itself.
    edit_some(model, slice(5, 6))
    edit_some(again, slice(6, 7))
    assert len(EditStore(path)) == 7 and len(again.edits) == 6 and len(model.edits) == 4


def saved(model, tmp_path):
    model.save_edits(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("change", ["include", "exclude"])
def test_an_edit_whose_scope_is_changed_stays_superseded(llama, tokenizer, tmp_path, change):
    model, path = scoped(llama, tokenizer), tmp_path / "store"
    model.open_store(path)
    prompt = RECORDS[0].prompt
    first = model.edit(prompt, RECORDS[0].target, max_steps=1, check=False)
    second = model.edit(prompt, "lima town", max_steps=1, check=False)
    getattr(model, change)(first.id, RECORDS[3].prompt)
    expected = all_logits(model, tokenizer, prompt)
    for compacted in (False, True):
        model.close_store()
        model.undo_all()
        if compacted:
            EditStore(path).compact()
        model.open_store(path)
        assert model.edits.ids == [first.id, second.id]
        assert RECORDS[3].prompt in str([model.edits[0].scope.texts, model.edits[0].scope.excluded_texts])
        assert torch.equal(all_logits(model, tokenizer, prompt), expected)
    assert model.undo().id == second.id


def test_the_scope_of_what_another_process_has_undone_is_not_changed(llama, tokenizer, tmp_path):
    model, path = scoped(llama, tokenizer), tmp_path / "store"
    model.open_store(path)
    made = model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, check=False)
    EditStore(path).undo([made.id])
    size = path.stat().st_size
    with pytest.raises(ValueError, match=f"another process has undone the edits \\['{made.id}'\\], .*open it again"):
        model.exclude(made.id, RECORDS[3].prompt)
    assert model.edits[0].scope.excluded_texts == [] and path.stat().st_size == size
    assert EditStore(path).edits.ids == []


@pytest.mark.parametrize("context", ["edited", "carrying"])
@pytest.mark.parametrize("there", [False, True])
def test_no_store_takes_what_is_there_for_a_while(llama, tokenizer, tmp_path, context, there):
    model, path = editable(llama, tokenizer), tmp_path / "folder" / "store"
    if there:
        model.open_store(path)
        edit_some(model, slice(4, 6))
        model.close_store()
        model.undo_all()
    data = path.read_bytes() if there else None
    others = edit_some(model, slice(1, 3))
    before, own = all_logits(model, tokenizer), model.edits.ids
    record, edits = RECORDS[0], list(model.edits)[:1]
    with model.carrying(edits) if context == "carrying" else model.edited(record.prompt, record.target, max_steps=1):
        within = model.edits.ids
        with pytest.raises(RuntimeError, match=r"open_store.*within edited\(\) or carrying\(\).*after it"):
            model.open_store(path)
        assert model.edits.ids == within
    assert model.edits.ids == own == [one.id for one in others]
    assert torch.equal(all_logits(model, tokenizer), before)
    assert path.read_bytes() == data if there else not path.parent.exists()
    with model.disable_edits():  # which are not changed there
        model.open_store(path)
    assert EditStore(path).edits.ids == model.edits.ids and model.edits.ids[-2:] == own


def test_a_folder_is_no_store(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    for opened in (model.open_store, EditStore):
        with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder, and a store of edits is one file"):
            opened(tmp_path)
    edit_some(model)
    folder = saved(model, tmp_path)
    with pytest.raises(IsADirectoryError, match="load_edits"):
        model.open_store(folder)
    assert len(model.edits) == 3 and model._active.store is None


def test_another_editor_and_another_base(llama, tokenizer, tmp_path):
    path = tmp_path / "store"
    model = editable(llama, tokenizer)
    model.open_store(path)
    edit_some(model)
    assert all(edit.metadata["editor"].startswith("mend-") for edit in model.edits)
    other_layers = editable(build_model("llama"), tokenizer, target_modules=["down_proj"])
    other_layers.open_store(path)
    assert torch.equal(all_logits(other_layers, tokenizer), all_logits(model, tokenizer))
    for base in (build_model("llama", seed=5), build_model("gpt2")):
        other = editable(base, tokenizer)
        before = all_logits(other, tokenizer)
        with pytest.raises(ValueError, match="holds edits of another base model.*Load the base model"):
            other.open_store(path)
        assert len(other.edits) == 0 and torch.equal(all_logits(other, tokenizer), before)
        edit_some(other)
    assert len(EditStore(path)) == 3


def test_an_edit_that_cannot_be_kept_is_not_made(llama, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "store"
    model = editable(llama, tokenizer)
    model.open_store(path)
    edit_some(model)
    before = all_logits(model, tokenizer)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for change in (lambda: edit_some(model, slice(3, 5)), model.undo, lambda: model.disable_edit(model.edits[0].id)):
        with pytest.raises(OSError, match="No space"):
            change()
        assert len(model.edits) == 3 and torch.equal(all_logits(model, tokenizer), before)


def test_flipped_bytes_never_change_a_model(llama, tokenizer, tmp_path):
    path = tmp_path / "store"
    model = editable(llama, tokenizer)
    model.open_store(path)
    edit_some(model)
    data, expected = path.read_bytes(), all_logits(model, tokenizer)
    again = editable(build_model("llama"), tokenizer)
    plain = all_logits(again, tokenizer)
    for place in range(0, len(data), len(data) // 40):
        altered = bytearray(data)
        altered[place] ^= 255
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="store"):
            again.open_store(path)
        assert len(again.edits) == 0
    assert torch.equal(all_logits(again, tokenizer), plain)
    path.write_bytes(data)
    again.open_store(path)
    assert torch.equal(all_logits(again, tokenizer), expected)


def test_a_large_store_is_mapped(tmp_path, monkeypatch):
    import hf_mend.edits.store

    monkeypatch.setattr(hf_mend.edits.store, "_SMALL", 1000)
    path = tmp_path / "store"
    edits = [small_edit(f"e{i}", i) for i in range(200)]
    store = EditStore(path)
    store.append(edits[:150])
    other = EditStore(path)
    store.append(edits[150:])
    assert bits(other.refresh()) == bits(edits) == bits(EditStore(path).edits)
    other.edits[0].updates["layer.0"][0].zero_()
    assert bits(EditStore(path).edits) == bits(edits), "a view's owner does not write to the file"


@pytest.mark.slow
def test_fifty_thousand_edits(tmp_path):
    path = tmp_path / "store"
    edits = [small_edit(f"e{i}", i) for i in range(50_000)]
    EditStore(path).append(edits)
    begin = time.process_time()
    store = EditStore(path)
    opened, begin = time.process_time() - begin, time.process_time()
    for i in range(20):
        store.append([small_edit(f"new{i}", i)])
    appended = (time.process_time() - begin) / 20
    found = store.edits
    assert len(active_edits(found)) == 50_020 and bits(found[:50_000:997]) == bits(edits[::997])
    assert opened < 5 and appended < 0.02, (opened, appended)
