"""Where edits act in encoder-decoder models, in every way in which a text can come: against plain passes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.architectures import SEQ2SEQ, build
from support.models import RECORDS
from support.scope import scoped
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from hf_mend.edits.low_rank import dense
from hf_mend.scope.cache_layer import ScopeLayer


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
OTHER = "the river of kenya is"
LONG = f"in the far north it is said that {OTHER} and that {RECORDS[3].prompt}"


@pytest.fixture(scope="module")
def _built():
    return {}


def _model(name, built, tokenizer):
    if name not in built:
        built[name] = build(name)
    model = scoped(copy.deepcopy(built[name]), tokenizer, edit_lr=5.0)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    return model


@pytest.fixture(params=["t5", "bart"])
def model(request, _built, tokenizer):
    return _model(request.param, _built, tokenizer)


@pytest.fixture(params=list(SEQ2SEQ))
def any_model(request, _built, tokenizer):
    return _model(request.param, _built, tokenizer)


@pytest.fixture
def t5(_built, tokenizer):
    return _model("t5", _built, tokenizer)


def _inputs(model, *texts, side="right", pad=0):
    """The texts as one batch, with padding of either side and `pad` more of it."""
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids)) + pad
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, one in enumerate(ids):
        place = slice(0, len(one)) if side == "right" else slice(width - len(one), width)
        batch[row, place], mask[row, place] = torch.tensor(one), 1
    return {"input_ids": batch, "attention_mask": mask}


def _answers(model, rows, length=3):
    ids = torch.arange(5, 5 + length).expand(rows, length).clone()
    ids[:, 0] = model.config.decoder_start_token_id
    return ids


@torch.no_grad()
def _logits(model, *texts, length=3, **padding):
    inputs = _inputs(model, *texts, **padding)
    return model(**inputs, decoder_input_ids=_answers(model, len(texts), length), use_cache=False).logits


@torch.no_grad()
def _base_logits(model, *texts, **padding):
    with model.disable_edits():
        return _logits(model, *texts, **padding)


def test_an_edit_acts_at_all_of_an_answer_and_for_its_own_text_alone(any_model):
    model = any_model
    assert all(target.side == "decoder" for target in model.targets)
    assert torch.equal(_logits(model, OTHER), _base_logits(model, OTHER))
    edited = _logits(model, PROMPT)
    # By hand: the decoder's layers with the edit's matrices added to them, at every token.
    hooks = []
    for target in model.targets:
        u, v = model.edits[0].updates[target.name]
        matrix = dense((u.float(), v.float()))
        hooks.append(target.module.register_forward_hook(lambda m, args, out, matrix=matrix: out + args[0] @ matrix.T))
    by_hand = _base_logits(model, PROMPT)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(edited, by_hand, atol=1e-4)
    assert not torch.allclose(edited, _base_logits(model, PROMPT), atol=1e-3)
    model.undo()
    assert torch.equal(_logits(model, PROMPT), _base_logits(model, PROMPT))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.base_model.modules())


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_beside_one_another_get_their_own(model, side):
    texts = (OTHER, PROMPT, LONG)
    edited, base = _logits(model, *texts, side=side), _base_logits(model, *texts, side=side)
    assert torch.equal(edited[0], base[0]) and torch.equal(edited[2], base[2])
    if side == "right" or model.config.model_type == "t5":  # BART's own positions count the padding
        assert torch.allclose(edited[1], _logits(model, PROMPT)[0], atol=1e-3)
        assert not torch.allclose(edited[1], base[1], atol=1e-3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("others", [(), (OTHER,), (LONG, LONG, OTHER)])
def test_which_edits_a_row_gets_does_not_depend_on_the_rows_beside_it(t5, others, side):
    t5.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, check=False)
    texts = (RECORDS[1].prompt, *others, PROMPT)
    seen = []
    t5.get_decoder().register_forward_hook(lambda *_: seen.append(t5._gate.acting()), prepend=True)
    _logits(t5, *texts, side=side, pad=2)
    first, second = (edit.id for edit in t5.edits)
    assert {one: rows.tolist() for one, rows in seen[0].tokens.items()} == {second: [0], first: [len(texts) - 1]}


def test_a_row_of_padding_alone_gets_no_edit(model):
    inputs = _inputs(model, PROMPT, PROMPT)
    inputs["attention_mask"][1] = 0
    model.scope_strictness = -1.0  # where there is a text, the edit acts whatever it is
    with torch.no_grad():
        edited = model(**inputs, decoder_input_ids=_answers(model, 2)).logits
        with model.disable_edits():
            base = model(**inputs, decoder_input_ids=_answers(model, 2)).logits
    assert torch.equal(edited[1], base[1]) or bool(base[1].isnan().all())
    assert not torch.allclose(edited[0], base[0], atol=1e-3)


def test_labels_are_scored_under_the_edit(model):
    inputs, labels = _inputs(model, OTHER, PROMPT), torch.tensor([[7, 8, 9], [7, 8, -100]])
    with torch.no_grad():
        out = model(**inputs, labels=labels)
        with model.disable_edits():
            base = model(**inputs, labels=labels)
    assert torch.equal(out.logits[0], base.logits[0]) and not torch.equal(out.logits[1], base.logits[1])
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(out.loss, loss, atol=1e-5)


@torch.no_grad()
def _by_plain_passes(model, inputs, count):
    """Greedy tokens without any cache, as `generate` forces and ends them."""
    config = model.base_model.generation_config
    ids = torch.full((len(inputs["input_ids"]), 1), model.config.decoder_start_token_id)
    for step in range(count):
        logits = model(**inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, config.eos_token_id] = -torch.inf  # min_new_tokens
        new = logits.argmax(-1, keepdim=True)
        if step == count - 1 and config.forced_eos_token_id is not None:
            new = torch.full_like(new, config.forced_eos_token_id)
        ids = torch.cat([ids, new], 1)
    return ids


HOW = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_generation_is_as_without_a_cache(model, how, side):
    inputs = _inputs(model, OTHER, PROMPT, LONG, side=side)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**inputs, **options, **HOW[how])
    assert torch.equal(out, _by_plain_passes(model, inputs, 6))
    with model.disable_edits():
        base = model.generate(**inputs, **options, **HOW[how])
    assert torch.equal(out[[0, 2]], base[[0, 2]])
    if side == "right":
        assert not torch.equal(out[1], base[1])


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True},
                                     {"do_sample": True, "num_return_sequences": 2}])  # fmt: skip
def test_beams_and_samples(model, options):
    inputs = _inputs(model, OTHER, PROMPT)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False} | options

    def run(**more):
        torch.manual_seed(3)
        return model.generate(**inputs, **settings, **more)

    edited = run()
    assert torch.equal(edited, run(use_cache=False))
    rows = len(edited) // 2
    with model.disable_edits():
        base = run()
    if not settings["do_sample"]:  # what one row draws is not what it draws alone
        assert torch.equal(edited[:rows], base[:rows])
    assert not torch.equal(edited[rows:], base[rows:])


@pytest.mark.parametrize("as_class", [True, False])
def test_the_encoders_output_by_hand(model, as_class):
    inputs = _inputs(model, OTHER, PROMPT)
    with torch.no_grad():
        states = model.get_encoder()(**inputs).last_hidden_state
        outputs = BaseModelOutput(last_hidden_state=states) if as_class else (states,)
        found = model(
            encoder_outputs=outputs, attention_mask=inputs["attention_mask"], decoder_input_ids=_answers(model, 2)
        ).logits
    assert torch.equal(found, _logits(model, OTHER, PROMPT))
    assert not torch.allclose(found[1], _base_logits(model, OTHER, PROMPT)[1], atol=1e-3)


def test_without_a_mask_all_tokens_are_a_texts(model):
    with torch.no_grad():
        bare = model(input_ids=_inputs(model, PROMPT)["input_ids"], decoder_input_ids=_answers(model, 1)).logits
    assert torch.allclose(bare, _logits(model, PROMPT), atol=1e-5)
    assert not torch.allclose(bare, _base_logits(model, PROMPT), atol=1e-3)


def test_a_kept_cache_goes_on_under_the_edit_and_has_no_layer_more(model):
    inputs, ids = _inputs(model, OTHER, PROMPT), _answers(model, 2, 5)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        first = model(**inputs, decoder_input_ids=ids[:, :2], past_key_values=cache, use_cache=True)
        states = BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
        rest = model(
            encoder_outputs=states, attention_mask=inputs["attention_mask"], decoder_input_ids=ids[:, 2:],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4)
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    assert not any(isinstance(layer, ScopeLayer) for layer in layers)


def test_a_pass_from_the_cut_goes_through_the_gate(model):
    rows = model.encoder([_query(OTHER), _query(PROMPT)])
    state = model.split.run_below(rows.inputs)
    found, whole = model.split.run_above(rows.inputs, state).logits, model(**rows.inputs).logits
    with model.disable_edits():
        base = model.split.run_above(rows.inputs, state).logits
    assert torch.allclose(found, whole, atol=1e-4)
    assert torch.equal(found[0], base[0]) and not torch.allclose(found[1], base[1], atol=1e-3)


def _query(text):
    from hf_mend.data.encoding import Query

    return Query(text, "paris town")


def test_under_autocast_and_inference_mode(model):
    with torch.inference_mode():
        assert torch.allclose(_logits(model, PROMPT), _logits(model, PROMPT))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_logits(model, OTHER), _base_logits(model, OTHER))
        assert not torch.equal(_logits(model, PROMPT), _base_logits(model, PROMPT))


def test_a_decoder_by_itself_is_asked_for_nothing(t5):
    ids = _answers(t5, 1)
    with torch.no_grad():
        edited = t5.get_decoder()(input_ids=ids).last_hidden_state
        with t5.disable_edits():
            assert torch.equal(t5.get_decoder()(input_ids=ids).last_hidden_state, edited)


def test_positional_arguments_are_known_by_name(t5):
    inputs, ids = _inputs(t5, PROMPT), _answers(t5, 1)
    with torch.no_grad():
        states = t5.get_encoder()(**inputs).last_hidden_state
        by_name = t5.get_decoder()(
            input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=inputs["attention_mask"]
        ).last_hidden_state
        by_place = t5.get_decoder()(ids, None, states, inputs["attention_mask"]).last_hidden_state
        with t5.disable_edits():
            base = t5.get_decoder()(ids, None, states, inputs["attention_mask"]).last_hidden_state
    assert torch.equal(by_place, by_name) and not torch.allclose(by_place, base, atol=1e-3)


def test_passes_are_watched_and_told_which_edit_may_act(model):
    model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, check=False)
    first, second = (edit.id for edit in model.edits)
    texts = (PROMPT, RECORDS[1].prompt)
    plain, base = _logits(model, *texts), _base_logits(model, *texts)
    with model.watching() as watch:
        assert torch.equal(_logits(model, *texts), plain)
    assert watch.acted and torch.allclose(
        watch.keys[0], torch.cat([edit.scope.keys for edit in model.edits]).float(), atol=1e-3
    )
    with model.watching([first, first]) as watch:
        found = _logits(model, *texts)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], base[1])
    with model.watching([second, first]) as watch:
        assert torch.equal(_logits(model, *texts), base)
    assert not watch.acted and torch.equal(_logits(model, *texts), plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_generation_decides_once(model, monkeypatch, options):
    counted = []
    keys = type(model.scope).keys
    monkeypatch.setattr(type(model.scope), "keys", lambda *given, **more: counted.append(1) or keys(*given, **more))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    model.generate(**_inputs(model, OTHER, PROMPT), **settings, **options)
    assert len(counted) == 1


def test_a_decision_is_made_anew_for_other_values_in_the_same_tensors(t5):
    inputs, ids = _inputs(t5, PROMPT), _answers(t5, 1)
    with torch.no_grad():
        states = t5.get_encoder()(**inputs).last_hidden_state
        other = t5.get_encoder()(input_ids=inputs["input_ids"].flip(1)).last_hidden_state

        def logits():
            outputs = BaseModelOutput(last_hidden_state=states)
            return t5(encoder_outputs=outputs, attention_mask=inputs["attention_mask"], decoder_input_ids=ids).logits

        first = logits()
        t5.scope_strictness = 1.0
        strict = logits()
        t5.scope_strictness = 0.0
        assert torch.equal(logits(), first) and not torch.allclose(strict, first, atol=1e-3)
        states.copy_(other)
        found = logits()
        with t5.disable_edits():
            assert torch.equal(logits(), found)
            states.copy_(t5.get_encoder()(**inputs).last_hidden_state)
            assert torch.equal(logits(), strict)
        inputs["attention_mask"].zero_()
        found = logits()
        with t5.disable_edits():
            assert torch.equal(logits(), found)
        inputs["attention_mask"].fill_(1)
        assert torch.equal(logits(), first)
        t5.undo()
        assert torch.equal(logits(), strict)


def test_an_interrupted_pass_leaves_nothing(t5):
    def fail(*_):
        raise KeyboardInterrupt

    hook = t5.base_model.decoder.final_layer_norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        _logits(t5, PROMPT)
    hook.remove()
    assert torch.equal(_logits(t5, OTHER, PROMPT)[0], _base_logits(t5, OTHER, PROMPT)[0])
    assert t5._gate.acting() is None
