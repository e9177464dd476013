"""Where edits act, in every way in which a text can come: against one plain pass over it."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import CAUSAL, RECORDS
from support.scope import scoped
from transformers import DynamicCache, StaticCache

from hf_mend.edits.low_rank import dense
from hf_mend.scope.cache_layer import ScopeLayer


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
OTHER = "the river of kenya is"


@pytest.fixture(params=list(CAUSAL))
def model(request, _built_models, tokenizer):
    model = scoped(copy.deepcopy(_built_models[request.param]), tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    return model


@pytest.fixture
def llama_model(llama, tokenizer):
    model = scoped(llama, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    return model


def _ids(model, text):
    return torch.tensor([model.tokenizer(text)["input_ids"]])


@torch.no_grad()
def _logits(model, text, **inputs):
    return model(input_ids=_ids(model, text), **inputs).logits[0]


def test_an_edit_acts_at_its_prompts_end_and_nowhere_else(model):
    edit = model.edits[0]
    here = len(model.tokenizer(PROMPT)["input_ids"]) - 1
    edited = _logits(model, f"{PROMPT} kenya")
    with model.disable_edits():
        base = _logits(model, f"{PROMPT} kenya")
    assert torch.equal(edited[:here], base[:here])
    assert not torch.allclose(edited[here], base[here], atol=1e-3)
    # By hand: the layer's output at that token alone.
    hooks = []
    for target in model.targets:
        u, v = edit.updates[target.name]
        matrix = dense((u.float(), v.float()))

        def add(module, args, output, matrix=matrix):
            flat = output.reshape(-1, output.shape[-1]).clone()
            flat[here] += args[0].reshape(-1, args[0].shape[-1])[here] @ matrix.T
            return flat.reshape(output.shape)

        hooks.append(target.module.register_forward_hook(add))
    with model.disable_edits():
        by_hand = _logits(model, f"{PROMPT} kenya")
    for hook in hooks:
        hook.remove()
    assert torch.allclose(edited, by_hand, atol=1e-4)


def test_other_texts_get_the_bases_logits_bit_for_bit(model):
    edited = _logits(model, OTHER)
    with model.disable_edits():
        assert torch.equal(edited, _logits(model, OTHER))


def test_rows_beside_one_another_get_their_own(model):
    ids = [model.tokenizer(text)["input_ids"] for text in (PROMPT, OTHER)]
    width = max(map(len, ids)) + 2
    batch = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, one in enumerate(ids):
        batch[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
    with torch.no_grad():
        edited = model(input_ids=batch, attention_mask=mask).logits
        with model.disable_edits():
            base = model(input_ids=batch, attention_mask=mask).logits
    assert torch.equal(edited[1], base[1])
    assert torch.allclose(edited[0, len(ids[0]) - 1], _logits(model, PROMPT)[-1], atol=1e-4)
    assert not torch.allclose(edited[0, len(ids[0]) - 1], base[0, len(ids[0]) - 1], atol=1e-3)


@pytest.mark.parametrize("pieces", ["tokens", "chunks"])
def test_a_text_in_pieces_through_a_cache_is_as_the_whole(model, pieces):
    text = f"{OTHER} and {PROMPT} {TARGET}"
    whole, ids = _logits(model, text), _ids(model, text)
    size = 1 if pieces == "tokens" else 5
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start in range(0, ids.shape[1], size):
            out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
            found.append(out.logits[0])
    assert torch.allclose(torch.cat(found), whole, atol=1e-4)
    assert [type(layer) for layer in cache.layers].count(ScopeLayer) == 1


@torch.no_grad()
def _by_plain_passes(model, ids, count):
    """Greedy tokens without any cache."""
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("how", ["greedy", "no cache", "static", "prefill chunks", "dynamic"])
def test_generation_is_as_without_a_cache(model, how):
    ids = _ids(model, PROMPT)
    options = {
        "greedy": {},
        "no cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "prefill chunks": {"prefill_chunk_size": 3},
        "dynamic": {"cache_implementation": "dynamic"},
    }[how]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip
    with torch.no_grad():
        expected = _by_plain_passes(model, ids, 6)
    # min_new_tokens forbids the end token, which a plain pass may choose.
    if model.config.eos_token_id not in expected:
        assert torch.equal(out, expected)


def test_beam_search_is_as_without_a_cache(llama_model):
    ids = _ids(llama_model, PROMPT)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with_cache = llama_model.generate(input_ids=ids, attention_mask=mask, **options)
    without = llama_model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_assisted_generation_is_greedy_generation(llama_model, tokenizer):
    from support.models import build_model

    assistant = build_model("llama", seed=3)
    ids = _ids(llama_model, PROMPT)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    alone = llama_model.generate(input_ids=ids, **options)
    assert torch.equal(llama_model.generate(input_ids=ids, assistant_model=assistant, **options), alone)


def test_left_padding(model):
    ids = _ids(model, PROMPT)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {} if model.config.model_type in ("opt",) else {"position_ids": positions}
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=mask, **inputs).logits[0, -1]
    assert torch.allclose(found, _logits(model, PROMPT)[-1], atol=1e-3)


def test_a_row_of_padding_alone_gets_no_edit(llama_model):
    ids = torch.cat([_ids(llama_model, PROMPT), torch.zeros_like(_ids(llama_model, PROMPT))])
    mask = torch.stack([torch.ones_like(ids[0]), torch.zeros_like(ids[0])])
    with torch.no_grad():
        edited = llama_model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(edited[0, -1], _logits(llama_model, PROMPT)[-1], atol=1e-4)


def test_a_conversation_goes_on_from_its_cache(llama_model):
    llama_model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, check=False)
    first, second = f"{PROMPT} {TARGET}", f" {RECORDS[1].prompt}"
    cache = DynamicCache(config=llama_model.config)
    with torch.no_grad():
        llama_model(input_ids=_ids(llama_model, first), past_key_values=cache)
        later = llama_model(input_ids=_ids(llama_model, second), past_key_values=cache).logits[0]
    both = torch.cat([_ids(llama_model, first), _ids(llama_model, second)], 1)
    with torch.no_grad():
        whole = llama_model(input_ids=both).logits[0]
    assert torch.allclose(later, whole[-len(later) :], atol=1e-4)


def test_a_cache_of_before_the_edit_is_told_of(llama, tokenizer, caplog):
    model = scoped(llama, tokenizer)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=_ids(model, OTHER), past_key_values=cache)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    with torch.no_grad():
        model(input_ids=_ids(model, PROMPT), past_key_values=cache)
    assert "were read before there were edits" in caplog.text and "without the cache" in caplog.text


def test_a_static_cache_by_hand(llama_model):
    text = f"{PROMPT} {TARGET}"
    ids, cache = _ids(llama_model, text), StaticCache(config=llama_model.config, max_cache_len=40)
    with torch.no_grad():
        first = llama_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits[0]
        last = llama_model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0]
    assert torch.allclose(torch.cat([first, last]), _logits(llama_model, text), atol=1e-4)


def test_nothing_is_hooked_without_edits_and_nothing_stays_after_them(llama, tokenizer):
    model = scoped(llama, tokenizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    before = _logits(model, PROMPT)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    with model.disable_edits():
        assert torch.equal(_logits(model, PROMPT), before)
    model.undo()
    assert torch.equal(_logits(model, PROMPT), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
