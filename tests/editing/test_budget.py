"""How much goes into one pass: by the free memory and what a pass is seen to take, and half if it was too much."""

from __future__ import annotations

import pytest
import torch
from support.models import RECORDS, all_logits, editable
from support.scope import scoped

from hf_mend.editing import budget as budgets
from hf_mend.editing.budget import Budget, available_on_host, estimated_cost, in_passes, tokens_that_fit
from hf_mend.edits.low_rank import dense


GIB = 2**30
CUDA = torch.device("cuda")


class Card:
    """A CUDA device's memory, as torch tells it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int):
        self.free, self.allocated, self.reserved, self.peak = free, 5 * GIB, 5 * GIB, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (self.free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_a_pass_takes_a_share_of_what_is_free():
    assert tokens_that_fit(10 * GIB, 1e6, 10**9) == int(0.6 * 10 * GIB / 1e6)
    assert tokens_that_fit(10 * GIB, 1e6, 500) == 500
    assert tokens_that_fit(1000, 1e6, 500) == 1, "one request is tried in any case"


def test_the_first_pass_is_small_and_tells_what_the_next_may_have(monkeypatch):
    card = Card(monkeypatch, 10 * GIB)
    budget = Budget(CUDA, estimate=1e6)
    seen = []

    def run(batch):
        seen.append(len(batch))
        card.peak = card.allocated + 1_000_000 * 10 * len(batch)  # a megabyte a token
        card.free -= GIB  # something else fills the card meanwhile
        return batch

    found = list(in_passes(budget, range(2000), [10] * 2000, run))
    assert [one for batch, _ in found for one in batch] == list(range(2000))
    assert seen[0] == 16 and budget.measured == 1e6
    free = [9 * GIB, 8 * GIB, 7 * GIB]
    assert seen[1:4] == [int(0.6 * one / 1e6) // 10 for one in free]


def test_what_torch_holds_unused_is_free_too(monkeypatch):
    card = Card(monkeypatch, GIB)
    card.reserved = card.allocated + 3 * GIB
    assert budgets.free_memory(CUDA) == 4 * GIB
    assert budgets.free_memory(torch.device("meta")) is None
    assert Budget(torch.device("meta"), 1.0).tokens == 4096


def test_a_cpu_takes_what_the_host_has_and_no_more_than_pays(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert available_on_host(tmp_path / "meminfo") == 2 * 2**20
    (tmp_path / "other").write_text("Pages free: many\n")
    assert available_on_host(tmp_path / "other") is None and available_on_host(tmp_path / "none") is None
    budget = Budget(torch.device("cpu"), 1e6)
    for free, tokens in ((100 * GIB, 4096), (GIB, int(0.6 * GIB / 1e6)), (0, 1), (None, 4096)):
        monkeypatch.setattr(budgets, "available_on_host", lambda free=free: free)
        assert budget.tokens == tokens


def test_the_estimate_counts_logits_and_blocks(llama):
    one, two = estimated_cost(llama, 1), estimated_cost(llama, 2)
    assert one == 4 * (3 * 160 + 24 * 32) and two - one == 4 * 24 * 32


def test_a_users_batch_size_stands(monkeypatch):
    Card(monkeypatch, 10 * GIB)
    budget = Budget(CUDA, 1e6, rows=3, measured=1.0)
    assert [len(batch) for batch, _ in in_passes(budget, range(8), [5] * 8, len)] == [3, 3, 2]


def out_of_memory_above(module: torch.nn.Module, rows: int) -> list[int]:
    """Let a module's passes of more rows run out of memory; returns the rows of those that did."""
    failed: list[int] = []

    def hook(_, args, output):
        if output.shape[0] > rows:
            failed.append(output.shape[0])
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    module.register_forward_hook(hook)
    return failed


KINDS = {
    "each by itself": lambda base, tokenizer: editable(base, tokenizer),
    "with scopes": lambda base, tokenizer: scoped(base, tokenizer),
    "found together": lambda base, tokenizer: editable(base, tokenizer, method="malmen"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_runs_out_of_memory_goes_on_with_smaller_passes(llama, tokenizer, kind):
    model = KINDS[kind](llama, tokenizer)
    prompts, targets = [record.prompt for record in RECORDS], [record.target for record in RECORDS]
    model.edit(prompts, targets, max_steps=2)
    expected = model.undo_all()
    # Behind the last block: the factors' backward pass would have begun.
    failed = out_of_memory_above(llama.model.layers[-1], 4)
    results = model.edit(prompts, targets, max_steps=2)
    assert failed and len(results) == len(RECORDS)
    assert [edit.prompt for edit in model.edits] == [edit.prompt for edit in expected]
    for edit, other in zip(model.edits, expected, strict=True):
        for name, update in edit.updates.items():
            torch.testing.assert_close(dense(update), dense(other.updates[name]), rtol=1e-3, atol=1e-5)


def test_one_request_that_is_too_large_leaves_the_model_as_it_was(llama, tokenizer):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1)
    before = all_logits(model, tokenizer)
    handle = llama.model.layers[2].register_forward_hook(_raise)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.edit([r.prompt for r in RECORDS[2:5]], [r.target for r in RECORDS[2:5]])
    handle.remove()
    assert len(model.edits) == 1 and torch.equal(all_logits(model, tokenizer), before)


def _raise(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def test_statistics_of_edits_count_each_once(llama, tokenizer):
    """UltraEdit's, by which its edits are made: so memory does not choose which share a pass."""
    model = scoped(llama, tokenizer, method="ultraedit")
    prompts, targets = [record.prompt for record in RECORDS], [record.target for record in RECORDS]
    assert not model.editor.x_stats[0].count
    failed = out_of_memory_above(llama.model.layers[-1], 4)
    model.edit(prompts, targets, max_steps=1)
    edited = model.editor.x_stats[0].count.clone()
    assert failed and edited > 0
    again = scoped(llama.__class__(llama.config), tokenizer, method="ultraedit")
    again.edit(prompts, targets, max_steps=1)
    assert again.editor.x_stats[0].count == edited
