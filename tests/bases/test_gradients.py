"""Factors against autograd's own weight gradients, and split passes against whole ones."""

from __future__ import annotations

import pytest
import torch
from support.gradients import autograd_gradients, encoder_for, queries
from support.models import ARCHITECTURES, RECORDS, SEQ2SEQ, build_model, editable, small_config

from hf_mend.bases.gradients import record_inputs, trace
from hf_mend.bases.known_mask import KnownMask
from hf_mend.bases.split import SplitModel, logits_of
from hf_mend.bases.targets import find_targets
from hf_mend.data.encoding import EncodedBatch, Query


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_factors_sum_to_autograds_weight_gradient(base, tokenizer, rows_at_once):
    targets = find_targets(base, small_config())
    rows = encoder_for(base, tokenizer)(queries()[:rows_at_once])
    expected = autograd_gradients(base, targets, rows)
    factors, _ = trace(SplitModel(base, targets), targets, rows.inputs, rows.next_tokens)
    assert set(factors) == {t.name for t in targets}
    for target in targets:
        x, delta = factors[target.name]
        assert x.shape[:2] == delta.shape[:2]
        gradient = torch.einsum("bto,bti->oi", delta, x)  # (d_out, d_in)
        want = expected[target.name]
        want = want.T if want.shape != gradient.shape else want
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


def test_factors_of_a_row_do_not_depend_on_its_batch(base, tokenizer):
    targets = find_targets(base, small_config())
    split, encoder = SplitModel(base, targets), encoder_for(base, tokenizer)
    together = encoder(queries())
    factors, _ = trace(split, targets, together.inputs, together.next_tokens)
    for i, query in enumerate(queries()):
        alone = encoder([query])
        single, _ = trace(split, targets, alone.inputs, alone.next_tokens)
        for name, (x, delta) in single.items():
            for mine, batch in ((x, factors[name][0]), (delta, factors[name][1])):
                torch.testing.assert_close(batch[i, : mine.shape[1]], mine[0], rtol=1e-4, atol=1e-5)
                assert not batch[i, mine.shape[1] :].any(), "padding carries no factor"


def test_left_padding_changes_nothing_but_rounding(tokenizer):
    model = build_model("llama").requires_grad_(False)
    targets = find_targets(model, small_config())
    split, encoder = SplitModel(model, targets), encoder_for(model, tokenizer)
    rows = encoder(queries()[:1])
    padded = {
        "input_ids": torch.nn.functional.pad(rows.inputs["input_ids"], (3, 0)),
        "attention_mask": torch.nn.functional.pad(rows.inputs["attention_mask"], (3, 0)),
    }
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    labels = torch.nn.functional.pad(rows.next_tokens, (3, 0), value=-100)
    right, _ = trace(split, targets, rows.inputs, rows.next_tokens)
    left, _ = trace(split, targets, padded, labels)
    for name in right:
        for a, b in zip(right[name], left[name], strict=True):
            torch.testing.assert_close(b[:, 3:], a, rtol=1e-4, atol=1e-5)
            assert not b[:, :3].any()


@pytest.mark.parametrize("blocks", [[0, 1], [1], [2, 3]])
def test_a_pass_from_the_kept_state_is_the_whole_pass(base, tokenizer, blocks):
    targets = find_targets(base, small_config(layers_to_transform=blocks))
    rows = encoder_for(base, tokenizer)(queries())
    with torch.no_grad():
        whole = base(**rows.inputs).logits[rows.positions]
        split = SplitModel(base, targets)
        state = split.run_below(rows.inputs)
        torch.testing.assert_close(logits_of(split, rows, state), whole)
        # Some of the rows, and in another order: the state follows.
        index = torch.tensor([2, 0])
        torch.testing.assert_close(
            logits_of(split, rows[index], state.rows(index)),
            base(**rows[index].inputs).logits[rows[index].positions],
        )


def test_padding_behind_a_text_is_not_masked_where_it_changes_nothing(base, tokenizer, architecture):
    """The model is told that nothing is masked, and gives the logits of the masked pass."""
    split = SplitModel(base, find_targets(base, small_config()))
    rows = encoder_for(base, tokenizer)([Query(record.prompt, record.target) for record in RECORDS])
    assert not rows.inputs["attention_mask"].all()
    split.run_below(rows.inputs)
    told = split.inputs_of(rows)["attention_mask"]
    assert isinstance(told, KnownMask) == (architecture not in ("t5", "bart"))
    with torch.no_grad():
        expected = base(**rows.inputs).logits[rows.positions]
        torch.testing.assert_close(base(**split.inputs_of(rows)).logits[rows.positions], expected)
        flipped = {name: value.flip(-1) for name, value in rows.inputs.items()}
        left = EncodedBatch(flipped, rows.next_tokens.flip(-1), rows.positions.flip(-1))
    assert split.inputs_of(left) is left.inputs, "padding before a text moves it"


