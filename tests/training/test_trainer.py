"""Training: it lowers the loss, resumes exactly, saves the editor alone, and gives each example its own edit."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.models import RECORDS, EditableModel, build_model, editable
from support.paths import ROOT, TESTS
from support.processes import run_python, run_ranks
from support.training import QUESTIONS, arguments, fresh, losses
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_mend import EditorTrainer, evaluate_records, summarize
from hf_mend.bases.gradients import kl_divergence, trace
from hf_mend.bases.weights import weight_matrix
from hf_mend.data.encoding import Query
from hf_mend.edits.low_rank import dense
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import EditCollator, TrainingExamples
from hf_mend.training.losses import editing_loss
from hf_mend.training.objective import EditingObjective
from hf_mend.training.scope_training import ScopeTrainingArguments, train_scope


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(tokenizer, tmp_path, architecture):
    model = fresh(tokenizer, architecture)
    weights = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    args = arguments(tmp_path, max_steps=12, learning_rate=1e-2, step_learning_rate=0.1, lr_scheduler_type="constant")
    trainer = EditorTrainer(model, args, RECORDS, RECORDS[:2], questions=QUESTIONS)
    examples = TrainingExamples(RECORDS, QUESTIONS, seed=99)
    batch = EditCollator(model.encoder)([examples[i] for i in range(len(RECORDS))])
    calibrate(model, examples, 8, 4)
    before = trainer.evaluate()
    first = float(EditingObjective(model)(batch).loss.detach())
    trainer.train()
    assert float(EditingObjective(model)(batch).loss.detach()) < first - 0.04
    assert len(losses(trainer)) == 12
    assert {"eval_edit_success", "eval_generality", "eval_neighborhood", "eval_unrelated", "eval_score"} <= set(before)
    assert all(torch.equal(value, weights[name]) for name, value in model.base_model.state_dict().items())


@pytest.mark.parametrize("method", ["mend", "malmen"])
def test_training_on_calls_in_a_row_lowers_the_loss(tokenizer, tmp_path, method):
    model = fresh(tokenizer, method=method)
    args = arguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, calls_per_batch=4, learning_rate=1e-2,
        step_learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = EditorTrainer(model, args, RECORDS, questions=QUESTIONS)
    examples = TrainingExamples(RECORDS, QUESTIONS, seed=99)
    batch = EditCollator(model.encoder)([examples[i] for i in range(4)])
    calibrate(model, examples, 8, 4)
    first = float(EditingObjective(model)(batch, calls_per_batch=4).loss.detach())
    trainer.train()
    assert float(EditingObjective(model)(batch, calls_per_batch=4).loss.detach()) < first - 0.05


def test_malmen_trains(tokenizer, tmp_path):
    model = fresh(tokenizer, method="malmen")
    args = arguments(
        tmp_path, max_steps=6, per_device_train_batch_size=8, group_size=8, micro_batch_size=4, learning_rate=1e-2,
        step_learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = EditorTrainer(model, args, RECORDS, questions=QUESTIONS)
    examples = TrainingExamples(RECORDS, QUESTIONS, seed=99)
    batch = EditCollator(model.encoder)([examples[i] for i in range(len(RECORDS))])
    calibrate(model, examples, 8, 4)
    ridge = model.editor.log_ridge.detach().clone()
    first = float(EditingObjective(model)(batch, group_size=8).loss.detach())
    trainer.train()
    assert float(EditingObjective(model)(batch, group_size=8).loss.detach()) < first - 0.1
    assert not torch.equal(model.editor.log_ridge, ridge)


def test_resuming_gives_the_losses_of_an_unbroken_run(tokenizer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = EditorTrainer(fresh(tokenizer), arguments(tmp_path / "a", **options), RECORDS, questions=QUESTIONS)
    whole.train()
    again = EditorTrainer(fresh(tokenizer), arguments(tmp_path / "a", **options), RECORDS, questions=QUESTIONS)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert len(losses(whole)) == 6
    assert losses(again)[-3:] == losses(whole)[-3:]
    for one, two in zip(
        whole.model.editor.state_dict().values(), again.model.editor.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two)


def test_accumulated_gradients_are_those_of_the_larger_batch(tokenizer, tmp_path):
    """Three facts of equal target length at once, or one at a time: the same step."""
    records = [r for r in RECORDS if len(tokenizer(" " + r.target)["input_ids"]) == 3][:4] or RECORDS[:4]
    assert len(records) >= 2
    parameters = []
    for size, accumulate in ((2, 1), (1, 2)):
        model = fresh(tokenizer)
        calibrate(model, TrainingExamples(records, QUESTIONS), 1, 4)
        args = arguments(
            tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            max_steps=1, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant", unrelated_rows=0,
        )  # fmt: skip
        EditorTrainer(model, args, records).train()
        parameters.append(torch.cat([p.detach().flatten() for p in model.editor.parameters()]))
    torch.testing.assert_close(*parameters, rtol=1e-3, atol=1e-5)


def test_a_first_step_of_adam_moves_each_parameter_by_its_own_learning_rate(tokenizer, tmp_path):
    """Adam's first step is as long as the learning rate: `step_learning_rate` for a layer's edit step and ridge."""
    model = fresh(tokenizer, method="malmen")
    calibrate(model, TrainingExamples(RECORDS, QUESTIONS), 8, 4)
    before = {name: parameter.detach().clone() for name, parameter in model.editor.named_parameters()}
    args = arguments(tmp_path, max_steps=1, learning_rate=1e-4, step_learning_rate=0.03, lr_scheduler_type="constant")
    EditorTrainer(model, args, RECORDS, questions=QUESTIONS).train()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.editor.named_parameters()}
    steps = {name for name in moved if name.split(".")[-1] in ("log_step", "log_ridge")}
    assert len(steps) == 1 + len(model.editor.groups)
    for name, distance in moved.items():
        if name in steps:
            assert distance == pytest.approx(0.03, rel=0.05), name
        else:
            assert distance <= 1.1e-4, name
    assert max(distance for name, distance in moved.items() if name not in steps) > 0.9e-4


@pytest.mark.parametrize(("group_size", "expected"), [(4, [1, 2, 4, 1, 2]), (3, [1, 2, 1, 2, 1])])
def test_steps_go_through_groups_of_one_two_four_and_so_on(tokenizer, tmp_path, group_size, expected):
    """Each step's loss is that of its own batch, group size and weights."""
    model = fresh(tokenizer)
    options = {"group_size": group_size, "max_steps": 5, "neighborhood_weight": 0.3, "unrelated_weight": 50.0}
    args = arguments(tmp_path, per_device_train_batch_size=4, learning_rate=0.0, step_learning_rate=0.0, **options)
    trainer = EditorTrainer(model, args, RECORDS, questions=QUESTIONS)
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    trainer.train()
    weights = {"neighborhood": 0.3, "unrelated": 50.0}
    found = losses(trainer)
    for batch, size, loss in zip(batches, expected, found, strict=False):
        by_hand = float(editing_loss(model.context, batch, weights, group_size=size).loss.detach())
        assert loss == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
    assert len(found) == 5


