"""Edits of one prompt: the later takes the earlier's place, and its undo gives it back."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable

from hf_mend import EditableModel
from hf_mend.data.encoding import Query
from hf_mend.editing.scoring import score_targets
from hf_mend.edits.preserved_keys import PreservedKeys


PROMPT, OLD, NEW = RECORDS[3].prompt, "tokyo town", "cairo town"


def test_a_second_edit_takes_the_firsts_place(llama, tokenizer):
    model = editable(llama, tokenizer)
    other = model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=2)
    with_other = all_logits(model, tokenizer)
    first = model.edit(PROMPT, OLD, max_steps=20, force=True)
    with_first = all_logits(model, tokenizer)
    spaced = f"  {PROMPT.replace(' ', '  ')} "
    rows = model.encoder([Query(spaced, NEW)])
    with torch.no_grad():
        expected = score_targets(rows, model(**rows.inputs).logits[rows.positions]).log_probability[0]
    second = model.edit(spaced, NEW, max_steps=2, force=True)
    assert (other.superseded, first.superseded, second.superseded) == (None, None, first.id)
    assert f"in place of edit {first.id}" in str(second) and "in place of" not in str(first)
    said = "before is what the model said before the call, with the first edit"
    assert second.probability_before == pytest.approx(math.exp(expected), rel=1e-4), said
    both = all_logits(model, tokenizer)
    assert [edit.id for edit in model.edits] == [other.id, first.id, second.id]
    # The same edits on a model that never had the first.
    fresh = editable(build_model("llama"), tokenizer)
    fresh._active.replace([model.edits[0], model.edits[2]])
    assert torch.equal(all_logits(fresh, tokenizer), both)
    model.undo()
    assert torch.equal(all_logits(model, tokenizer), with_first)
    with model.edited(PROMPT, NEW, max_steps=2, force=True) as third:
        assert third.superseded == first.id
        assert not torch.equal(all_logits(model, tokenizer), with_first)
    assert torch.equal(all_logits(model, tokenizer), with_first)
    model.undo(first.id)
    assert torch.equal(all_logits(model, tokenizer), with_other)


def test_the_second_is_found_without_the_first(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, OLD, max_steps=3, force=True)
    model.edit(PROMPT, NEW, max_steps=3, force=True)
    alone = editable(build_model("llama"), tokenizer)
    alone.edit(PROMPT, NEW, max_steps=3, force=True)
    assert torch.equal(all_logits(model, tokenizer), all_logits(alone, tokenizer))


def test_three_of_one_prompt_saved_and_undone_one_by_one(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    seen = [all_logits(model, tokenizer)]
    for target in (OLD, NEW, "lima"):
        model.edit(PROMPT, target, max_steps=2, force=True)
        seen.append(all_logits(model, tokenizer))
    model.save_edits(tmp_path)
    again = editable(build_model("llama"), tokenizer)
    again.load_edits(tmp_path)
    assert torch.equal(all_logits(again, tokenizer), seen.pop())
    while seen:
        again.undo()
        assert torch.equal(all_logits(again, tokenizer), seen.pop())


@pytest.mark.parametrize("method", ["mend", "malmen"])
def test_back_to_what_the_model_says_by_itself(llama, tokenizer, method):
    saying = editable(llama, tokenizer)
    assert saying.edit(PROMPT, OLD, max_steps=40).success
    model = editable(saying.merge_and_unload(), tokenizer, method=method)
    plain = all_logits(model, tokenizer)
    assert model.edit(PROMPT, OLD).already_known
    first = model.edit(PROMPT, NEW, max_steps=40, force=True)
    assert first.success
    back = model.edit(PROMPT, OLD)
    assert back.success and back.superseded == first.id and back.rank == 0 and not back.already_known
    assert torch.equal(all_logits(model, tokenizer), plain)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, force=True)
    assert len(model.edits) == 3


def test_said_already_thanks_to_the_first(llama, tokenizer):
    model = editable(llama, tokenizer)
    first = model.edit(PROMPT, OLD, max_steps=40)
    assert first.success
    edited = all_logits(model, tokenizer)
    for check in (True, False):
        result = model.edit(PROMPT, OLD, check=check)
        assert result.already_known and result.superseded is None and result.id is None
    assert torch.equal(all_logits(model, tokenizer), edited) and len(model.edits) == 1


@pytest.mark.parametrize("method", ["mend", "malmen", "gradient"])
def test_in_a_batch_with_others(llama, tokenizer, method):
    options = {} if method == "mend" else {"method": method}
    model = editable(llama, tokenizer, **options)
    model.edit([r.prompt for r in RECORDS[:3]], [r.target for r in RECORDS[:3]], max_steps=2, force=True)
    before, edits = all_logits(model, tokenizer), model.edits
    results = model.edit([r.prompt for r in RECORDS[1:5]], [NEW] * 4, max_steps=2, force=True)
    assert [result.superseded for result in results] == [edits[1].id, edits[2].id, None, None]
    for edit in model.edits[:2:-1]:
        model.undo(edit.id)
    assert torch.equal(all_logits(model, tokenizer), before)


def test_a_superseded_edits_inputs_are_not_spared(llama, tokenizer, monkeypatch):
    model = editable(llama, tokenizer, method="malmen")
    first = model.edit(PROMPT, OLD, max_steps=1, force=True)
    asked = []
    spared = PreservedKeys.of

    def preserved(self, ids, waiting=()):
        asked.append(list(ids))
        return spared(self, ids, waiting)

    monkeypatch.setattr(PreservedKeys, "of", preserved)
    second = model.edit(PROMPT, NEW, max_steps=1, force=True)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, force=True)
    assert asked == [[], [second.id]]
    model.undo()
    model.undo()
    model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, force=True)
    assert asked[-1] == [first.id] and spared(model._active.preserved_keys, [first.id]), (
        "back, and its inputs still known"
    )


def test_the_same_request_twice_is_made_once(llama, tokenizer):
    model = editable(llama, tokenizer)
    results = model.edit([PROMPT, RECORDS[0].prompt, PROMPT], [OLD, RECORDS[0].target, OLD], max_steps=2, force=True)
    assert len(model.edits) == 2 and results[0].id == results[2].id == model.edits[0].id


def test_a_lora_adapter_has_the_last_edit_of_a_prompt_alone(llama, tokenizer, tmp_path):
    from peft import PeftModel

    model: EditableModel = editable(llama, tokenizer)
    for target in (OLD, NEW):
        model.edit(PROMPT, target, max_steps=2, force=True)
    model.save_lora(tmp_path)
    peft = PeftModel.from_pretrained(build_model("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(all_logits(peft, tokenizer), all_logits(model, tokenizer), rtol=1e-3, atol=1e-4)


def test_a_failed_second_edit_leaves_the_first(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, OLD, max_steps=2, force=True)
    edited = all_logits(model, tokenizer)
    model.editor.forward = lambda factors: {name: (x, delta * float("nan")) for name, (x, delta) in factors.items()}
    with pytest.raises(ValueError, match="finite"):
        model.edit(PROMPT, NEW, force=True)
    assert len(model.edits) == 1 and torch.equal(all_logits(model, tokenizer), edited)
