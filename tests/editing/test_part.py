"""A search goes on with the facts that do not say their targets yet, and with no others."""

from __future__ import annotations

import pytest
import torch
from support.architectures import build
from support.models import RECORDS, build_model, editable
from support.scope import scoped
from support.slow import slow_but

from hf_mend.data.encoding import Query
from hf_mend.data.places import Places
from hf_mend.editing import part
from hf_mend.editing.scoring import score_targets


NAMES = ["llama", "gpt2", "mistral", "gemma2", "bart", "t5"]
FACTS = torch.tensor([3, 1])
QUERIES = [Query(record.prompt, record.target) for record in RECORDS[:4]]
FORMS = [form for query in QUERIES for form in (query, Query(f"rome has lima. {query.prompt}", query.answer))]


@pytest.mark.parametrize("has_scope", [False, True])
@pytest.mark.parametrize(
    "name", slow_but(["llama", "gemma2", "t5"], ["llama", "gpt2", "mistral", "gemma2", "bart", "t5"])
)
def test_some_facts_by_themselves_are_what_they_are_in_the_batch(tokenizer, name, has_scope):
    model = (scoped if has_scope else editable)(build(name), tokenizer)
    context = model.context
    rows = model.encoder(FORMS, forms=2) if has_scope else model.encoder.with_further(QUERIES)
    hidden, further = context.at_answers_alone(rows, *context.split.run_below_further(rows))
    factors, logits = context.trace(rows, hidden)
    some = part.part_of(context.split, rows, hidden, further, FACTS)
    assert not some.is_whole and some.rows.forms == rows.forms and some.rows.facts == 2
    index = some.rows.next_tokens.shape[1], some.rows.inputs.get("attention_mask")
    again = Places.of(some.rows.positions, some.rows.next_tokens, index[1], some.rows.positions.device)
    if "decoder_input_ids" not in some.rows.inputs:
        for field in ("counts", "said", "spans", "lengths", "pads_right"):
            assert getattr(some.rows.places, field) == getattr(again, field)
        assert torch.equal(some.rows.places.positions, again.positions)
        assert torch.equal(some.rows.places.labels, again.labels)
    own, own_logits = context.trace(some.rows, some.hidden)
    answers, expected = score_targets(some.rows, own_logits), score_targets(rows, logits)
    assert answers.log_probability == pytest.approx([expected.log_probability[i] for i in FACTS], rel=1e-4)
    assert answers.tokens == [expected.tokens[i] for i in FACTS]
    placed = some.in_place(own, rows)
    for layer, sides in factors.items():
        for side, found in zip(sides, placed[layer], strict=True):
            assert torch.allclose(found[FACTS], side[FACTS], atol=1e-5) and not found[[0, 2]].any()
    updates = context.method(placed), context.method(factors)
    for layer, sides in updates[1].items():
        for side, found in zip(sides, updates[0][layer], strict=True):
            assert torch.allclose(found[FACTS], side[FACTS], atol=1e-5) and not found[[0, 2]].any()
    if further is not None:
        behind = context.logits(some.rows.further, some.further)
        assert torch.allclose(behind, _at(rows.further, context.logits(rows.further, further)), atol=1e-4)


def _at(rows, values):
    parts = values.split(rows.places.counts)
    return torch.cat([parts[i] for i in FACTS])


def without_an_editor(base, tokenizer):
    """Edits with a scope by the default method, which joins the steps of an edit's forms."""
    return scoped(base, tokenizer, method="gradient", ridge=0.01, margin=1.0)


@pytest.mark.parametrize(("make", "steps"), [(editable, 4), (scoped, 4), (without_an_editor, 20)])
def test_edits_of_a_call_are_those_of_a_search_that_runs_all_of_them(tokenizer, monkeypatch, make, steps):
    """Overshooting steps are tried at a half, a quarter and an eighth: the passes of that are of these rows alone."""
    asked = [(RECORDS[0].prompt, "rome paris lima"), *((r.prompt, r.target) for r in RECORDS[1:5])]
    found, sizes = {}, {}
    for narrowed in (False, True):
        monkeypatch.setattr(part, "pays", lambda *args, narrowed=narrowed: narrowed)
        model = make(build_model("llama"), tokenizer)
        model.editor.scale_steps(4.0)
        seen = sizes[narrowed] = []
        before = type(model.split).run_above
        monkeypatch.setattr(
            type(model.split),
            "run_above",
            lambda self, inputs, *args, seen=seen, before=before, **more: (
                seen.append(len(inputs["input_ids"])) or before(self, inputs, *args, **more)
            ),
        )
        prompts, targets = map(list, zip(*asked, strict=True))
        found[narrowed] = model.edit(prompts, targets, max_steps=steps, force=True, keep_failed=True)
        monkeypatch.undo()
    assert sum(sizes[True]) < sum(sizes[False]) and len(sizes[True]) == len(sizes[False])
    for one, other in zip(found[True], found[False], strict=True):
        assert (one.steps, one.success, one.rank) == (other.steps, other.success, other.rank)
        assert one.probability_after == pytest.approx(other.probability_after, rel=1e-3)
