"""Where edits act in passes of the stack of blocks alone, in those that break off, and in continuous batching."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import CAUSAL, RECORDS, editable
from support.scope import scoped
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from hf_mend.bases.caches import cache_name
from hf_mend.scope.cache_layer import ScopeLayer


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
OTHER = "the river of kenya is"
PAGED = "do not act where they should in continuous batching"


def _edited(base, tokenizer):
    model = scoped(base, tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    return model


@pytest.fixture(params=CAUSAL)
def model(request, _built_models, tokenizer):
    return _edited(copy.deepcopy(_built_models[request.param]), tokenizer)


@pytest.fixture
def llama_model(llama, tokenizer):
    return _edited(llama, tokenizer)


def _ids(model, text):
    return torch.tensor([model.tokenizer(text)["input_ids"]])


@torch.no_grad()
def _of_stack(model, *args, **inputs):
    """The logits of a pass of the stack of blocks, called by itself as by code that computes a loss in chunks."""
    return model.get_output_embeddings()(model.get_decoder()(*args, **inputs)[0])


@torch.no_grad()
def _of_model(model, *args, **inputs):
    return model(*args, **inputs).logits


def _check_acts(model, logits, inputs):
    """The logits are those of a pass in which an edit acts."""
    with model.disable_edits():
        assert not torch.allclose(logits, _of_model(model, **inputs), atol=1e-2)


def _padded(model, left=True):
    """A text that asks for the edit, behind or before padding, and a text that does not."""
    one, other = _ids(model, PROMPT)[0], _ids(model, f"{OTHER} here and there {OTHER}")[0]
    missing = len(other) - len(one)
    assert missing > 0
    places = slice(missing, None) if left else slice(len(one))
    ids, mask = torch.stack([torch.zeros_like(other), other]), torch.ones(2, len(other), dtype=torch.long)
    ids[0, places], mask[0] = one, 0
    mask[0, places] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type != "opt":  # which counts by the mask
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def _nothing_left(model):
    return model._gate._local.current is None


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_pass_of_the_stack_is_as_the_model_s(model, left):
    inputs = _padded(model, left)
    found = _of_stack(model, **inputs)
    assert torch.allclose(found, _of_model(model, **inputs), atol=1e-4)
    here = -1 if left else inputs["attention_mask"][0].sum() - 1
    assert torch.allclose(found[0, here], _of_model(model, input_ids=_ids(model, PROMPT))[0, -1], atol=1e-3)
    _check_acts(model, found, inputs)
    assert _nothing_left(model)


def test_the_stack_s_tokens_one_by_one_are_as_the_whole(model):
    ids = _ids(model, f"{PROMPT} {TARGET}")
    cache, found = DynamicCache(config=model.config), []
    for token in ids.split(1, 1):
        found.append(_of_stack(model, input_ids=token, use_cache=True, **{cache_name(model.base_model): cache}))
        assert _nothing_left(model)
    whole = _of_model(model, input_ids=ids)
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-4)
    _check_acts(model, whole, {"input_ids": ids})
    assert [type(layer) for layer in cache.layers].count(ScopeLayer) == 1


def test_padded_texts_in_pieces_through_the_stack_and_the_model(llama_model):
    inputs = _padded(llama_model)
    cache, found = DynamicCache(config=llama_model.config), []
    named = {cache_name(llama_model.base_model): cache, "use_cache": True}
    for start, run in zip(range(0, inputs["input_ids"].shape[1], 4), [_of_stack, _of_model] * 9, strict=False):
        end = start + 4
        piece = {"input_ids": inputs["input_ids"][:, start:end], "attention_mask": inputs["attention_mask"][:, :end]}
        found.append(run(llama_model, **piece, position_ids=inputs["position_ids"][:, start:end], **named))
    assert torch.allclose(torch.cat(found, 1), _of_model(llama_model, **inputs), atol=1e-4)


@pytest.mark.parametrize("run", [_of_stack, _of_model])
def test_a_mask_given_by_place_is_one(llama_model, run):
    inputs = _padded(llama_model)
    assert torch.allclose(run(llama_model, *inputs.values()), _of_model(llama_model, **inputs), atol=1e-4)


class _Stop(BaseException):
    """As an interrupt: torch calls no hook of a pass after it."""


@pytest.mark.parametrize("error", [ValueError, _Stop])
@pytest.mark.parametrize("run", [_of_stack, _of_model])
@pytest.mark.parametrize("place", ["embeddings", "first block", "last block", "norm", "head"])
def test_a_pass_that_breaks_off_is_none_of_the_next_ones(llama_model, run, place, error):
    base, inputs = llama_model.base_model, _padded(llama_model)
    expected = _of_model(llama_model, **inputs)
    module = {
        "embeddings": base.model.embed_tokens,
        "first block": base.model.layers[0],
        "last block": base.model.layers[-1],
        "norm": base.model.norm,
        "head": base.lm_head,
    }[place]

    def fail(*args):
        raise error

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(error):
        run(llama_model, input_ids=_ids(llama_model, OTHER), attention_mask=torch.ones_like(_ids(llama_model, OTHER)))
    hook.remove()
    assert error is _Stop or _nothing_left(llama_model)
    assert torch.allclose(_of_stack(llama_model, **inputs), expected, atol=1e-4) and _nothing_left(llama_model)
    assert torch.allclose(_of_model(llama_model, **inputs), expected, atol=1e-4) and _nothing_left(llama_model)


def test_a_pass_of_the_stack_in_one_of_the_model_is_part_of_it(llama_model):
    """What the model was given counts: here another module makes the embeddings, so that the stack gets no tokens."""
    base, ids = llama_model.base_model, _ids(llama_model, PROMPT)
    expected = _of_model(llama_model, input_ids=ids)
    given = []

    def embed(module, args, kwargs):
        given.append(llama_model._gate._local.current)
        return args, kwargs | {"inputs_embeds": base.get_input_embeddings()(kwargs.pop("input_ids"))}

    hook = base.model.register_forward_pre_hook(embed, with_kwargs=True)
    found = _of_model(llama_model, input_ids=ids)
    hook.remove()
    assert torch.equal(found, expected) and torch.equal(given[0].tokens, ids)
    assert _nothing_left(llama_model)


def test_blocks_called_by_themselves_make_a_pass_each_time(llama_model):
    base, ids = llama_model.base_model, _ids(llama_model, PROMPT)
    expected = _of_model(llama_model, input_ids=ids)
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        for _ in range(2):
            hidden = base.model.embed_tokens(ids)
            tables = base.model.rotary_emb(hidden, positions)
            for block in base.model.layers:
                hidden = block(hidden, position_embeddings=tables, position_ids=positions)
        found = base.lm_head(base.model.norm(hidden))
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(_of_stack(llama_model, **_padded(llama_model))[0, -1], expected[0, -1], atol=1e-3)


def test_the_stack_has_no_hooks_without_edits(llama_model):
    llama_model.undo()
    stack = llama_model.get_decoder()
    assert not stack._forward_hooks and not stack._forward_pre_hooks


def test_a_copy_hooks_its_own_stack(llama_model):
    twin = copy.deepcopy(llama_model)
    inputs = _padded(llama_model)
    assert torch.equal(_of_stack(twin, **inputs), _of_stack(llama_model, **inputs))
    assert twin._gate.stack is twin.get_decoder() is not llama_model.get_decoder()


# ---- continuous batching ----


def _in_a_batch(model, texts):
    """The tokens that transformers' continuous batching generates."""
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    out = model.base_model.generate_batch(
        rows,
        generation_config=GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64),
        warmup=False,
    )
    return [one.generated_tokens for one in out.values()]


def test_a_paged_cache_beside_edits_with_a_scope_is_warned_of(llama_model, caplog):
    _in_a_batch(llama_model, [PROMPT, OTHER])
    assert caplog.text.count(PAGED) == 1 and "padded batches" in caplog.text


@pytest.mark.parametrize("kind", ["no edit", "disabled edits", "edits everywhere"])
def test_continuous_batching_without_scopes_is_as_generation(llama, tokenizer, caplog, kind):
    model = editable(llama, tokenizer) if kind == "edits everywhere" else scoped(llama, tokenizer)
    if kind != "no edit":
        model.edit(PROMPT, TARGET, max_steps=5, check=False)
    if kind == "disabled edits":
        model.disable_edit(model.edits[0].id)
    found = _in_a_batch(model, [PROMPT, OTHER])
    for text, tokens in zip((PROMPT, OTHER), found, strict=True):
        out = model.generate(_ids(model, text), max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert out[0, -3:].tolist() == tokens
    assert PAGED not in caplog.text
