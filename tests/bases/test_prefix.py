"""Answers behind what was run once, against ordinary passes over the whole texts and autograd's own gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.architectures import CAUSAL, SEQ2SEQ, build
from support.models import RECORDS, editable, initialize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_mend.bases import beginnings, by_length, prefix
from hf_mend.bases.beginnings import Group, groups_of
from hf_mend.bases.targets import block_lists
from hf_mend.data.encoding import EncodedBatch, Encoder, Query
from hf_mend.editing.context import EditingContext


# Texts of several lengths, with answers of one to four tokens.
QUERIES = [Query(record.prompt, record.target) for record in RECORDS[:5]]
QUERIES += [Query(f"{RECORDS[5].prompt} {RECORDS[0].prompt} {RECORDS[2].prompt}", "lima"), Query("japan has", "a")]


def context_of(base: PreTrainedModel, tokenizer, **options) -> tuple[EditingContext, EncodedBatch]:
    model = editable(base, tokenizer, **{"target_modules": "default", "layers_to_transform": None, **options})
    context = model.context
    return EditingContext(context.split, context.targets, context.method, scoped=True), model.encoder(QUERIES)


def by_autograd(base, targets, rows: EncodedBatch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each row's gradient of each layer by what the layer puts out at the answer's tokens, and the logits there."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name):
        def hook(module, args, output):
            output = output.detach().requires_grad_() if not output.requires_grad else output
            seen[name] = args[0].detach(), output
            return output.clone()  # Falcon adds to a layer's output in place

        return hook

    handles = [target.module.register_forward_hook(keep(target.name)) for target in targets]
    logits = base(**rows.inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    labelled = rows.next_tokens != -100
    loss = torch.nn.functional.cross_entropy(logits[labelled], rows.next_tokens[labelled], reduction="sum")
    deltas = torch.autograd.grad(loss, [output for _, output in seen.values()])
    found = {}
    for (name, (x, _)), delta in zip(seen.items(), deltas, strict=True):
        x, delta = (side.reshape(len(rows), -1, side.shape[-1]) for side in (x, delta))
        found[name] = torch.einsum("rto,rti->roi", delta * rows.positions[..., None], x)
    return found, logits[rows.positions].detach()


@pytest.mark.parametrize("name", CAUSAL)
def test_answers_alone_have_the_logits_and_gradients_of_whole_texts(tokenizer, name):
    base = build(name)
    context, rows = context_of(base, tokenizer)
    hidden, _ = context.at_answers_alone(rows, context.split.run_below(rows.inputs))
    assert hidden.answers is not None
    alone, _ = hidden.answers
    assert alone.next_tokens[alone.next_tokens != -100].tolist() == rows.next_tokens[rows.next_tokens != -100].tolist()
    expected, logits = by_autograd(base, context.targets, rows)
    for _ in range(2):  # what a pass leaves is not in the next
        factors, found = context.trace(rows, hidden)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        for layer, (x, delta) in factors.items():
            gradient = torch.einsum("rto,rti->roi", delta, x)
            torch.testing.assert_close(gradient, expected[layer], rtol=1e-3, atol=1e-5)
    updates = {layer: (x, -0.3 * delta) for layer, (x, delta) in factors.items()}
    whole = context.logits(rows, context.split.run_below(rows.inputs), [updates])
    assert not torch.allclose(whole, logits, atol=1e-3), "the updates change what is compared"
    torch.testing.assert_close(context.logits(rows, hidden, [updates]), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "mixtral"])
def test_some_of_the_rows_and_parts_by_length_are_as_all_at_once(tokenizer, name, monkeypatch):
    context, rows = context_of(build(name), tokenizer)
    state = context.split.run_below(rows.inputs)
    hidden, _ = context.at_answers_alone(rows, state)
    factors, logits = context.trace(rows, hidden)
    monkeypatch.setattr(by_length, "_FEW_TOKENS", 0)  # a part for each length
    parts = by_length.parts_by_length([start for start, _ in rows.places.spans], torch.device("cpu"))
    assert len(parts) > 2 and sorted(sum(parts, [])) == [*range(len(rows))]
    apart, _ = context.at_answers_alone(rows, state)
    _, found = context.trace(rows, apart)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    index = torch.tensor([5, 0])
    some, found = context.trace(rows[index], apart.rows(index))
    places = [rows.places.counts[i] for i in index]
    torch.testing.assert_close(
        found, torch.cat([logits.split(rows.places.counts)[i] for i in index]), rtol=1e-4, atol=1e-4
    )
    assert sum(places) == len(found)
    for layer, (x, delta) in some.items():
        want = torch.einsum("rto,rti->roi", factors[layer][1], factors[layer][0])[index]
        torch.testing.assert_close(torch.einsum("rto,rti->roi", delta, x), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_texts_of_unlike_lengths_run_apart_to_the_same_states(tokenizer, name, monkeypatch):
    context, rows = context_of(build(name), tokenizer)
    split = context.split
    whole = split.run_below(rows.inputs).hidden
    tokens: list[int] = []
    split.blocks[0].register_forward_hook(lambda _, args, output: tokens.append(args[0].shape[0] * args[0].shape[1]))
    monkeypatch.setattr(by_length, "_FEW_TOKENS", 8)
    found = split.state_of(rows).hidden
    lengths = rows.places.lengths
    assert len(tokens) > 1 and sum(lengths) <= sum(tokens) < len(lengths) * max(lengths)
    here = rows.inputs["attention_mask"].bool()
    torch.testing.assert_close(found[here], whole[here], rtol=1e-4, atol=1e-5)


def test_answers_run_their_own_tokens_and_no_more(tokenizer):
    base = build("llama")
    context, rows = context_of(base, tokenizer)
    hidden, _ = context.at_answers_alone(rows, context.split.run_below(rows.inputs))
    tokens: list[int] = []
    base.model.layers[3].mlp.register_forward_hook(lambda _, args, output: tokens.append(output.shape[1]))
    context.trace(rows, hidden)
    context.logits(rows, hidden)
    assert tokens == [max(rows.places.counts)] * 2


def test_what_cannot_go_on_runs_whole_texts_and_says_why(tokenizer, caplog):
    """A model whose cached tokens are not those that were run: its blocks forget them."""
    base = build("llama")
    context, rows = context_of(base, tokenizer)
    attention = base.model.layers[3].self_attn
    forward = attention.forward

    def forgetful(*args, **kwargs):
        kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    attention.forward = forgetful
    caplog.set_level("INFO")
    state = context.split.run_below(rows.inputs)
    hidden, _ = context.at_answers_alone(rows, state)
    assert hidden.answers is None and hidden is state
    assert "runs whole texts where edits act at answers alone (its logits differ)" in caplog.text


def test_a_model_whose_cache_holds_a_state_runs_whole_texts(tokenizer, caplog):
    """LFM2's convolutions change theirs in place, so that it cannot serve two passes."""
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    config = AutoConfig.for_model(
        "lfm2", **settings, num_key_value_heads=2, layer_types=kinds, vocab_size=160, pad_token_id=0
    )
    context, rows = context_of(initialize(AutoModelForCausalLM.from_config(config).eval()), tokenizer)
    caplog.set_level("INFO")
    state = context.split.run_below(rows.inputs)
    assert context.at_answers_alone(rows, state)[0] is state
    assert "(its cache holds a state)" in caplog.text


