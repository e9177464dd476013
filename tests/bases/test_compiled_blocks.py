"""Blocks that are compiled for the passes of edits: the same edits to rounding, and nothing that misses a hook."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from accelerate import cpu_offload
from support.compiling import Overwriting
from support.models import ARCHITECTURES, RECORDS, build_model, editable
from support.scope import scoped
from support.slow import slow_but
from transformers import CompileConfig

from hf_mend.bases.compiled import LENGTHS, CompiledBlocks, compiling, kept
from hf_mend.edits.low_rank import dense


def config(backend) -> CompileConfig:
    return CompileConfig(backend=backend, mode=None, fullgraph=False)


def edits_of(model, count=3):
    """What a model's edits are, made one by one and in a call, beside those before."""
    first = model.edit(RECORDS[0], max_steps=2, force=True)
    model.edit(RECORDS[1 : 1 + count], max_steps=1, force=True)
    edits, said = list(model.edits), first.probability_after
    model.undo_all()
    return edits, said


def assert_same(edits, others):
    assert len(edits) == len(others) > 0
    for edit, other in zip(edits, others, strict=True):
        for name, update in edit.updates.items():
            torch.testing.assert_close(dense(other.updates[name]), dense(update), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", slow_but(["llama", "t5"], ARCHITECTURES))
def test_edits_are_those_of_blocks_that_run_as_they_are(tokenizer, backend, architecture):
    model = editable(build_model(architecture), tokenizer)
    edits, said = edits_of(model)
    model.set_compile_config(config(backend))
    compiled, said_by_compiled = edits_of(model)
    assert_same(edits, compiled)
    assert said_by_compiled == pytest.approx(said, rel=1e-3)
    assert backend.graphs > 0 or model.split.block == 0, "there are blocks that no edit changes"
    graphs = backend.graphs
    edits_of(model)
    assert backend.graphs == graphs, "what was compiled serves later edits"
    model.set_compile_config(None)
    edits_of(model)
    assert backend.graphs == graphs and model._compiled is None


def test_edits_with_a_scope_are_the_same_and_keys_too(llama, tokenizer, backend):
    model = scoped(llama, tokenizer, layers_to_transform=[1])
    edits, _ = edits_of(model)
    model.set_compile_config(config(backend))
    compiled, _ = edits_of(model)
    assert backend.graphs > 0
    for edit, other in zip(edits, compiled, strict=True):
        assert edit.scope.texts == other.scope.texts
        torch.testing.assert_close(edit.scope.keys, other.scope.keys, rtol=1e-2, atol=2e-3)


def test_one_graph_serves_all_blocks_and_few_serve_all_lengths(tokenizer, backend):
    model = editable(build_model("llama"), tokenizer, layers_to_transform=[1])
    model.set_compile_config(config(backend))
    lengths = set()
    for record in RECORDS[:6]:
        model.edit(record, max_steps=1, force=True)
        lengths.add(model.encoder.pad([(list(range(4, 4 + len(record.prompt))), [])]).positions.shape[1])
        model.undo_all()
    assert all(length % LENGTHS == 0 for length in lengths)
    assert backend.graphs <= 6, "with and without a gradient, of one row and of several"


def test_a_hook_within_a_block_is_seen(tokenizer, backend):
    """A user's own, that comes after the block was compiled."""
    model = editable(build_model("llama"), tokenizer, layers_to_transform=[1])
    model.set_compile_config(config(backend))
    edits_of(model, 1)
    seen = []
    layer = model.base_model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(1))
    edits_of(model, 1)
    assert seen
    handle.remove()


def test_blocks_whose_layers_accelerate_moves_run_as_they_are(tokenizer, backend):
    edits, _ = edits_of(editable(build_model("llama"), tokenizer, layers_to_transform=[1]))
    base = build_model("llama")
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = editable(base, tokenizer, layers_to_transform=[1])
    model.set_compile_config(config(backend))
    assert_same(edits, edits_of(model)[0])
    assert backend.graphs == 0


