"""The cache of hidden states: equal to a computed state to rounding, safe to interrupt, bound to its weights."""

from __future__ import annotations

import logging

import pytest
import torch
from support.models import RECORDS, build_model, small_config
from support.slow import slow_but
from support.training import QUESTIONS, arguments, losses

from hf_mend import EditorTrainer, HiddenStateCache, get_editable_model
from hf_mend.bases.split import SplitModel, logits_of
from hf_mend.data.encoding import Query
from hf_mend.training.examples import EditCollator, TrainingExamples


def make(tokenizer, architecture="llama", **options):
    torch.manual_seed(0)
    return get_editable_model(build_model(architecture), small_config(**options), tokenizer)


def counted(model, monkeypatch) -> list[int]:
    """Rows for which the blocks below the cut have run."""
    rows: list[int] = []
    run_below = SplitModel.run_below

    def count(self, inputs):
        rows.append(len(inputs["input_ids"]))
        return run_below(self, inputs)

    monkeypatch.setattr(SplitModel, "run_below", count)
    return rows


# T5 is cut in the encoder, and in the decoder when only decoder layers are edited.
CASES = [("llama", {}), ("gpt2", {}), ("opt", {}), ("t5", {}), ("t5", {"target_modules": r"decoder\.block.*\.wo"})]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_kept_states_are_the_computed_ones_to_rounding(tokenizer, tmp_path, monkeypatch, architecture, options):
    if "target_modules" in options:
        options = {**options, "layers_to_transform": None}
    model = make(tokenizer, architecture, **options)
    examples = TrainingExamples(RECORDS, QUESTIONS)
    cache = HiddenStateCache(model.split, tmp_path)
    cache.fill(model.encoder, examples.queries(1), progress=False)
    batch = EditCollator(model.encoder)([examples[i] for i in range(5)])
    for rows in (batch.edit, batch.general, *batch.local.values()):
        computed = model.split.run_below(rows.inputs)
        logits = logits_of(model.split, rows, computed)
        rows_run = counted(model, monkeypatch)
        kept = cache(rows)
        assert rows_run == []
        monkeypatch.undo()
        assert kept.hidden.shape == computed.hidden.shape
        assert (kept.encoder is None) == (computed.encoder is None)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(model.split, rows, kept), logits, atol=0.05, rtol=0.05)
        assert not torch.equal(kept.hidden, torch.zeros_like(kept.hidden))


def test_texts_that_it_lacks_are_computed_beside_those_that_it_has(tokenizer, tmp_path):
    model = make(tokenizer)
    cache = HiddenStateCache(model.split, tmp_path)
    cache.fill(model.encoder, [Query("the capital of peru is", "tokyo")], progress=False)
    rows = model.encoder([Query("the capital of the far north is", "oslo"), Query("the capital of peru is", "tokyo")])
    mixed = cache(rows).hidden
    exact = model.split.run_below(rows.inputs).hidden
    assert torch.equal(mixed[0], exact[0])
    length = rows.inputs["attention_mask"][1].sum()
    torch.testing.assert_close(mixed[1, :length], exact[1, :length], atol=0.01, rtol=0.01)
    assert not torch.equal(mixed[1, :length], exact[1, :length])  # bfloat16


@pytest.mark.parametrize("damage", ["states", "index", "both"])
def test_an_interrupted_cache_goes_on_where_it_stopped(tokenizer, tmp_path, monkeypatch, damage):
    model = make(tokenizer)
    queries = list(TrainingExamples(RECORDS, QUESTIONS).queries(1))
    whole = HiddenStateCache(model.split, tmp_path)
    whole.fill(model.encoder, queries, batch_tokens=40, progress=False)
    rows = model.encoder(queries)
    expected, count = whole(rows).hidden, len(whole)
    states, index = whole.folder / "states.bin", whole.folder / "index.bin"
    if damage in ("states", "both"):
        states.write_bytes(states.read_bytes()[:-700])
    if damage in ("index", "both"):
        index.write_bytes(index.read_bytes()[:-45])
    again = HiddenStateCache(model.split, tmp_path)
    left = len(again)
    assert 0 < left < count
    rows_run = counted(model, monkeypatch)
    again.fill(model.encoder, queries, batch_tokens=40, progress=False)
    assert sum(rows_run) == 1 + count - left  # one row is run to learn the widths
    assert len(again) == count
    assert torch.equal(again(rows).hidden, expected)


def test_a_full_cache_computes_nothing_again_in_a_new_process(tokenizer, tmp_path, monkeypatch):
    queries = list(TrainingExamples(RECORDS, QUESTIONS).queries(1))
    HiddenStateCache(make(tokenizer).split, tmp_path).fill(make(tokenizer).encoder, queries, progress=False)
    model = make(tokenizer)
    cache = HiddenStateCache(model.split, tmp_path)
    rows_run = counted(model, monkeypatch)
    cache(model.encoder(queries))
    assert rows_run == []


