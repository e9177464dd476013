"""Trainings that do not end well: losses that are not finite, and checkpoints that a killed process left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.models import RECORDS
from support.training import QUESTIONS, arguments, fresh, losses

from hf_mend import EditableModel, EditorTrainer
from hf_mend.bases.split import SplitModel
from hf_mend.training.soundness import last_whole_checkpoint


def trainer(tokenizer, folder: Path, model: EditableModel | None = None, **options) -> EditorTrainer:
    model = fresh(tokenizer) if model is None else model
    return EditorTrainer(model, arguments(folder, **options), RECORDS, questions=QUESTIONS)


def test_a_loss_that_is_not_finite_ends_the_training(tokenizer, tmp_path, monkeypatch):
    here = trainer(tokenizer, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=10)
    objective, weights = here._objective[0], []
    forward = type(objective).forward

    def spoilt(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        weights.append({name: value.clone() for name, value in here.editable_model.editor.state_dict().items()})
        if len(weights) == 4:
            result.loss = result.loss * float("nan")
        return result

    monkeypatch.setattr(type(objective), "forward", spoilt)
    with pytest.raises(FloatingPointError, match="stopped at step 4: its loss is not finite .loss is nan"):
        here.train()
    after = here.editable_model.editor.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights[-1].items())
    here.editable_model.save_pretrained(tmp_path / "kept")
    EditableModel.from_pretrained(fresh(tokenizer).base_model, tmp_path / "kept", tokenizer)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_gradient_that_is_not_finite_ends_the_training(tokenizer, tmp_path):
    here = trainer(tokenizer, tmp_path)
    parameter = next(p for p in here.editable_model.editor.parameters() if p.requires_grad)
    seen = []
    parameter.register_hook(lambda grad: seen.append(1) or (grad * float("inf") if len(seen) == 3 else grad))
    with pytest.raises(FloatingPointError, match="stopped at step 3: the gradient of .* is not finite"):
        here.train()
    assert all(torch.isfinite(value).all() for value in here.editable_model.editor.state_dict().values())


def test_a_base_without_finite_values(tokenizer, tmp_path, monkeypatch):
    run_below = SplitModel.run_below

    def spoilt(self, inputs):
        state = run_below(self, inputs)
        state.hidden.fill_(float("nan"))
        return state

    here = trainer(tokenizer, tmp_path)
    here.train()
    monkeypatch.setattr(SplitModel, "run_below", spoilt)
    with pytest.raises((FloatingPointError, ValueError), match="not finite|NaN"):
        here.train()


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A training of four steps with two checkpoints, and its losses."""
    folder = tmp_path_factory.mktemp("trained")
    first = trainer(tokenizer, folder, max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    return folder, losses(first)


@pytest.mark.parametrize("left", ["no state", "half a state", "nothing", "no weights"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tokenizer, tmp_path, trained, left):
    folder, expected = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    broken = tmp_path / "checkpoint-4"
    if left == "nothing":
        shutil.rmtree(broken)
        broken.mkdir()
    elif left == "half a state":
        text = (broken / "trainer_state.json").read_text()
        (broken / "trainer_state.json").write_text(text[: len(text) // 2])
    else:
        (broken / ("trainer_state.json" if left == "no state" else "editor.safetensors")).unlink()
    again = trainer(tokenizer, tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert losses(again)[-2:] == pytest.approx(expected[-2:], rel=1e-6)
    with pytest.raises(FileNotFoundError, match="checkpoint-4 is no checkpoint that was written to its end"):
        again.train(resume_from_checkpoint=str(broken))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint that was written to its end"):
        trainer(tokenizer, tmp_path / "empty").train(resume_from_checkpoint=True)