def test_padding_is_masked_where_it_changes_what_stands_before(llama, tokenizer):
    """A model whose tokens see later ones, as far as the mask lets them."""
    masks = []
    llama.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )

    def sees_all(module, args, output):
        present = masks[-1][..., None].to(output.dtype)
        return output + (output * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)

    llama.model.layers[0].register_forward_hook(sees_all)
    split = SplitModel(llama, find_targets(llama, small_config()))
    rows = encoder_for(llama, tokenizer)(queries())
    split.run_below(rows.inputs)
    assert split.inputs_of(rows) is rows.inputs


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_decoder_edits_keep_the_encoders_output(base, tokenizer, architecture):
    names = r".*decoder\.(block|layers)\.[23]\..*(wo|fc2)"
    targets = find_targets(base, small_config(target_modules=names, layers_to_transform=None))
    rows = encoder_for(base, tokenizer)(queries())
    split = SplitModel(base, targets)
    state = split.run_below(rows.inputs)
    assert state.encoder is not None
    with torch.no_grad():
        torch.testing.assert_close(logits_of(split, rows, state), base(**rows.inputs).logits[rows.positions])


def test_no_weight_gradient_and_no_graph_below(base, tokenizer):
    model = editable(base, tokenizer)
    rows = model.encoder(queries())
    trace(model.split, model.targets, rows.inputs, rows.next_tokens)
    assert all(p.grad is None for p in base.parameters())
    assert not model.split.run_below(rows.inputs).hidden.requires_grad


def test_recorded_inputs_are_the_real_tokens(base, tokenizer):
    model = editable(base, tokenizer)
    encoder = model.encoder
    together = record_inputs(model.split, model.targets, encoder(queries()))
    apart = [record_inputs(model.split, model.targets, encoder([query])) for query in queries()]
    for target in model.targets:
        want = torch.cat([part[target.name] for part in apart])
        torch.testing.assert_close(together[target.name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_cross_attention_reads_the_encoder_s_tokens(base, tokenizer):
    cross = r"decoder.*(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)"
    model = editable(base, tokenizer, target_modules=f".*{cross}", layers_to_transform=None)
    assert len(model.targets) == 8
    for asked in (queries(), [Query("x", "the capital of peru is lima town"), Query("the river of peru is", "x")]):
        rows = model.encoder(asked)
        found = record_inputs(model.split, model.targets, rows)
        with torch.no_grad():
            mask = rows.inputs["attention_mask"]
            hidden = base.get_encoder()(rows.inputs["input_ids"], attention_mask=mask).last_hidden_state
        for target in model.targets:
            torch.testing.assert_close(found[target.name], hidden[mask.bool()])


def test_a_failed_pass_leaves_the_blocks_as_they_were(llama, tokenizer):
    model = editable(llama, tokenizer)
    rows = model.encoder(queries())
    state = model.split.run_below(rows.inputs)
    state.hidden = state.hidden[:, :2]
    with pytest.raises(RuntimeError):
        logits_of(model.split, rows, state)
    assert all("forward" not in block.__dict__ for block in model.split.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_a_model_that_cannot_be_split_falls_back_to_whole_passes_with_one_warning(llama, tokenizer, caplog):
    """Here block 3 reads what block 0 left behind, beside the hidden state: a cut at block 2 would lose it."""
    llama.requires_grad_(False)
    kept = {}
    blocks = llama.model.layers
    blocks[0].register_forward_hook(lambda module, args, output: kept.update(value=output.clone()))
    blocks[3].register_forward_hook(lambda module, args, output: output + kept.pop("value", 0.0))
    targets = find_targets(llama, small_config(layers_to_transform=[2, 3]))
    rows = encoder_for(llama, tokenizer)(queries())
    expected = autograd_gradients(llama, targets, rows)
    split = SplitModel(llama, targets)
    for _ in range(2):
        factors, logits = trace(split, targets, rows.inputs, rows.next_tokens)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be run from block 2 on (logits differ by" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(logits, llama(**rows.inputs).logits[rows.positions])
    for target in targets:
        x, delta = factors[target.name]
        torch.testing.assert_close(torch.einsum("bto,bti->oi", delta, x), expected[target.name], rtol=1e-4, atol=1e-5)


def test_every_family_is_covered():
    assert {"gpt2", "llama", "gpt_neox", "gptj", "opt", "t5", "bart"} == set(ARCHITECTURES)


def test_a_layer_that_no_gradient_reaches_is_named(llama, tokenizer):
    class Cut(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs).detach()

    model = editable(llama, tokenizer)
    model.base_model.model.norm = Cut(model.base_model.model.norm)
    with pytest.raises(ValueError, match=r"no gradient reaches the layer 'model\.layers.*another quantisation"):
        model.edit(RECORDS[0].prompt, RECORDS[0].target)
    assert model.edits == []