def test_edits_that_act_everywhere_and_encoder_decoders_run_whole_texts(tokenizer):
    model = editable(build("llama"), tokenizer)
    rows = model.encoder(QUERIES)
    state = model.split.run_below(rows.inputs)
    assert model.context.at_answers_alone(rows, state)[0] is state
    base = build([*SEQ2SEQ][0])
    context, rows = context_of(base, tokenizer)
    state = context.split.run_below(rows.inputs)
    assert context.at_answers_alone(rows, state)[0] is state


def test_prompts_of_one_token_have_nothing_before_their_answers(tokenizer):
    context, _ = context_of(build("llama"), tokenizer)
    rows = EncodedBatch(
        {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)},
        torch.tensor([[6, 7], [8, -100]]),
        torch.tensor([[True, True], [True, False]]),
    )
    state = context.split.run_below(rows.inputs)
    assert context.at_answers_alone(rows, state)[0] is state


def test_memory_that_runs_out_in_the_check_is_not_taken_for_a_model_that_cannot(tokenizer):
    base = build("llama")
    context, rows = context_of(base, tokenizer)
    state = context.split.run_below(rows.inputs)

    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    handle = base.model.layers[3].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        context.at_answers_alone(rows, state)
    handle.remove()
    assert context.at_answers_alone(rows, state)[0].answers is not None


def test_a_gpu_runs_whole_texts_where_launching_kernels_is_what_takes_time():
    """So 16 short edits of a 135M model; not one edit of an 8B model, nor a training step of the small one."""
    small, large, gpu = 135_000_000, 8_000_000_000, torch.device("cuda")
    assert not prefix.pays(gpu, 16 * 2 * 35, small)
    assert prefix.pays(gpu, 2 * 40, large) and prefix.pays(gpu, 80 * 60, small)
    assert prefix.pays(torch.device("cpu"), 1, small)


