"""How long a training will take, said once when its first steps are done."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.estimate import Estimate


class EstimatesTime(TrainerCallback):
    """The callback that says how long a training takes, if it is more than a minute."""

    def __init__(self) -> None:
        self._estimate: Estimate | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._estimate = Estimate("Training", state.max_steps - state.global_step, "steps")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._estimate is not None
        self._estimate.done()
