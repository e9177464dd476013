"""Where edits act in padded passes whose masks say of each token what it sees, against each row alone."""

from __future__ import annotations

import pytest
import torch
from support.models import CAUSAL, RECORDS, VOCAB, initialize
from support.scope import scoped
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from hf_mend.bases.caches import cache_name
from hf_mend.scope.gate import _present


WINDOW = 6
_GEMMA = {**CAUSAL["llama"], "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
BASES = {
    "llama": CAUSAL["llama"],
    "gpt2": CAUSAL["gpt2"],
    "gemma2": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": {**CAUSAL["llama"], "sliding_window": WINDOW},
}
SHORT, LONG = RECORDS[0].prompt, f"the river of kenya is here and {RECORDS[1].prompt}"
OTHER = "the river of kenya is"
TEXTS = [SHORT, OTHER, LONG]
COUNT = 5


def _model(name, tokenizer):
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, **BASES[name]}
    base = initialize(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval())
    model = scoped(base, tokenizer)
    for text, record in zip((SHORT, LONG), RECORDS, strict=False):
        model.edit(text, record.target, max_steps=10, check=False)
    return model


@pytest.fixture(scope="module")
def models(tokenizer):
    return {name: _model(name, tokenizer) for name in BASES}


@pytest.fixture(params=BASES)
def model(request, models):
    model = models[request.param]
    attention = model.base_model.config._attn_implementation
    yield model
    model.set_attn_implementation(attention)


@pytest.fixture
def llama_model(models):
    return models["llama"]


def _padded(model, texts=TEXTS, left=True):
    """Token ids and 2D mask of some texts."""
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(len(row))
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    return ids, mask


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _generated(model, ids, mask, **options):
    """The new tokens and their logits, `(rows, COUNT)` and `(rows, COUNT, vocabulary)`."""
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def _alone(model, texts=TEXTS):
    """What each row says by itself, without padding."""
    rows = [torch.tensor([model.tokenizer(text)["input_ids"]]) for text in texts]
    found = [_generated(model, row, torch.ones_like(row), cache_implementation="dynamic") for row in rows]
    return torch.cat([tokens for tokens, _ in found]), torch.cat([logits for _, logits in found])


def _check_tells_apart(model):
    """The rows that ask for an edit say something else with it, and the one that asks for none says the same."""
    edited = _alone(model)[1]
    with model.disable_edits():
        differs = (edited - _alone(model)[1]).abs().amax((1, 2)) > 0.1
    assert differs.tolist() == [text != OTHER for text in TEXTS]


def _four_d(mask, queries=None):
    """What each of the last tokens sees of all, as models make it: `(rows, 1, queries, width)`, bool."""
    width = mask.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return seen if queries is None else seen[:, :, -queries:]


def _additive(seen):
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def _in_window(seen):
    return seen & torch.ones(seen.shape[-2:], dtype=torch.bool).triu(-WINDOW + 1)


@torch.no_grad()
def _last_logits(model, ids, mask, **inputs):
    return model(input_ids=ids, attention_mask=mask, position_ids=inputs.pop("positions"), **inputs).logits[:, -1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_padded_rows_say_what_each_says_alone(model, cache, attention):
    _check_tells_apart(model)
    if attention == "sdpa" and not model.base_model._supports_sdpa:
        pytest.skip("it has no such attention")
    model.set_attn_implementation(attention)
    tokens, logits = _generated(model, *_padded(model), cache_implementation=cache)
    expected_tokens, expected = _alone(model)
    assert torch.equal(tokens, expected_tokens)
    assert torch.allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("size", [3, 4])
def test_padded_prompts_in_chunks(model, cache, size):
    found = _generated(model, *_padded(model), cache_implementation=cache, prefill_chunk_size=size)
    expected = _alone(model)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-3)


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:2], [SHORT, OTHER], [SHORT, SHORT]])
def test_batches_of_other_lengths_in_a_static_cache(llama_model, texts):
    found = _generated(llama_model, *_padded(llama_model, texts), cache_implementation="static")
    assert torch.allclose(found[1], _alone(llama_model, texts)[1], atol=1e-3)


def test_padding_between_a_conversation_s_turns(model):
    """The second turn of a padded batch goes on from a static cache, with padding between the turns."""
    first, second = [OTHER, LONG, SHORT], [SHORT, OTHER, LONG]
    (ids_1, mask_1), (ids_2, mask_2) = _padded(model, first), _padded(model, second)
    caches = {
        "static": StaticCache(config=model.config, max_cache_len=60),
        "dynamic": DynamicCache(config=model.config),
    }
    found = {}
    for kind, cache in caches.items():
        named = {cache_name(model.base_model): cache}
        _generated(model, ids_1, mask_1, **named)
        # What the first turn generated stands between the two.
        between = cache.get_seq_length() - ids_1.shape[1]
        said = torch.ones(3, int(between), dtype=torch.long)
        both = torch.cat([ids_1, said, ids_2], 1)
        found[kind] = _generated(model, both, torch.cat([mask_1, said, mask_2], 1), **named)
    assert torch.equal(found["static"][0], found["dynamic"][0])
    assert torch.allclose(found["static"][1], found["dynamic"][1], atol=1e-3)


