"""One call of `edit`: what its edits and results are, against ordinary passes of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import RECORDS, all_logits, build_model, editable, probability

from hf_mend.editing.edit_result import EditResult
from hf_mend.edits.low_rank import dense


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def test_edit_raises_the_targets_probability(base, tokenizer):
    model = editable(base, tokenizer)
    before = probability(model, PROMPT, TARGET)
    result = model.edit(PROMPT, TARGET, max_steps=8)
    after = probability(model, PROMPT, TARGET)
    assert after > before
    assert result.probability_before == pytest.approx(before, rel=1e-3, abs=1e-7)
    assert result.probability_after == pytest.approx(after, rel=1e-3, abs=1e-7)
    assert result.success == all(result.token_success)
    assert result.rank > 0 and set(result.update_norms) == {t.name for t in model.targets}
    assert result.id == model.edits[0].id and result.id in str(result)


def test_an_edit_that_did_not_take_says_so(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.editor.scale_steps(1e-9)
    result = model.edit(PROMPT, TARGET, max_steps=1)
    assert not result.success and "DID NOT TAKE" in str(result)


def test_results_of_one_call_tell_of_all_its_edits(llama, tokenizer):
    model = editable(llama, tokenizer)
    results = model.edit(RECORDS[:3], max_steps=2, batch_size=2)
    for record, result in zip(RECORDS, results, strict=False):
        assert result.probability_after == pytest.approx(probability(model, record.prompt, record.target), rel=1e-3)
        assert [probe.after for probe in result.locality] == [
            tokenizer.decode(all_logits(model, tokenizer, text)[0, -1].argmax()).strip()
            for text in record.neighborhood
        ]


def test_a_target_that_is_the_answer_already_changes_nothing(llama, tokenizer):
    model = editable(llama, tokenizer)
    assert model.edit(PROMPT, TARGET, max_steps=40).success
    before = all_logits(model, tokenizer)
    result = model.edit(PROMPT, TARGET)
    assert result.already_known and result.id is None and result.success and len(model.edits) == 1
    assert "already the model's answer" in str(result)
    assert torch.equal(all_logits(model, tokenizer), before)


def test_force_edits_what_is_known_already(llama, tokenizer):
    model = editable(llama, tokenizer)
    first = model.edit(PROMPT, TARGET, max_steps=40)
    assert first.success
    result = model.edit(PROMPT, TARGET, force=True)
    assert result.steps >= 1
    assert result.superseded == first.id
    assert len(model.edits) == 2


def test_without_the_check_the_edit_is_the_same_and_the_result_knows_less(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    checked = all_logits(model, tokenizer)
    model.undo()
    result = model.edit(PROMPT, TARGET, check=False)
    assert torch.equal(all_logits(model, tokenizer), checked)
    assert result.success is None
    assert result.after is None
    assert "not checked" in str(result)


def test_edits_under_inference_mode(llama, tokenizer):
    model = editable(llama, tokenizer)
    with torch.inference_mode():
        inside = model.edit(PROMPT, TARGET, max_steps=1)
    model.undo()
    assert model.edit(PROMPT, TARGET, max_steps=1).probability_after == inside.probability_after


def test_lists_give_the_edits_that_each_request_gives_alone(base, tokenizer):
    model = editable(base, tokenizer)
    results = model.edit([r.prompt for r in RECORDS[:5]], [r.target for r in RECORDS[:5]], max_steps=1, batch_size=2)
    assert [r.prompt for r in results] == [r.prompt for r in RECORDS[:5]]
    assert [e.id for e in model.edits] == [r.id for r in results]
    batch = {edit.prompt: edit for edit in model.undo_all()}
    for record in RECORDS[:5]:
        model.edit(record.prompt, record.target, max_steps=1)
        alone = model.undo()
        for name, (u, v) in alone.updates.items():
            torch.testing.assert_close(
                batch[record.prompt].updates[name][1].T @ batch[record.prompt].updates[name][0], v.T @ u,
                rtol=1e-3, atol=1e-5,
            )  # fmt: skip


def test_later_edits_see_earlier_ones(llama, tokenizer):
    first, second = editable(llama, tokenizer), editable(build_model("llama"), tokenizer)
    second.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1)
    a = first.edit(PROMPT, TARGET, max_steps=1)
    b = second.edit(PROMPT, TARGET, max_steps=1)
    assert a.probability_before != b.probability_before
    u, v = first.edits[-1].updates[first.targets[-1].name]
    u2, v2 = second.edits[-1].updates[first.targets[-1].name]
    assert not torch.allclose(v.T @ u, v2.T @ u2)


def test_long_targets(llama, tokenizer):
    model = editable(llama, tokenizer)
    result = model.edit("the capital", "rome paris lima tokyo cairo madrid oslo nairobi", max_steps=1)
    assert len(result.token_success) >= 8 and result.probability_after > result.probability_before


@pytest.mark.parametrize("broken", ["gradient", "update"])
def test_not_finite_leaves_the_model_to_the_bit(llama, tokenizer, broken):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[1].prompt, RECORDS[1].target)
    before, edits = all_logits(model, tokenizer), [e.id for e in model.edits]
    with torch.no_grad():
        if broken == "update":
            model.editor.groups[0].log_step.fill_(float("nan"))
        else:
            kept = model.base_model.lm_head.weight.clone()
            model.base_model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(
        ValueError, match=rf"the {broken} of layer 'model\.layers.*NaN or infinity, so nothing was edited"
    ):
        model.edit(PROMPT, TARGET)
    if broken == "gradient":
        with torch.no_grad():
            model.base_model.lm_head.weight.copy_(kept)
    assert [e.id for e in model.edits] == edits
    assert torch.equal(all_logits(model, tokenizer), before)


def test_a_pass_has_no_more_tokens_than_its_bound_and_edits_are_the_same(llama, tokenizer, monkeypatch):
    """However many requests a batch may have; padding counts, and a longer request runs alone."""
    model = editable(llama, tokenizer)
    model.edit(RECORDS, max_steps=1)
    expected = {edit.prompt: edit for edit in model.undo_all()}
    seen = []
    handle = llama.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    monkeypatch.setattr("hf_mend.editing.budget._MOST_ON_CPU", 40)
    model.edit([replace(record, paraphrases=[], neighborhood=[]) for record in RECORDS], max_steps=1)
    handle.remove()
    assert max(rows for rows, _ in seen) > 1 and all(rows == 1 or rows * length <= 40 for rows, length in seen)
    for edit in model.edits:
        for name, update in edit.updates.items():
            torch.testing.assert_close(dense(update), dense(expected[edit.prompt].updates[name]), rtol=1e-3, atol=1e-5)


def test_an_error_in_the_middle_of_a_call_leaves_the_edits_as_they_were(llama, tokenizer, monkeypatch):
    """After the edits were added, while what all of them say together is looked at."""
    model = editable(llama, tokenizer)
    first = model.edit(RECORDS[3].prompt, RECORDS[3].target, max_steps=1, force=True)
    before = all_logits(model, tokenizer)

    set_after = EditResult.set_after

    def interrupted(*args):
        if len(model.edits) == 3:
            raise KeyboardInterrupt
        set_after(*args)

    monkeypatch.setattr(EditResult, "set_after", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.edit(RECORDS[:2], max_steps=1)
    assert model.edits.ids == [first.id] and torch.equal(all_logits(model, tokenizer), before)


def test_an_edit_says_where_it_comes_from_and_its_share_of_the_time(llama, tokenizer):
    model = editable(llama, tokenizer)
    asked = replace(RECORDS[0], subject="france")
    results = model.edit([asked, *RECORDS[1:4], asked], max_steps=1, force=True)
    assert [result.prompt for result in results] == [asked.prompt, *(r.prompt for r in RECORDS[1:4]), asked.prompt]
    assert len({result.seconds for result in results}) == 1 and results[0].seconds > 0
    assert [edit.metadata.get("subject") for edit in model.edits] == ["france", None, None, None]
    assert len({edit.metadata["editor"] for edit in model.edits}) == 1
    for edit, result in zip(model.edits, results, strict=False):
        assert result.update_norms == pytest.approx(
            {name: float(dense(update).norm()) for name, update in edit.updates.items()}, rel=1e-3
        )
        assert result.rank == max(len(u) for u, _ in edit.updates.values())
