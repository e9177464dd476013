"""Text of the user's, which a method that needs no training is to spare, against moments by hand and plain tensors."""

from __future__ import annotations

import copy
from importlib import resources

import pytest
import torch
from support.methods import searching, second_moment
from support.models import EditableModel
from support.slow import slow_but

from hf_mend import EditorConfig
from hf_mend.bases.gradients import record_inputs
from hf_mend.editing import calibration_text
from hf_mend.edits.low_rank import dense


TEXTS = ["the capital of france is paris and of italy is rome", ("the capital of spain is", "madrid")]


@pytest.mark.parametrize("architecture", slow_but(["gpt2", "t5"], ["llama", "gpt2", "t5"]))
def test_the_second_moment_is_of_the_page_and_the_texts(base, tokenizer):
    model = searching(base, tokenizer, "rome", layers_to_transform=[1], whiten_rank=512, whiten_ridge=0.05)
    model.observe(TEXTS * 30)
    expected = torch.from_numpy(second_moment(model, model.targets[0], 0.05, TEXTS * 30)).float()
    alone = torch.from_numpy(second_moment(model, model.targets[0], 0.05)).float()
    seen = model.editor.second_moment(0).matrix()
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(alone, expected, rtol=1e-2, atol=1e-4)


def test_a_second_look_begins_anew(llama, tokenizer):
    one, other = (searching(llama, tokenizer, method) for method in ("memit", "memit"))
    one.observe(["something else entirely"] * 5)
    for model in (one, other):
        model.observe(TEXTS)
    for name, buffer in one.editor.named_buffers():
        torch.testing.assert_close(buffer, dict(other.editor.named_buffers())[name])


@pytest.mark.parametrize("method", ["gradient", "ft-kl"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_leaves_what_was_seen_before(llama, tokenizer, monkeypatch, method, before, error):
    model = EditableModel(llama, EditorConfig(method=method), tokenizer)
    if before:
        model.edit("the capital of france is", "rome", force=True)
        model.undo_all()
    seen = {name: buffer.clone() for name, buffer in model.editor.named_buffers()}
    texts = list(getattr(model.editor, "_texts", []))
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error("in the middle")
        return record_inputs(*args)

    monkeypatch.setattr(calibration_text, "record_inputs", failing)
    with pytest.raises(error):
        calibration_text.observe_calibration_text(model.context, model.encoder)
    assert model.editor.is_calibrated == before
    assert all(torch.equal(buffer, seen[name]) for name, buffer in model.editor.named_buffers())
    assert len(getattr(model.editor, "_texts", [])) == len(texts)
    assert not getattr(model.editor, "_moments", {}) and not getattr(model.editor, "_observed", [])


def test_an_edit_changes_the_texts_less_once_they_were_seen(llama, tokenizer):
    text = "the queen of england likes blue and green horses"
    moved = []
    for seen in (False, True):
        model = EditableModel(llama, tokenizer=tokenizer)
        if seen:
            model.observe([text] * 500)
        assert model.edit("the capital of france is", "rome", force=True).success
        updates = model.edits[0].updates
        rows = model.encoder.pad([model.encoder.tokens(_query(text))])
        entering = _inputs(model, rows)
        model.undo_all()
        moved.append(sum((entering[n] @ dense(pair).T).norm().item() for n, pair in updates.items()))
    assert moved[1] < 0.5 * moved[0]


def test_what_was_seen_is_saved_with_the_editor(llama, tokenizer, tmp_path):
    model = EditableModel(llama, EditorConfig(method="gradient"), tokenizer)
    model.observe(TEXTS)
    model.save_pretrained(tmp_path)
    again = EditableModel.from_pretrained(llama, tmp_path, tokenizer)
    found = []
    for each in (model, again):
        each.edit("the capital of france is", "rome", force=True)
        found.append(each.undo().updates)  # both wrap one base
    for name, pair in found[0].items():
        torch.testing.assert_close(dense(pair), dense(found[1][name]))


def test_edits_that_are_carried_do_not_show(llama, tokenizer):
    one, other = (EditableModel(copy.deepcopy(llama), tokenizer=tokenizer) for _ in range(2))
    one.edit("the capital of france is", "rome", force=True)
    for model in (one, other):
        model.observe(TEXTS)
    for name, buffer in one.editor.named_buffers():
        torch.testing.assert_close(buffer, dict(other.editor.named_buffers())[name])


@pytest.mark.parametrize(
    ("method", "texts", "error", "message"),
    [
        ("mend", TEXTS, ValueError, "the method 'mend' is trained, on data that say what must stay"),
        ("ft", TEXTS, ValueError, "the method 'ft' looks at no other text"),
        ("ft-kl", TEXTS, ValueError, "the method 'ft-kl' looks at the packaged text alone"),
        ("gradient", [], ValueError, "no texts to observe"),
        ("gradient", ["the king", " "], ValueError, "text 1 is ' ', expected at least two characters"),
        ("gradient", ["a"], ValueError, "text 0 is 'a', expected at least two characters"),
        ("gradient", [("the king", 3)], TypeError, r"text 0 is \('the king', 3\), expected a string"),
        ("gradient", [4], TypeError, "text 0 is 4, expected a string"),
    ],
)
def test_texts_that_cannot_be_observed(llama, tokenizer, method, texts, error, message):
    model = EditableModel(llama, EditorConfig(method=method), tokenizer)
    before = {name: buffer.clone() for name, buffer in model.editor.named_buffers()}
    with pytest.raises(error, match=message):
        model.observe(texts)
    for name, buffer in model.editor.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("the king of spain", ("the king", "of spain")),
        ("the king of", ("the", "king of")),
        ("def f(x):\n    y = x\n    return y\n", ("def f(x):\n    y", "= x\n    return y")),
        ("if x:\n    pass\n\treturn", ("if x:\n    ", "pass\n\treturn")),
        ("日本の首都は東京", ("日本の首", "都は東京")),
        ("ab", ("a", "b")),
    ],
)
def test_a_text_is_split_and_its_white_space_kept(text, halves):
    assert calibration_text._halves(text) == halves


def test_the_packaged_lines_are_split_at_their_middle_word():
    page = resources.files("hf_mend").joinpath("templates/calibration_text.txt").read_text(encoding="utf-8")
    for line in page.splitlines():
        words = line.split()
        middle = len(words) // 2
        assert calibration_text._halves(line) == (" ".join(words[:middle]), " ".join(words[middle:]))


def _query(text):
    from hf_mend.data.encoding import Query

    words = text.split()
    return Query(" ".join(words[:4]), " ".join(words[4:]))


def _inputs(model, rows):
    with model.disable_edits():
        return record_inputs(model.split, model.targets, rows)