def test_checkpoints_hold_the_editor_alone_and_the_best_one_comes_back(tokenizer, tmp_path):
    args = arguments(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, max_steps=4,
        load_best_model_at_end=True,
    )  # fmt: skip
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_score", True)
    model = fresh(tokenizer)
    trainer = EditorTrainer(
        model, args, RECORDS, RECORDS[:2], questions=QUESTIONS, callbacks=[EarlyStoppingCallback(3)]
    )
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    assert {"editor.safetensors", "editor_config.json", "trainer_state.json"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    best = EditableModel.from_pretrained(build_model("llama"), trainer.state.best_model_checkpoint, tokenizer)
    for one, two in zip(best.editor.state_dict().values(), model.editor.state_dict().values(), strict=True):
        assert torch.equal(one, two)


class Falls(EditorTrainer):
    """Its score falls from one evaluation to the next."""

    score = 1.0

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        self.score = metrics["eval_score"] = self.score - 0.1
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def test_early_stopping_and_the_best_checkpoint_go_by_the_score(tokenizer, tmp_path):
    args = arguments(
        tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1, max_steps=8,
        load_best_model_at_end=True,
    )  # fmt: skip
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = Falls(fresh(tokenizer), args, RECORDS, RECORDS[:2], questions=QUESTIONS, callbacks=[stop])
    trainer.train()
    assert trainer.state.global_step < 8, "the score got worse at each evaluation"
    assert trainer.state.best_global_step == 1 and trainer.state.best_metric == pytest.approx(0.9)


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_follows_the_score_wants_it_higher(tokenizer, tmp_path, scheduler):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2, lr_scheduler_type=scheduler)
    trainer = EditorTrainer(fresh(tokenizer), args, RECORDS, RECORDS[:2], questions=QUESTIONS)
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"
    given = {"mode": "min", "patience": 3}
    assert arguments(tmp_path, eval_strategy="steps", eval_steps=1, lr_scheduler_type=scheduler,
                     lr_scheduler_kwargs=given).lr_scheduler_kwargs == given  # fmt: skip


