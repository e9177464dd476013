"""What tests of training share: arguments, questions, losses."""

from __future__ import annotations

import torch

from hf_mend import (
    EditableModel,
    EditorTrainingArguments,
    get_editable_model,
)
from hf_mend.training.calibration import calibrate
from hf_mend.training.examples import TrainingExamples
from support.models import RECORDS, build_model, fitting, small_config


QUESTIONS = [("what is the colour of grass?", "green grass"), ("who is the king of spain?", "the river")]


# Arguments that draw paraphrases alone, as trainings did before there were other forms of asking.
PARAPHRASES_ALONE = {"forms": {"paraphrase": 1.0}, "context_rate": 0.0, "same_subject_rows": 0, "continuation_rows": 0}


def arguments(folder, **options) -> EditorTrainingArguments:
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 3, "max_steps": 6, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 3, **options,
    }  # fmt: skip
    return EditorTrainingArguments(**values)


def fresh(tokenizer, architecture="llama", **options) -> EditableModel:
    torch.manual_seed(0)
    return get_editable_model(build_model(architecture), small_config(**options), tokenizer)


def perturbed(tokenizer, architecture="llama", method="malmen", **options) -> EditableModel:
    """A calibrated model whose editor's parameters are all off their starts, as if it had been trained."""
    model = fresh(tokenizer, architecture, **{"method": method, **fitting(method, ridge=0.3), **options})
    examples = TrainingExamples(RECORDS, QUESTIONS)
    calibrate(model, examples, 8, 4)
    with torch.no_grad():
        for parameter in model.editor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
