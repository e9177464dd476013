"""torch.compile and edits: what was compiled never answers without the edits that a model carries."""

from __future__ import annotations

import pytest
import torch
from support.models import RECORDS, build_model, editable
from support.scope import scoped
from transformers import CompileConfig

from hf_mend.bases.compiled import uncompiled


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


def said(model, tokenizer, backend=None):
    """The logits of a few generated tokens: with a backend, in a static cache and compiled, as on a GPU."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    more = {}
    if backend is not None:
        config = CompileConfig(backend=backend, mode=None, fullgraph=False)
        config._compile_all_devices = True
        more = {"cache_implementation": "static", "compile_config": config}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, **more,
    )  # fmt: skip
    return torch.stack(out.logits)


def states(model):
    """Without edits, with one, with two, with one again, and without: all that a compiled graph may have missed."""
    yield "none"
    model.edit(PROMPT, TARGET, max_steps=1, keep_failed=True)
    yield "one"
    model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, keep_failed=True)
    yield "two"
    model.undo()
    yield "one"
    model.undo_all()
    yield "none"


@pytest.mark.parametrize("make", [editable, scoped])
def test_a_generation_that_is_compiled_without_edits_sees_those_that_come(llama, tokenizer, backend, make):
    model = make(llama, tokenizer)
    graphs = []
    for _ in states(model):
        torch.testing.assert_close(said(model, tokenizer, backend), said(model, tokenizer), rtol=1e-4, atol=1e-4)
        graphs.append(backend.graphs)
    assert graphs[0] > 0, "without edits it is compiled"
    assert set(graphs) == {graphs[0]}, "an edit and its undo compile nothing"


@torch.no_grad()
def test_a_compiled_editable_model_sees_its_edits(llama, tokenizer, backend):
    model, ids = editable(llama, tokenizer), tokenizer(PROMPT, return_tensors="pt").input_ids
    compiled = torch.compile(model, backend=backend)
    seen = {}
    for state in states(model):
        logits = compiled(input_ids=ids).logits
        assert torch.equal(logits, model(input_ids=ids).logits)
        assert torch.equal(seen.setdefault(state, logits), logits)
    assert not torch.equal(seen["none"], seen["one"]) and not torch.equal(seen["one"], seen["two"])


@torch.no_grad()
def test_a_base_that_is_compiled_while_it_carries_edits_sees_them_change(llama, tokenizer, backend):
    model, ids = editable(llama, tokenizer), tokenizer(PROMPT, return_tensors="pt").input_ids
    model.edit(PROMPT, TARGET, max_steps=1)
    model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1)
    expected = [llama(input_ids=ids).logits]
    call = torch.compile(llama, backend=backend)
    for _ in range(2):  # what a first call leaves behind may count as new to the next
        torch.testing.assert_close(call(input_ids=ids).logits, expected[0], rtol=1e-4, atol=1e-4)
    graphs = backend.graphs
    model.undo()
    torch.testing.assert_close(call(input_ids=ids).logits, llama(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (llama(input_ids=ids).logits - expected[0]).abs().max() > 0.1, "the edit matters"
    assert graphs == backend.graphs > 0, "nothing is compiled anew"


def by_compile(base, backend):
    base.compile(backend=backend)


def by_forward(base, backend):
    base.forward = torch.compile(base.forward, backend=backend)


def by_a_block(base, backend):
    base.model.layers[1].compile(backend=backend)


@pytest.mark.parametrize("compile_it", [by_compile, by_forward, by_a_block])
def test_a_base_that_is_compiled_in_place_is_refused_before_and_after_it_is_wrapped(tokenizer, backend, compile_it):
    base = build_model("llama")
    model = editable(base, tokenizer)
    edit = editable(build_model("llama"), tokenizer)
    edit.edit(PROMPT, TARGET, max_steps=1)
    compile_it(base, backend)
    message = r"(Llama|layers\.1).* was compiled in place .* load the base model without"
    with pytest.raises(ValueError, match=message):
        model.edit(PROMPT, TARGET)
    with pytest.raises(ValueError, match=message):
        model._active.replace(edit.edits)  # as loading and stores do
    assert not model.edits and not model._active.is_hooked
    with pytest.raises(ValueError, match=message):
        editable(base, tokenizer)


def test_what_runs_uncompiled_is_no_part_of_a_graph(backend):
    added = [1.0]

    @uncompiled
    def further(x):
        return x + added[0]

    call = torch.compile(lambda x: further(x * 2) * 3, backend=backend)
    results = []
    for added[0] in (1.0, 2.0, 3.0):
        results.append(float(call(torch.ones(()))))
    assert results == [9.0, 12.0, 15.0] and backend.graphs == 2