@pytest.mark.parametrize("metric", ["loss", "eval_loss"])
def test_a_loss_is_no_metric_of_an_editor(tmp_path, metric):
    with pytest.raises(ValueError, match=f"metric_for_best_model is '{metric}'.*has no loss.*eval_score"):
        arguments(tmp_path, metric_for_best_model=metric)


ROWS = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1], "labels": [5, 6, 7, 8]} for _ in range(4)]


def test_a_plain_trainer_points_to_the_editor_s(tokenizer, tmp_path):
    model = fresh(tokenizer)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="EditorTrainer"):
        Trainer(model, args, train_dataset=ROWS).train()
    with pytest.raises(RuntimeError, match="EditorTrainer"):  # and a loop written by hand
        model.train()(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    model.enable_input_require_grads()  # as a Trainer does for activation checkpointing: a gradient of nothing
    with pytest.raises(RuntimeError, match="EditorTrainer"):
        Trainer(model, args, train_dataset=ROWS).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_a_plain_trainer_evaluates_the_edited_model(tokenizer, tmp_path, architecture):
    model = editable(build_model(architecture), tokenizer)
    args = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    found = Trainer(model, args, eval_dataset=ROWS).evaluate()["eval_loss"]
    plain = Trainer(build_model(architecture), args, eval_dataset=ROWS).evaluate()["eval_loss"]
    assert found == pytest.approx(plain, rel=1e-5)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=60)
    assert Trainer(model, args, eval_dataset=ROWS).evaluate()["eval_loss"] != found


def test_a_new_model_is_in_eval_mode_as_a_loaded_base_is(tokenizer):
    model = fresh(tokenizer)
    assert not model.training
    loss = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    assert not loss.requires_grad