@torch.no_grad()
def test_what_is_kept_of_a_pass_stays_when_the_next_one_writes_over_it(tokenizer):
    torch._dynamo.reset()
    model = editable(build_model("llama"), tokenizer, layers_to_transform=[2])
    one, other = (model.encoder.pad([(list(range(start, start + 8)), [])]).inputs for start in (5, 20))
    model.split.run_below(one)  # the first use checks the passes as they are
    expected = model.split.run_below(one).hidden
    with compiling(CompiledBlocks(config(Overwriting()))):
        model.split.run_below(other)
        found = model.split.run_below(one).hidden
        torch.testing.assert_close(found, expected)
        model.split.run_below(other)
    torch.testing.assert_close(found, expected)
    assert kept(found) is found, "outside of such calls nothing is copied"


def test_weights_that_change_are_seen(tokenizer, backend):
    model = editable(build_model("llama"), tokenizer, layers_to_transform=[1])
    model.set_compile_config(config(backend))
    before, _ = edits_of(model, 1)
    with torch.no_grad():
        model.base_model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    after, _ = edits_of(model, 1)
    model.set_compile_config(None)
    plain, _ = edits_of(model, 1)
    assert_same(plain, after)
    was, now = (dense(one[0].updates[model.targets[0].name]) for one in (before, after))
    assert not torch.allclose(was, now, rtol=1e-3)


@torch.no_grad()
def test_only_calls_that_make_edits_run_compiled_blocks(tokenizer, backend):
    model = editable(build_model("llama"), tokenizer, layers_to_transform=[1])
    model.edit(RECORDS[0], max_steps=1, force=True)
    model.set_compile_config(config(backend))
    rows = model.encoder.pad([([5, 6, 7], [8])])
    model.split.state_of(rows)
    model(**rows.inputs)
    assert backend.graphs == 0, "a later pass may be in a training, whose gradients come after it"
    model.edit(RECORDS[1], max_steps=1, force=True)
    assert backend.graphs > 0


def test_where_nothing_can_be_compiled_a_warning_says_so_and_edits_are_the_same(tokenizer, caplog, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("no compiler is there")

    torch._dynamo.reset()
    model = editable(build_model("llama"), tokenizer, layers_to_transform=[2])
    edits, _ = edits_of(model)
    model.set_compile_config(config(no_compiler))
    monkeypatch.setattr(logging.getLogger("hf_mend"), "propagate", True)
    compiled, _ = edits_of(model)
    assert_same(edits, compiled)
    said = [record.getMessage() for record in caplog.records if "cannot be compiled" in record.getMessage()]
    assert len(said) == 1 and "no compiler is there" in said[0]


def test_a_copy_is_compiled_anew_in_its_process():
    copy = pickle.loads(pickle.dumps(CompiledBlocks(CompileConfig(mode="reduce-overhead"))))
    assert copy.options.mode == "reduce-overhead" and not copy.failed


@pytest.mark.parametrize(("given", "message"), [({"backend": "mine"}, "mine"), ({"mode": "fastest"}, "fastest")])
def test_what_torch_does_not_know_is_refused_at_once(llama, tokenizer, given, message):
    model = editable(llama, tokenizer)
    with pytest.raises(RuntimeError, match=message):
        model.set_compile_config(CompileConfig(**({"mode": None} | given)))
    assert model._compiled is None


def test_what_is_no_compile_config_is_refused(llama, tokenizer):
    with pytest.raises(TypeError, match=r"compile_config is True, expected a transformers.CompileConfig, or None"):
        editable(llama, tokenizer).set_compile_config(True)


@pytest.mark.slow
def test_torchs_own_compiler_gives_the_same_edits(tokenizer):
    model = editable(build_model("llama"), tokenizer, layers_to_transform=[1])
    edits, _ = edits_of(model)
    model.set_compile_config(CompileConfig(mode=None, fullgraph=False))
    assert_same(edits, edits_of(model)[0])
    assert not model._compiled.failed