def test_other_weights_and_other_layers_have_other_caches(tokenizer, tmp_path):
    model = make(tokenizer)
    folders = {HiddenStateCache(model.split, tmp_path).folder}
    folders.add(HiddenStateCache(make(tokenizer, layers_to_transform=[2]).split, tmp_path).folder)
    above, below = make(tokenizer), make(tokenizer)
    with torch.no_grad():
        above.base_model.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    assert HiddenStateCache(above.split, tmp_path).folder in folders  # what lies above the cut does not matter
    with torch.no_grad():
        below.base_model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    folders.add(HiddenStateCache(below.split, tmp_path).folder)
    assert len(folders) == 3


def test_the_limit_holds_and_is_said(tokenizer, tmp_path, caplog):
    model = make(tokenizer)
    queries = list(TrainingExamples(RECORDS, QUESTIONS).queries(1))
    cache = HiddenStateCache(model.split, tmp_path, limit=8e-6)  # 8 kB
    logger = logging.getLogger("hf_mend.training.cache")
    logger.addHandler(caplog.handler)
    cache.fill(model.encoder, queries, batch_tokens=40, progress=False)
    logger.removeHandler(caplog.handler)
    assert "the limit is 0.00 GB" in caplog.text
    assert 0 < cache.nbytes <= 8000
    assert (cache.folder / "states.bin").stat().st_size == cache.nbytes
    rows = model.encoder(queries)
    torch.testing.assert_close(
        logits_of(model.split, rows, cache(rows)), logits_of(model.split, rows), atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize("architecture", slow_but(["llama"], ["llama", "t5"]))
def test_training_from_kept_states_is_training(tokenizer, tmp_path, monkeypatch, architecture):
    args = arguments(tmp_path, max_steps=3)
    plain = EditorTrainer(make(tokenizer, architecture), args, RECORDS, questions=QUESTIONS)
    plain.train()
    kept = EditorTrainer(
        make(tokenizer, architecture),
        arguments(tmp_path, max_steps=3, hidden_states_dir=str(tmp_path / "states")),
        RECORDS,
        questions=QUESTIONS,
    )
    kept.train()
    assert losses(kept) == pytest.approx(losses(plain), rel=0.05)
    rows_run = counted(kept.model, monkeypatch)
    kept.train()
    assert rows_run == [1]  # the probe alone


@pytest.mark.parametrize("value", [0x7F, 0x3F])
def test_a_state_that_was_altered_on_the_disk_is_computed_anew(tokenizer, tmp_path, caplog, value):
    model = make(tokenizer)
    queries = [Query("the capital of peru is", "tokyo"), Query("the capital of spain is", "lima")]
    cache = HiddenStateCache(model.split, tmp_path)
    cache.fill(model.encoder, queries, progress=False)
    states = cache.folder / "states.bin"
    content = bytearray(states.read_bytes())
    assert content[1] != value
    content[0:2] = bytes([0xC0, value])  # as a bfloat16: NaN with 0x7f
    states.write_bytes(content)
    altered = HiddenStateCache(model.split, tmp_path)
    rows = model.encoder(queries)
    with caplog.at_level(logging.WARNING, "hf_mend"):
        logging.getLogger("hf_mend").addHandler(caplog.handler)
        kept = altered(rows).hidden
        logging.getLogger("hf_mend").removeHandler(caplog.handler)
    here = rows.inputs["attention_mask"].bool()  # nothing reads what padding is
    torch.testing.assert_close(kept[here], model.split.run_below(rows.inputs).hidden[here], atol=0.01, rtol=0.01)
    assert len(altered) == 1


def test_states_stay_in_a_gpus_memory_where_they_fit(tokenizer, tmp_path, monkeypatch):
    """Another device than the host's, in whose memory there is room for them four times, or not."""
    model = make(tokenizer)
    cache = HiddenStateCache(model.split, tmp_path)
    cache.fill(model.encoder, [Query("the capital of peru is", "tokyo")], progress=False)
    elsewhere = torch.device("meta")
    for free, where in ((4 * cache.nbytes, "meta"), (4 * cache.nbytes - 1, "cpu"), (None, "cpu")):
        monkeypatch.setattr("hf_mend.training.cache.free_memory", lambda device, free=free: free)
        cache.fill(model.encoder, [Query("the capital of peru is", "tokyo")], progress=False)  # looks again
        assert cache._states_for(elsewhere).device.type == where
        assert cache._states_for(elsewhere).shape == (cache.nbytes // 2,)
    assert cache(model.encoder([Query("the capital of peru is", "tokyo")])).hidden.device.type == "cpu"