def run_training(folder: Path, launcher: list[str] | int, batch_size: int, accumulation: int = 1) -> dict:
    """Under a launcher, or in so many processes without one."""
    folder.mkdir()
    words = [str(Path(__file__).parent / "train_on_two_processes.py"), str(folder), str(batch_size), str(accumulation)]
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if isinstance(launcher, list):
        subprocess.run([sys.executable, *launcher, *words], check=True, env=env)
    else:
        done = [run_python(*words, env=env)] if launcher == 1 else run_ranks(launcher, *words, env=env)
        assert not any(one.returncode for one in done), [one.stderr for one in done]
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("launcher", ["none", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path, launcher):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    # `--cpu` would want mpirun; with the variable set above, two plain CPU processes talk over gloo.
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    one = run_training(tmp_path / "one", 1, 4)
    two = run_training(tmp_path / "two", launch if launcher == "accelerate" else 2, 2)
    accumulated = run_training(tmp_path / "accumulated", 1, 2, accumulation=2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert max(one["losses"]) > 1.01 * min(one["losses"])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert accumulated["losses"] == pytest.approx(one["losses"], rel=1e-3)


def test_zero_3_trains_as_one_process(tmp_path):
    """Weights, gradients and optimizer shared out by DeepSpeed, as the example has it, over two CPU processes."""
    pytest.importorskip("deepspeed")
    example = yaml.safe_load((ROOT / "examples" / "accelerate" / "zero3.yaml").read_text())
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump({**example, "use_cpu": True}))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "zero3.yaml")]
    one, two = run_training(tmp_path / "one", 1, 4), run_training(tmp_path / "two", launch, 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    mine, theirs = (load_file(tmp_path / name / "editor" / "editor.safetensors") for name in ("one", "two"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def test_an_editor_trains_on_a_base_shared_out_over_two_processes(tmp_path):
    script = Path(__file__).parent / "train_on_sharded_base.py"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1"}
    done = run_ranks(2, script, tmp_path, env=env)
    assert not any(one.returncode for one in done), [one.stderr for one in done]
    for found in json.loads((tmp_path / "found.json").read_text()).values():
        assert found["sharded"] == pytest.approx(found["whole"], rel=1e-4)


def test_bad_training_data(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="item 1 of the data is a dict, expected an EditRecord"):
        EditorTrainer(fresh(tokenizer), arguments(tmp_path), [RECORDS[0], {"prompt": "x"}])
    with pytest.raises(ValueError, match="data set is empty"):
        EditorTrainer(fresh(tokenizer), arguments(tmp_path), [])


LONG = "the capital of peru is " * 20


@pytest.mark.parametrize(
    ("record", "questions", "message"),
    [
        ({"prompt": LONG}, QUESTIONS, "record 7 (7) has .* tokens with its target, the model takes 64; shorten"),
        ({"target": " "}, QUESTIONS, "record 7 (7) has an empty target"),
        ({"paraphrases": ["in peru", LONG]}, QUESTIONS, r"record 7 (7) has .* the paraphrases\[1\] 'the capital"),
        ({"neighborhood": [LONG]}, QUESTIONS, r"record 7 (7) has .* shorten the neighborhood\[0\]"),
        ({"questions": ["who?", LONG]}, QUESTIONS, r"record 7 (7) has .* shorten the questions\[1\]"),
        ({"same_subject": [" "]}, QUESTIONS, r"record 7 (7) has an empty same_subject\[0\]"),
        ({"unrelated": [("who?", LONG)]}, (), r"record 7 (7) has .* shorten the unrelated\[0\]\[1\]"),
        ({}, [*QUESTIONS, (LONG, "grass")], "question 2 has .* tokens with its answer, the model takes 64"),
        ({}, [*QUESTIONS, ("who?", "")], "question 2 has an empty answer"),
    ],
)
def test_texts_that_the_model_cannot_read_are_named_before_training_starts(
    tokenizer, tmp_path, record, questions, message
):
    model = fresh(tokenizer)
    records = [*RECORDS[:7], replace(RECORDS[7], **record)]
    trainer = EditorTrainer(model, arguments(tmp_path), records, questions=questions)
    with pytest.raises(ValueError, match=message.replace("(7)", r"\(7\)")):
        trainer.train()
    assert not model.editor.is_calibrated and trainer.state.global_step == 0
    if record:
        trainer = EditorTrainer(model, arguments(tmp_path), RECORDS, records, questions=QUESTIONS)
        with pytest.raises(ValueError, match="record 7"):
            trainer.evaluate()
        with pytest.raises(ValueError, match="record 7"):  # not at the first evaluation, hours later
            trainer.train()
        assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"general_rows": 0}, "general_rows is 0, expected a whole number of at least 1"),
        ({"neighborhood_rows": -1}, "neighborhood_rows is -1, expected a whole number of at least 0"),
        ({"unrelated_rows": 1.5}, "unrelated_rows is 1.5, expected a whole number of at least 0"),
        ({"group_size": 0}, "group_size is 0, expected"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0, expected a whole number of at least 1, or None"),
        ({"calls_per_batch": "two"}, "calls_per_batch is 'two', expected"),
        ({"statistics_edits": 0}, "statistics_edits is 0, expected"),
        ({"decay": 2}, "decay is 2, expected a number from 0 to 1"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_arguments_are_understood_by_the_names_that_they_had(tmp_path):
    with pytest.warns(FutureWarning, match="EditorTrainingArguments: edits_together is now called group_size"):
        args = arguments(tmp_path, edits_together=4)
    assert args.group_size == 4
    with pytest.warns(FutureWarning, match="EditorTrainingArguments.edits_together is now called group_size"):
        assert args.edits_together == 4
    for old, new in (("edits_at_once", "micro_batch_size"), ("calls_in_a_row", "calls_per_batch")):
        with pytest.warns(FutureWarning, match=f"{old} is now called {new}"):
            assert getattr(arguments(tmp_path, **{old: 2}), new) == 2
    with pytest.warns(FutureWarning, match="look_back is now called decay"):
        assert arguments(tmp_path, look_back=0.5).decay == 0.5
    with pytest.raises(TypeError, match="got 'look_back' and 'decay', which are one argument"):
        arguments(tmp_path, look_back=0.5, decay=0.5)


def test_the_trainers_model_is_the_one_it_was_given(tokenizer, tmp_path):
    model = fresh(tokenizer)
    trainer = EditorTrainer(model, arguments(tmp_path, max_steps=1), RECORDS, questions=QUESTIONS)
    assert trainer.model is model and trainer.editable_model is model
    inside = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            inside.append(model)

    trainer.add_callback(Look())
    trainer.train()
    assert trainer.model is model and isinstance(inside[0], EditingObjective) and inside[0].model is model
    assert model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1).id == model.undo().id
    trainer.train()
    assert trainer.model is model and len(losses(trainer)) == 1


def test_the_loss_is_the_objectives_and_a_models_forward_is_the_bases(tokenizer):
    model = fresh(tokenizer)
    objective = EditingObjective(model)
    ids = torch.tensor([tokenizer(RECORDS[0].prompt)["input_ids"]])
    assert torch.equal(model(ids).logits, model.base_model(ids).logits) and model(ids).logits.shape[:2] == ids.shape
    assert objective.config is model.config and objective.train().training
    assert model.editor.training and not model.base_model.training
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.editor.{name}" for name, _ in model.editor.named_parameters()}


def test_the_least_that_arguments_may_be(tokenizer, tmp_path):
    options = {"neighborhood_rows": 0, "unrelated_rows": 0, "micro_batch_size": 1, "statistics_edits": 1, "decay": 0}
    trainer = EditorTrainer(fresh(tokenizer), arguments(tmp_path, max_steps=2, **options), RECORDS)
    trainer.train()
    assert len(losses(trainer)) == 2 and not any("neighborhood" in name for name in trainer.state.log_history[0])


def test_a_model_that_carries_edits_is_neither_trained_nor_measured(tokenizer, tmp_path):
    model = fresh(tokenizer)
    trainer = EditorTrainer(model, arguments(tmp_path), RECORDS, RECORDS[:2])
    with model.edited(RECORDS[0].prompt, RECORDS[0].target, force=True):
        for call in (trainer.train, trainer.evaluate):
            with pytest.raises(ValueError, match="the model carries 1 edit.*; undo them first"):
                call()
    assert trainer.state.global_step == 0 and not model.editor.is_calibrated
    assert trainer.evaluate()["eval_edits"] == 2


# ---- metrics ----


@pytest.mark.parametrize(("architecture", "group_size"), [("llama", 1), ("t5", 1), ("llama", 3)])
def test_metrics_are_those_of_weights_changed_by_hand(tokenizer, architecture, group_size):
    model = fresh(tokenizer, architecture)
    calibrate(model, TrainingExamples(RECORDS, QUESTIONS), 8, 4)
    model.editor.scale_steps(4.0)
    encoder = model.encoder
    measured = evaluate_records(
        model.split, model.targets, model.editor, encoder, RECORDS, batch_size=3, group_size=group_size,
        generate=True, progress=False,
    )  # fmt: skip
    for i, (record, got) in enumerate(zip(RECORDS, measured, strict=True)):
        changed = copy.deepcopy(model.base_model)
        start = i - i % group_size
        for other in RECORDS[start : start + group_size]:
            rows = encoder([Query(other.prompt, other.target)])
            factors, _ = trace(model.split, model.targets, rows.inputs, rows.next_tokens)
            with torch.no_grad():
                for target in model.targets:
                    u, v = model.editor(factors)[target.name]
                    weight_matrix(changed.get_submodule(target.name)).add_(dense((u[0], v[0])))
        with torch.no_grad():

            def said(network, query, encoder=encoder):
                rows = encoder([query])
                return network(**rows.inputs).logits[rows.positions], rows.next_tokens[rows.positions]

            def right(query, changed=changed):
                logits, labels = said(changed, query)
                return bool((logits.argmax(-1) == labels).all())

            assert got.success == right(Query(record.prompt, record.target))
            assert got.generality == pytest.approx(
                sum(right(Query(p, record.target)) for p in record.paraphrases) / len(record.paraphrases)
            )
            same, kls = [], []
            for prompt in record.neighborhood:
                pair = [said(network, Query(prompt))[0] for network in (changed, model.base_model)]
                same.append(float((pair[0].argmax(-1) == pair[1].argmax(-1)).float().mean()))
                kls.append(float(kl_divergence(*pair).mean()))
            assert got.neighborhood == pytest.approx(sum(same) / len(same))
            assert got.neighborhood_kl == pytest.approx(sum(kls) / len(kls), rel=1e-2, abs=1e-6)
    summary = summarize(measured)
    assert summary["edit_success"] == sum(m.success for m in measured) / len(RECORDS)
    assert 0 <= summary["score"] <= 1 and math.isfinite(summary["unrelated_kl"])


def test_exact_match_is_free_greedy_generation(tokenizer):
    model = fresh(tokenizer)
    calibrate(model, TrainingExamples(RECORDS, QUESTIONS), 8, 4)
    record = RECORDS[0]
    got = evaluate_records(
        model.split, model.targets, model.editor, model.encoder, [record], generate=True, progress=False
    )[0]
    with model.edited(record.prompt, record.target, max_steps=1):
        ids = torch.tensor([tokenizer(record.prompt)["input_ids"]])
        steps = len(tokenizer(" " + record.target)["input_ids"]) + 3
        out = model.generate(input_ids=ids, max_new_tokens=steps, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(out, skip_special_tokens=True).strip()
    assert got.exact_match == (text.startswith(record.target) and not text[len(record.target) :][:1].isalnum())


# ---- pushing while training ----


def pushed(hub, name="me/trained"):
    repository = hub.repositories[name]
    return [(repository.messages[sha], repository.files(sha)) for sha in repository.history]


def trained_with_pushes(tokenizer, folder, strategy, before=lambda trainer: None, **options):
    model = fresh(tokenizer)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **options}
    args = arguments(folder, push_to_hub=True, hub_model_id="me/trained", hub_strategy=strategy, **options)
    trainer = EditorTrainer(model, args, RECORDS, questions=QUESTIONS)
    before(trainer)
    trainer.train()
    return trainer


def wait_for_each_push(trainer):
    """Each save finds the push before it done, however fast the steps are."""

    class Wait(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer._finish_current_push()

    trainer.add_callback(Wait())


def editor_in(files, tmp_path, tokenizer, below=""):
    folder = tmp_path / "downloaded"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        if name.startswith(below) and "/" not in name[len(below) :]:
            (folder / name[len(below) :]).write_bytes(content)
    return EditableModel.from_pretrained(build_model("llama"), folder, tokenizer).editor.state_dict()


def test_each_checkpoint_is_pushed_as_an_editor(hub, tokenizer, tmp_path):
    out = tmp_path / "out"
    trainer = trained_with_pushes(tokenizer, out, "every_save", wait_for_each_push)
    trainer.push_to_hub()
    commits = pushed(hub)
    assert [message for message, _ in commits[1:]] == [
        "Training in progress, step 2",
        "Training in progress, step 4",
        "End of training",
    ][: len(commits) - 1]
    assert len(commits) >= 3
    for (_, files), step in zip(commits[1:3], (2, 4), strict=True):
        pictures = {"training.png"} & set(files)  # drawn where matplotlib is installed
        configs = {"config.json", "editor_config.json"}
        assert set(files) - pictures == {".gitattributes", "README.md", "editor.safetensors", *configs}
        local = load_checkpoint(out / f"checkpoint-{step}", tokenizer)
        same(editor_in(files, tmp_path, tokenizer), local)
    same(editor_in(commits[-1][1], tmp_path, tokenizer), trainer.model.editor.state_dict())


def load_checkpoint(folder, tokenizer):
    return EditableModel.from_pretrained(build_model("llama"), folder, tokenizer).editor.state_dict()


def same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_pushed_editor_has_its_scope(hub, tokenizer, tmp_path):
    model = fresh(tokenizer, scope=True)
    args = arguments(tmp_path / "out", max_steps=1, scope_steps=1, scope_further_facts=0, hub_model_id="me/trained")
    trainer = EditorTrainer(model, args, RECORDS, questions=QUESTIONS)
    trainer.train()
    trainer.push_to_hub()
    there = EditableModel.from_pretrained(build_model("llama"), "me/trained", tokenizer)
    same(there.scope.state_dict(), model.scope.state_dict())


def test_a_pushed_checkpoint_resumes(hub, tokenizer, tmp_path):
    whole = trained_with_pushes(tokenizer, tmp_path / "whole", "all_checkpoints", wait_for_each_push)
    whole._finish_current_push()
    files = pushed(hub)[-1][1]
    assert any(name.startswith("checkpoint-4/") for name in files)
    for name, content in files.items():
        if name.startswith("checkpoint-2/"):
            path = tmp_path / "elsewhere" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    resumed = EditorTrainer(
        fresh(tokenizer), arguments(tmp_path / "elsewhere", max_steps=4), RECORDS, questions=QUESTIONS
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere" / "checkpoint-2"))
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-6)


def test_a_push_that_fails_in_training_is_said_and_the_next_one_works(hub, tokenizer, tmp_path, caplog):
    hub.fail("POST .*/commit/", status=502)
    trainer = trained_with_pushes(tokenizer, tmp_path / "out", "every_save", wait_for_each_push)
    trainer._finish_current_push()
    assert re.search(r"checkpoint-2 was not pushed to me/trained.*502.*training goes on", caplog.text, re.DOTALL)
    assert [message for message, _ in pushed(hub)[1:]] == ["Training in progress, step 4"]
    load_checkpoint(tmp_path / "out" / "checkpoint-2", tokenizer)
    hub.fail("PUT|POST .*/commit/|POST .*/preupload", status=403, times=99)
    with torch.no_grad():
        next(trainer.model.editor.parameters()).add_(1)
    with pytest.raises(OSError, match="may not write to me/trained"):
        trainer.push_to_hub()
    same(load_checkpoint(tmp_path / "out", tokenizer), trainer.model.editor.state_dict())


def test_only_at_the_end_and_with_the_users_words(hub, tokenizer, tmp_path):
    hub.add("me/trained", {"README.md": b"---\nlicense: mit\n---\nmy words\n", "notes.txt": b"mine"})
    trainer = trained_with_pushes(tokenizer, tmp_path / "out", "end")
    assert len(pushed(hub)) == 1
    info = trainer.push_to_hub("done", language="en", tags=["facts"], dataset="me/facts", license="mit")
    message, files = pushed(hub)[-1]
    assert message == "done" and info.oid == hub.repositories["me/trained"].refs["main"]
    assert files["README.md"] == b"---\nlicense: mit\n---\nmy words\n" and files["notes.txt"] == b"mine"
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    assert card["library_name"] == "hf-mend" and {"facts", "model-editing"} <= set(card.tags)
    assert (card.language, card.datasets, card.license) == ("en", ["me/facts"], "mit")
    trainer.push_to_hub(blocking=False).result()


def test_saving_beside_large_files_copies_none_of_them(tokenizer, tmp_path):
    model = fresh(tokenizer)
    below = tmp_path / "out" / "states" / "rows.bin"
    below.parent.mkdir(parents=True)
    below.write_bytes(b"large")
    handle = open(below, "ab")  # noqa: SIM115
    number = below.stat().st_ino
    model.save_pretrained(tmp_path / "out")
    handle.write(b", and growing")
    handle.close()
    assert below.read_bytes() == b"large, and growing" and below.stat().st_ino == number


def test_a_scope_is_trained_behind_the_editor(tokenizer, tmp_path):
    """As `train_scope` would by itself, on the trainer's own facts; with 0 steps it stays as it was."""
    args = {"max_steps": 2, "scope_steps": 3, "scope_further_facts": 4}
    model = fresh(tokenizer, scope=True)
    trainer = EditorTrainer(model, arguments(tmp_path, **args), RECORDS, questions=QUESTIONS)
    trainer.train()
    found = {name: value.clone() for name, value in model.scope.state_dict().items()}
    assert model.card_notes.training["steps of the scope"] == "3"
    train_scope(model, trainer.examples, ScopeTrainingArguments(3, further_facts=4, seed=3))
    assert all(torch.equal(value, found[name]) for name, value in model.scope.state_dict().items())
    again = EditorTrainer(model, arguments(tmp_path, **args | {"scope_steps": 0}), RECORDS, questions=QUESTIONS)
    again.train()
    assert all(torch.equal(value, found[name]) for name, value in model.scope.state_dict().items())


def test_training_in_bfloat16_follows_single_precision_and_keeps_the_weights(tokenizer, tmp_path):
    found = []
    for half in (False, True):
        args = arguments(tmp_path, max_steps=4, bf16=half)
        trainer = EditorTrainer(fresh(tokenizer), args, RECORDS, questions=QUESTIONS)
        trainer.train()
        assert all(p.dtype == torch.float32 for p in trainer.editable_model.parameters())
        found.append(losses(trainer))
    single, half = found
    assert half != single and half == pytest.approx(single, rel=0.1)