# What a chat template would write before each of them, and texts that begin otherwise.
BEGINNING = " ".join(record.prompt for record in RECORDS[:4])
ALIKE = [replace(query, prompt=f"{BEGINNING} {query.prompt}") for query in QUERIES] + QUERIES[:2]


def blocks_tokens(base, number: int) -> list[int]:
    """The tokens that a block will run in each of its passes, filled while it does."""
    tokens: list[int] = []
    block = next(one for one in block_lists(base) if one.kind == "decoder").blocks[number]
    block.register_forward_hook(lambda _, args, output: tokens.append(args[0].shape[0] * args[0].shape[1]))
    return tokens


@pytest.mark.parametrize("name", CAUSAL)
def test_what_texts_begin_with_runs_once_to_the_same_logits_and_gradients(tokenizer, name, monkeypatch):
    monkeypatch.setattr(beginnings, "_SAVED", 1)
    base = build(name)
    context, _ = context_of(base, tokenizer)
    rows = Encoder(tokenizer)(ALIKE)
    split, here = context.split, rows.inputs["attention_mask"].bool()
    whole = split.run_below(rows.inputs)
    state = split.state_of(rows)
    torch.testing.assert_close(state.hidden[here], whole.hidden[here], rtol=1e-3, atol=1e-4)
    hidden, _ = context.at_answers_alone(rows, state)
    factors, found = context.trace(rows, hidden)
    expected, logits = by_autograd(base, context.targets, rows)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    for layer, (x, delta) in factors.items():
        gradient = torch.einsum("rto,rti->roi", delta, x)
        torch.testing.assert_close(gradient, expected[layer], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gpt_neox", "qwen3"])
def test_what_texts_begin_with_is_not_run_again(tokenizer, name, monkeypatch):
    monkeypatch.setattr(beginnings, "_SAVED", 1)
    base = build(name)
    context, _ = context_of(base, tokenizer)
    rows = Encoder(tokenizer)(ALIKE)
    split, lengths = context.split, rows.places.lengths
    context.at_answers_alone(rows, split.state_of(rows))  # the first use checks
    below, above = blocks_tokens(base, 0), blocks_tokens(base, split.block)
    state = split.state_of(rows)
    shared = len(tokenizer(BEGINNING)["input_ids"])
    (group, rest) = groups_of(rows.inputs["input_ids"], [n - 1 for n in lengths])
    assert group.rows == [*range(len(QUERIES))] and group.tokens >= shared and rest == Group([7, 8])
    assert sum(below) < len(rows) * max(lengths) - shared * (len(QUERIES) - 2) and below[0] == group.tokens
    del above[:]
    context.at_answers_alone(rows, state)
    assert above[0] == group.tokens and sum(above) < len(rows) * max(lengths) - shared * (len(QUERIES) - 2)


def test_some_of_rows_that_begin_alike_are_as_all_at_once(tokenizer, monkeypatch):
    monkeypatch.setattr(beginnings, "_SAVED", 1)
    monkeypatch.setattr(by_length, "_FEW_TOKENS", 0)
    context, _ = context_of(build("llama"), tokenizer)
    rows = Encoder(tokenizer)(ALIKE)
    state = context.split.state_of(rows)
    hidden, _ = context.at_answers_alone(rows, state)
    _, logits = context.trace(rows, hidden)
    index = torch.tensor([8, 5, 0])
    _, found = context.trace(rows[index], hidden.rows(index))
    parts = logits.split(rows.places.counts)
    torch.testing.assert_close(found, torch.cat([parts[i] for i in index]), rtol=1e-4, atol=1e-4)


def test_a_beginning_runs_by_itself_where_that_saves_enough():
    ids = torch.arange(40).repeat(5, 1)
    ids[3:, 0] = 7
    assert groups_of(ids, [39] * 5) == [Group([0, 1, 2, 3, 4])], "78 tokens and 39 saved"
    assert groups_of(torch.cat([ids, ids[:1]]), [39] * 6) == [Group([0, 1, 2, 5], 39), Group([3, 4])]
    ids[1, 30] = 0
    assert groups_of(ids[:3].repeat(2, 1), [39] * 6) == [Group([*range(6)], 30)]
    assert groups_of(ids[:3].repeat(2, 1), [39] * 5 + [7])[1] == Group([5]), (
        "a text shorter than what tells them apart"
    )
    assert groups_of(ids[:3].repeat(2, 1), [39] * 5 + [20]) == [Group([*range(6)], 20)]


def test_a_first_edit_of_one_text_does_not_say_that_texts_share_nothing(tokenizer):
    context, _ = context_of(build("llama"), tokenizer)
    rows = Encoder(tokenizer)(ALIKE[:1])
    context.at_answers_alone(rows, context.split.state_of(rows))
    assert context.split.begins_alike