@pytest.mark.parametrize("kind", ["bool", "additive", "minus infinity", "heads"])
def test_a_mask_by_hand(llama_model, kind):
    ids, mask = _padded(llama_model)
    seen = _four_d(mask)
    seen |= torch.eye(seen.shape[-1], dtype=torch.bool) if kind == "minus infinity" else False  # no row is empty
    given = {
        "bool": seen,
        "additive": _additive(seen),
        "minus infinity": torch.where(seen, 0.0, -torch.inf),
        "heads": _additive(seen).expand(-1, 4, -1, -1),
    }[kind]
    found = _last_logits(llama_model, ids, given, positions=_positions(mask))
    assert torch.allclose(found, _alone(llama_model)[1][:, 0], atol=1e-3)


def test_a_mask_by_hand_for_padding_on_the_right(llama_model):
    ids, mask = _padded(llama_model, left=False)
    with torch.no_grad():
        logits = llama_model(input_ids=ids, attention_mask=_four_d(mask)).logits
    last = logits[torch.arange(len(TEXTS)), mask.sum(1) - 1]
    assert torch.allclose(last, _alone(llama_model)[1][:, 0], atol=1e-3)


def test_a_mask_by_hand_of_rows_that_are_not_there_and_see_all(llama_model):
    """Some ways of attention take no row that sees nothing: there padding sees everything."""
    ids, mask = _padded(llama_model)
    seen = _four_d(mask)
    seen |= ~seen.any(-1, keepdim=True)
    found = _last_logits(llama_model, ids, _additive(seen), positions=_positions(mask))
    assert torch.allclose(found, _alone(llama_model)[1][:, 0], atol=1e-3)


def test_a_mask_by_hand_of_texts_in_one_row(llama_model):
    """Texts that do not see one another are there all the same: what is behind another is decided as behind it."""
    rows = [torch.tensor(llama_model.tokenizer(text)["input_ids"]) for text in (SHORT, OTHER)]
    ids, number = torch.cat(rows)[None], torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)])
    packed = (number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        logits = llama_model(input_ids=ids, attention_mask=packed[None, None], position_ids=positions).logits[0]
    expected = _alone(llama_model, [SHORT, OTHER])[1][:, 0]
    assert torch.allclose(logits[len(rows[0]) - 1], expected[0], atol=1e-3)
    assert torch.allclose(logits[-1], expected[1], atol=1e-3)


def test_a_mask_by_hand_for_a_part_behind_a_cache(llama_model):
    ids, mask = _padded(llama_model)
    cut = 3
    cache = DynamicCache(config=llama_model.config)
    positions, named = _positions(mask), {cache_name(llama_model.base_model): cache, "use_cache": True}
    seen = _four_d(mask)
    _last_logits(llama_model, ids[:, :cut], seen[..., :cut, :cut], positions=positions[:, :cut], **named)
    found = _last_logits(llama_model, ids[:, cut:], seen[..., cut:, :], positions=positions[:, cut:], **named)
    assert torch.allclose(found, _alone(llama_model)[1][:, 0], atol=1e-3)


def test_a_mask_by_hand_of_each_kind_of_attention(models):
    model = models["gemma3_text"]
    ids, mask = _padded(model)
    seen = _four_d(mask)
    given = {"sliding_attention": _additive(_in_window(seen)), "full_attention": _additive(seen)}
    found = _last_logits(model, ids, given, positions=_positions(mask))
    assert torch.allclose(found, _alone(model)[1][:, 0], atol=1e-3)


@pytest.mark.parametrize("left", [True, False])
def test_a_mask_by_hand_of_a_window(models, left):
    """Padding on the right that is wider than the window: the last tokens see none of the text."""
    model = models["mistral"]
    ids, mask = _padded(model, left=left)
    assert ids.shape[1] - len(model.tokenizer(SHORT)["input_ids"]) > WINDOW
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=_in_window(_four_d(mask)), position_ids=_positions(mask)).logits
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    assert torch.allclose(logits[torch.arange(len(TEXTS)), last], _alone(model)[1][:, 0], atol=1e-3)


def test_a_mask_that_says_nothing_of_the_pass_s_tokens_leaves_all_of_them_there():
    """What is no mask of these rows and tokens: masks of attention's own kinds, and of other widths."""
    for mask in (None, object(), {}, {"full_attention": None, "sliding_attention": torch.zeros(2, 1, 3, 3)}):
        assert _present(mask, 2, 0, 3) is None
    for shape in [(2, 1, 3, 2), (2, 1, 2, 3), (3, 1, 3, 3), (2, 3, 3), (2, 2), (3, 3)]:
        assert _present(torch.ones(shape, dtype=torch.bool), 2, 0, 3) is None


def test_nothing_is_computed_of_masks_in_passes_of_one_token():
    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func in (torch.Tensor.dim, torch.Tensor.__len__), func
            return super().__torch_function__(func, types, args, kwargs or {})

    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool).as_subclass(Untouchable)
    assert _present(mask, 2, 5, 1) is None and _present({"full_attention": mask}, 2, 5, 1) is None
