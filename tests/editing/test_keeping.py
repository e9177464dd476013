"""In what precision the edits of a model with a scope are kept."""

from __future__ import annotations

import pytest
import torch
from support.models import RECORDS
from support.scope import scoped

from hf_mend import EditorConfig
from hf_mend.editing import keeping
from hf_mend.edits.four_bit import FourBitUpdates, in_four_bits


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def test_an_edit_is_kept_in_four_bits_and_says_how_large_it_is(llama, tokenizer):
    model = scoped(llama, tokenizer)
    result = model.edit(PROMPT, TARGET)
    (edit,) = model.edits
    assert isinstance(edit.updates, FourBitUpdates)
    assert result.rank == edit.rank > 0 and result.nbytes == edit.nbytes > 0
    assert f"{edit.nbytes / 1000:.1f} kB" in str(result)
    assert result.update_norms == pytest.approx(edit.norms())


def test_the_four_bits_are_those_of_the_update_that_was_found(llama, tokenizer):
    fine = scoped(llama, tokenizer, factor_dtype="float32")
    fine.edit(PROMPT, TARGET, max_steps=1)
    whole = dict(fine.edits[0].updates)
    assert {side.dtype for pair in whole.values() for side in pair} == {torch.float32}
    fine.undo_all()
    coarse = scoped(fine.base_model, tokenizer)
    coarse.editor.load_state_dict(fine.editor.state_dict())
    coarse.edit(PROMPT, TARGET, max_steps=1)
    for name, (u, v) in coarse.edits[0].updates.items():
        own = whole[name][1].T @ whole[name][0]
        assert (v.T @ u - own).norm() <= 0.2 * own.norm()


def test_other_precisions_and_a_fourth_of_the_room(llama, tokenizer):
    sizes = {}
    for dtype in ("int4", "bfloat16", "float32"):
        model = scoped(llama, tokenizer, factor_dtype=dtype, factor_error=0.0)
        model.edit(PROMPT, TARGET)
        updates = model.edits[0].updates
        sizes[dtype] = sum(u.nbytes + v.nbytes for u, v in model.edits[0].pairs().values())
        if dtype != "int4":
            assert {side.dtype for pair in updates.values() for side in pair} == {getattr(torch, dtype)}
        model.undo_all()
    keys = sizes["float32"] - 2 * (sizes["float32"] - sizes["bfloat16"])  # what does not shrink
    assert sizes["int4"] - keys < 0.3 * (sizes["bfloat16"] - keys)


def test_an_edit_that_four_bits_would_spoil_is_kept_as_it_was_found(llama, tokenizer, monkeypatch):
    def spoiled(updates, error):
        return in_four_bits({name: (u, -v) for name, (u, v) in updates.items()}, error)

    fine = scoped(llama, tokenizer, factor_dtype="bfloat16")
    expected = fine.edit([PROMPT, RECORDS[1].prompt], [TARGET, RECORDS[1].target])
    fine.undo_all()
    model = scoped(fine.base_model, tokenizer)
    model.editor.load_state_dict(fine.editor.state_dict())
    monkeypatch.setattr(keeping, "in_four_bits", spoiled)
    results = model.edit([PROMPT, RECORDS[1].prompt], [TARGET, RECORDS[1].target])
    for edit, result, other in zip(model.edits, results, expected, strict=True):
        assert {side.dtype for pair in edit.updates.values() for side in pair} == {torch.bfloat16}
        assert result.probability_after == pytest.approx(other.probability_after, rel=1e-4)


def test_without_a_check_four_bits_are_kept_unseen(llama, tokenizer):
    model = scoped(llama, tokenizer)
    assert model.edit(PROMPT, TARGET, check=False).probability_after is None
    assert isinstance(model.edits[0].updates, FourBitUpdates)


def test_an_edit_that_acts_everywhere_keeps_its_float32(llama, tokenizer):
    from support.models import editable

    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET)
    assert {side.dtype for pair in model.edits[0].updates.values() for side in pair} == {torch.float32}


@pytest.mark.parametrize("options", [{"factor_dtype": "int3"}, {"factor_error": -0.1}, {"factor_error": 2.0}])
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EditorConfig(scope=True, **options)
