"""What the un-edited model says is kept: equal to what is computed, bound to its weights, safe from altered files."""

from __future__ import annotations

import logging

import pytest
import torch
from support.models import RECORDS, build_model, small_config
from support.training import QUESTIONS, arguments, perturbed

from hf_mend import EditorTrainer, HiddenStateCache, get_editable_model
from hf_mend.bases.readout import Readout
from hf_mend.training.examples import EditCollator, TrainingExamples
from hf_mend.training.losses import editing_loss


WEIGHTS = {"neighborhood": 0.7, "unrelated": 3.0}


def filled(model, folder, limit: float = 20.0) -> tuple[HiddenStateCache, TrainingExamples]:
    examples = TrainingExamples(RECORDS, QUESTIONS)
    cache = HiddenStateCache(model.split, folder, limit)
    cache.fill(model.encoder, examples.queries(1), progress=False)
    cache.fill_unedited(model.encoder, examples.local_queries(1), progress=False)
    return cache, examples


def counted(monkeypatch) -> list[int]:
    """Rows that were read of the model."""
    rows: list[int] = []
    at = Readout.at

    def count(self, texts, state):
        rows.append(len(texts))
        return at(self, texts, state)

    monkeypatch.setattr(Readout, "at", count)
    return rows


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_a_step_from_kept_outputs_is_a_step(tokenizer, tmp_path, monkeypatch, architecture):
    model = perturbed(tokenizer, architecture, "mend")
    cache, examples = filled(model, tmp_path)
    batch = EditCollator(model.encoder)([examples[i] for i in range(5)])
    found = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(HiddenStateCache, "unedited", lambda self, rows: None)
        loss = editing_loss(model.context, batch, WEIGHTS, cache)
        gradients = torch.autograd.grad(loss.loss, [*model.editor.parameters()])
        found.append((loss.loss.detach(), torch.cat([one.flatten() for one in gradients])))
    (loss, gradient), (computed, expected) = found
    torch.testing.assert_close(loss, computed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_step_makes_no_un_edited_pass(tokenizer, tmp_path, monkeypatch):
    model = perturbed(tokenizer, method="mend")
    cache, examples = filled(model, tmp_path)
    batch = EditCollator(model.encoder)([examples[i] for i in range(5)])
    rows = counted(monkeypatch)
    editing_loss(model.context, batch, WEIGHTS, cache)
    assert rows == [5, 10, 5]  # paraphrases, neighbours, unrelated: under the edits alone
    rows.clear()
    editing_loss(model.context, batch, WEIGHTS)
    assert rows == [5, 10, 10, 5, 5]


def test_a_new_process_reads_what_was_kept_and_other_weights_do_not(tokenizer, tmp_path, monkeypatch):
    filled(perturbed(tokenizer, method="mend"), tmp_path)
    rows = counted(monkeypatch)
    again, other = perturbed(tokenizer, method="mend"), perturbed(tokenizer, method="mend")
    filled(again, tmp_path)
    assert rows == []
    with torch.no_grad():
        other.base_model.lm_head.weight[0, 0] += 1  # above the cut: the states below it stay
    cache, examples = filled(other, tmp_path)
    assert sum(rows) > len(RECORDS)
    batch = EditCollator(other.encoder)([examples[i] for i in range(3)])
    read = Readout(other.split, batch.general, cache).at(batch.local["unrelated"], cache(batch.local["unrelated"]))
    torch.testing.assert_close(cache.unedited(batch.local["unrelated"]), read, rtol=1e-4, atol=1e-5)


def test_a_file_that_was_altered_is_left_out_and_said(tokenizer, tmp_path, caplog):
    model = perturbed(tokenizer, method="mend")
    cache, examples = filled(model, tmp_path)
    (file,) = cache.folder.glob("unedited-*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)
    logging.getLogger("hf_mend").addHandler(caplog.handler)
    again, _ = filled(model, tmp_path)
    logging.getLogger("hf_mend").removeHandler(caplog.handler)
    assert "was altered on the disk" in caplog.text
    rows = model.encoder(list(examples.local_queries(1)))
    torch.testing.assert_close(again.unedited(rows), cache.unedited(rows))


def test_what_goes_beyond_the_limit_is_computed(tokenizer, tmp_path):
    model = perturbed(tokenizer, method="mend")
    room = filled(model, tmp_path / "one")[0].nbytes / 1e9
    cache, examples = filled(model, tmp_path / "two", room + 1e-7)  # a hundred bytes are left
    batch = EditCollator(model.encoder)([examples[i] for i in range(3)])
    assert cache.unedited(batch.local["unrelated"]) is None
    assert editing_loss(model.context, batch, WEIGHTS, cache).loss.isfinite()


def test_training_keeps_all_that_must_stay(tokenizer, tmp_path, monkeypatch):
    kept: list[bool] = []
    unedited = HiddenStateCache.unedited

    def note(self, rows):
        found = unedited(self, rows)
        kept.append(found is not None)
        return found

    monkeypatch.setattr(HiddenStateCache, "unedited", note)
    torch.manual_seed(0)
    model = get_editable_model(build_model("llama"), small_config(), tokenizer)
    options = {"hidden_states_dir": str(tmp_path / "states"), "max_steps": 4}
    EditorTrainer(model, arguments(tmp_path / "out", **options), RECORDS, questions=QUESTIONS).train()
    assert len(kept) >= 4 * 2 and all(kept)  # of each step at least neighbours and questions, in two epochs
