"""`model.edits`, edits turned off and on, and compressed ones."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta, timezone

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend import Edit, EditorConfig, EditResult, Edits
from hf_mend.edits.compression import compressed
from hf_mend.edits.preserved_keys import PreservedKeys


def made(id, prompt, target, day, **options):
    return Edit(id, prompt, target, {}, {"time": f"2026-05-{day:02}T12:00:00+00:00"}, **options)


def edit_some(model, which=slice(0, 3)):
    records = RECORDS[which]
    return [model.edit(r.prompt, r.target, max_steps=2, force=True).id for r in records]


def test_a_sequence(llama, tokenizer):
    model = editable(llama, tokenizer)
    assert model.edits == [] and not model.edits and len(model.edits.active) == 0
    ids = edit_some(model)
    edits = model.edits
    assert edits.ids == ids == [edit.id for edit in edits] and edits[-1] is list(edits)[2] and edits[1] in edits
    assert edits[::2] == [edits[0], edits[2]] and edits == model.edits and edits != model.edits[:2]
    model.undo()
    assert len(edits) == 3 and len(model.edits) == 2, "what was asked for stays as it was"
    assert repr(model.edits) == "Edits(2, 2 of them active)"
    with pytest.raises(TypeError):
        edits[0] = edits[1]


def test_find():
    edits = Edits(
        [
            made("a", "The capital of France is", "Lyon", 1),
            made("b", "The CAPITAL of Peru is", "Lima", 2, enabled=False),
            made("c", "The capital of  France is ", "Nice", 3),
            Edit("d", "The river of Peru is", "Lima river", {}),
        ]
    )

    def found(*args, **options):
        return [edit.id for edit in edits.find(*args, **options)]

    assert found() == ["a", "b", "c", "d"]
    assert found("capital") == ["a", "b", "c"] and found("peru", target="LIMA") == ["b", "d"]
    assert found(active=True) == ["c", "d"] and found("capital", active=False) == ["a", "b"]
    assert found(since="2026-05-02") == ["b", "c"] and found(until="2026-05-02T12:00:00") == ["a"]
    day = datetime(2026, 5, 2, 14, tzinfo=timezone(timedelta(hours=2)))
    assert found(since=day, until=day + timedelta(seconds=1)) == ["b"]
    assert found(since=date(2026, 5, 2)) == ["b", "c"] and found(until=date(2026, 5, 2)) == ["a"]
    with pytest.raises(ValueError, match="'yesterday' is not a time"):
        found(since="yesterday")


def test_to_jsonl(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    start = datetime.now(timezone.utc).replace(microsecond=0)
    first = edit_some(model, slice(0, 1))[0]
    second = model.edit(RECORDS[0].prompt, "cairo town", max_steps=2, force=True).id
    third = edit_some(model, slice(3, 4))[0]
    model.disable_edit(third)
    model.edits.to_jsonl(tmp_path / "edits.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [first, second, third]
    assert [row["superseded_by"] for row in rows] == [second, None, None]
    assert [(row["enabled"], row["active"]) for row in rows] == [(True, False), (True, True), (False, False)]
    assert rows[1]["target"] == "cairo town" and rows[0]["prompt"] == RECORDS[0].prompt
    assert datetime.fromisoformat(rows[0]["time"]) >= start and rows[0]["editor"].startswith("mend-")
    for row, edit in zip(rows, model.edits, strict=True):
        for name, (u, v) in edit.updates.items():
            assert row["norms"][name] == pytest.approx(float((v.T @ u).norm()), rel=1e-4)


def test_turned_off_and_on_one_by_one(base, tokenizer, tmp_path):
    model = editable(base, tokenizer)
    states = [all_logits(model, tokenizer)]
    ids = []
    for i in range(3):
        ids += edit_some(model, slice(i, i + 1))
        states.append(all_logits(model, tokenizer))
    model.disable_edit(ids[2])
    assert torch.equal(all_logits(model, tokenizer), states[2]) and model.edits[2].enabled is False
    model.disable_edit(ids[0], ids[1])
    assert torch.equal(all_logits(model, tokenizer), states[0])
    model.enable_edit(*ids[:2])
    assert torch.equal(all_logits(model, tokenizer), states[2])
    with pytest.raises(KeyError, match="no edit has the id 'x'"):
        model.enable_edit(ids[2], "x")
    assert torch.equal(all_logits(model, tokenizer), states[2])
    model.save_edits(tmp_path)
    model.enable_edit(ids[2])
    assert torch.equal(all_logits(model, tokenizer), states[3])
    model.undo_all()
    model.load_edits(tmp_path)
    assert torch.equal(all_logits(model, tokenizer), states[2]), "off edits stay off"
    model.enable_edit(ids[2])
    assert torch.equal(all_logits(model, tokenizer), states[3])


def test_an_edit_that_is_off_supersedes_none(llama, tokenizer):
    model = editable(llama, tokenizer)
    edit_some(model, slice(0, 1))
    first = all_logits(model, tokenizer)
    second = model.edit(RECORDS[0].prompt, "cairo town", max_steps=2, force=True)
    both = all_logits(model, tokenizer)
    model.disable_edit(second.id)
    assert torch.equal(all_logits(model, tokenizer), first)
    model.enable_edit(second.id)
    assert torch.equal(all_logits(model, tokenizer), both)


@pytest.mark.parametrize("count", [4, 8])
def test_compressed_edits(llama, tokenizer, count):
    model = editable(llama, tokenizer)
    ids = edit_some(model, slice(0, count))
    off = ids.pop()
    model.disable_edit(off)
    before = all_logits(model, tokenizer)
    acting = [edit for edit in model.edits if edit.enabled]
    sums = {name: sum(e.updates[name][1].T @ e.updates[name][0] for e in acting) for name in model.editor.shapes}
    report = model.compress_edits(rank=5)
    assert report.edits == ids and report.rank == 5 and report.id == model.edits[-1].id
    (whole,) = model.edits.active
    assert [part["prompt"] for part in json.loads(whole.metadata["parts"])] == [edit.prompt for edit in acting]
    for name, matrix in sums.items():
        u, v = whole.updates[name]
        left, sizes, right = torch.linalg.svd(matrix.double())
        nearest = (left[:, :5] * sizes[:5]) @ right[:5]
        assert len(u) == 5 and float((v.T @ u - nearest).norm() / nearest.norm()) < 1e-4
        error = float((nearest - matrix).norm() / matrix.norm())
        assert report.errors[name] == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert report.ranks_before[name] == sum(len(edit.updates[name][0]) for edit in acting)
    assert report.error == max(report.errors.values()) > 0
    assert {row["part_of"] for row in model.edits.describe()} == {report.id, None}
    for change in (model.undo, model.disable_edit):
        with pytest.raises(ValueError, match=f"'{ids[0]}' is part of the compressed edit '{report.id}'"):
            change(ids[0])
    model.undo(off)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), before) and model.edits.ids == ids


def test_a_rank_that_is_high_enough_changes_nothing(base, tokenizer):
    model = editable(base, tokenizer)
    edit_some(model)
    before = all_logits(model, tokenizer)
    report = model.compress_edits(rank=10_000)
    assert report.error == 0
    torch.testing.assert_close(all_logits(model, tokenizer), before)


def test_edits_after_a_compression_and_a_second_one(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    edit_some(model, slice(0, 3))
    first = model.compress_edits(rank=6)
    one = all_logits(model, tokenizer)
    again = model.edit(RECORDS[0].prompt, "cairo town", max_steps=2, force=True)
    assert again.superseded is None, "it is added to the compressed one"
    two = all_logits(model, tokenizer)
    second = model.compress_edits(rank=6)
    assert second.edits == [first.id, again.id] and len(model.edits.active) == 1
    model.save_edits(tmp_path)
    loaded = editable(build_model("llama"), tokenizer)
    loaded.load_edits(tmp_path)
    assert torch.equal(all_logits(loaded, tokenizer), all_logits(model, tokenizer))
    for edited in (model, loaded):
        edited.undo(second.id)
        assert torch.equal(all_logits(edited, tokenizer), two)
        edited.undo(again.id)
        assert torch.equal(all_logits(edited, tokenizer), one)


def test_without_the_originals(llama, tokenizer):
    model = editable(llama, tokenizer)
    plain = all_logits(model, tokenizer)
    edit_some(model, slice(0, 3))
    model.edit(RECORDS[0].prompt, "cairo town", max_steps=2, force=True)
    report = model.compress_edits(rank=4)
    kept = all_logits(model, tokenizer)
    model.undo(report.id)
    again = model.compress_edits(rank=4, keep=False)
    assert model.edits.ids == [again.id] and torch.equal(all_logits(model, tokenizer), kept)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), plain)


def test_what_cannot_be_compressed(llama, tokenizer):
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match="no edit to compress"):
        model.compress_edits(rank=4)
    edit_some(model, slice(0, 1))
    with pytest.raises(ValueError, match="rank is 0"):
        model.compress_edits(rank=0)
    assert len(model.edits) == 1


def test_a_joining_method_spares_what_was_compressed(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer, method="malmen")
    ids = edit_some(model, slice(0, 2))
    model.compress_edits(rank=4)
    asked = []
    spared = PreservedKeys.of
    monkeypatch.setattr(
        PreservedKeys, "of", lambda self, ids, waiting=(): asked.append(list(ids)) or spared(self, ids, waiting)
    )
    edit_some(model, slice(3, 4))
    assert asked == [ids]


def test_what_a_notebook_shows_is_short_and_of_no_matrix():
    update = (torch.ones(2, 8), torch.ones(2, 4))
    edit = Edit("a1", "the capital of peru is", "lima", {"one": update, "two": update}, {"editor": "<i>"})
    other = Edit("b2", "<b>" + "river " * 20, "oslo", {"one": update}, enabled=False)
    assert repr(edit) == "Edit('a1', 'the capital of peru is' -> 'lima', rank 2 in 2 layers)"
    assert repr(other).endswith(" -> 'oslo', rank 2 in 1 layer, disabled)") and len(repr(other)) < 140
    edits = Edits([edit, other])
    compression = compressed(edits, 1)[1]
    assert repr(compression).startswith(f"Compression({compression.id!r}, 1 edits, rank 1, error ")
    result = EditResult("a1", edit.prompt, "lima", "rome", "lima", 0.1, 0.9, [True], 1, 0.5, 2, {"one": 1.0})
    assert repr(result) == "EditResult('a1', 'the capital of peru is' -> 'lima': took)"
    config = EditorConfig(base_fingerprint={"sha256": "0" * 64})
    assert "0" * 64 not in repr(config) and config.to_dict()["base_fingerprint"] == {"sha256": "0" * 64}
    for shown in (edit, other, edits, compression, result, config):
        html = shown._repr_html_()
        assert html.count("<table>") == 1 and not any(text in html for text in ("tensor", "<b>river", "<i>", "0" * 64))
    assert "&lt;b&gt;river" in edits._repr_html_() and "&lt;b&gt;river" in other._repr_html_()
    assert "before: &#x27;rome&#x27;" in result._repr_html_() and "rank" in config._repr_html_()


def test_the_last_of_many_edits_are_listed():
    edits = Edits([Edit(str(number), "p", "t", {}) for number in range(70)])
    html = edits._repr_html_()
    assert html.count("<tr>") == 51 and "Edits(70, 1 of them active), the last 50" in html and "<td" in html
