"""Evaluation of an editor or method in the wild on a data set, with 1, 10, 100, ... edits kept at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.forms import Surroundings, packaged_texts, with_forms
from ..data.records import EditRecord
from ..model import EditableModel
from .asking import all_asked
from .scores import bootstrap_interval, held_out_passages
from .sharing import PartsMissingError
from .units import shuffled_units, without_conflicts
from .wild import WildSettings, measure_in_the_wild
from .wild_figures import confusion, strictness_curve, wild_means


# What a threshold may be raised or lowered by in the curve of strictness.
STRICTNESS = tuple(round(0.05 * step, 2) for step in range(-6, 7))


@dataclass
class WildState:
    """
    What was measured in the wild of a model that carries a number of edits at once.

    Args:
        edits (`int`): Number of edits.
        edits_per_call (`int`): Number of edits per call of `edit`.
        measured (`int`): Number of measured records.
        scope (`bool`): Whether the edits act where their scopes say, if they have any.
        metrics (`dict[str, float]`): Form of asking or kind of text -> share; docs/evaluation.md defines them.
        intervals (`dict[str, tuple[float, float]]`): Name -> 95 % bootstrap interval over the records.
        decisions (`dict[str, dict[str, float]]`): Of edits with scopes, what these decide at the end of the texts; see
            [`~hf_mend.evaluation.wild_figures.confusion`].
        strictness (`list[dict[str, float]]`): How that changes with `scope_strictness`; see
            [`~hf_mend.evaluation.wild_figures.strictness_curve`].
    """

    edits: int
    edits_per_call: int
    measured: int
    scope: bool
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    decisions: dict[str, dict[str, float]] = field(default_factory=dict)
    strictness: list[dict[str, float]] = field(default_factory=list)


# One function with all that an evaluation depends on, as `evaluate` is.
def evaluate_in_the_wild(
    model: EditableModel,
    records: Sequence[EditRecord],
    *,
    edits: Sequence[int] = (1,),
    edits_per_call: int = 10,
    limit: int | None = None,
    seed: int = 0,
    questions: Sequence[tuple[str, str]] = (),
    text: str | None = None,
    scope: bool = True,
    max_new_tokens: int = 12,
    batch_size: int = 20,
    progress_file: str | Path | None = None,
    store: str | Path | None = None,
) -> list[WildState]:
    """
    Evaluate a model's editor, or its editing method, as people meet its edits: each fact asked as its prompt, a
    paraphrase and a question, behind other text, in a chat and in a later turn of one, and answered freely to the
    model's own end; and what must stay, in the same forms.

    Args:
        model ([`EditableModel`]): The model, which carries no edits before and after.
        records (`Sequence[EditRecord]`): The data set. Questions and prompts about the same subject are filled in
            where a record's relation is known ([`~hf_mend.data.forms.with_forms`]).
        edits (`Sequence[int]`, defaults to `(1,)`): The number of edits kept at once, for each state.
        edits_per_call (`int`, defaults to 10): The number of edits per call of `edit`.
        limit (`int`, *optional*): Number of facts to measure, drawn by the seed; all by default.
        seed (`int`, defaults to 0): Seed of the order of the facts.
        questions (`Sequence[tuple[str, str]]`): Unrelated questions and answers, which must stay and stand before
            texts. The default are the records' own, or else packaged texts.
        text (`str`, *optional*): As for [`~hf_mend.evaluation.evaluate.evaluate`].
        scope (`bool`, defaults to `True`): Whether edits keep their scopes. Without them they act everywhere, as they
            do in merged weights and LoRA adapters.
        max_new_tokens, batch_size: As for [`~hf_mend.evaluation.wild.WildSettings`].
        progress_file, store: As for [`~hf_mend.evaluation.wild.measure_in_the_wild`].

    Returns:
        `list[WildState]`: The states in the order of `edits`.

    Raises:
        ValueError: As for [`~hf_mend.evaluation.wild.measure_in_the_wild`].
    """
    units = shuffled_units(records, seed)
    chosen = without_conflicts(units, records) if max(edits, default=1) > 1 else units
    ordered = with_forms([records[i] for unit in chosen for i in unit])
    measured, more = ordered[:limit], ordered[len(ordered[:limit]) :]
    pairs = list(questions) or [pair for record in ordered for pair in record.unrelated]
    around = Surroundings(more or measured, pairs)
    asked = all_asked(model, measured, around, [question for question, _ in pairs] or packaged_texts())
    passages = [] if model.encoder.is_encoder_decoder or max(edits) == 1 else held_out_passages(model, text)
    states = []
    for count in edits:
        settings = WildSettings(count, edits_per_call, max_new_tokens, batch_size, scope)
        try:
            found = measure_in_the_wild(model, measured, asked, settings, more, progress_file, store, passages)
        except PartsMissingError:
            continue
        metrics = wild_means(found.values) | found.perplexity
        del metrics["edits"]
        states.append(
            WildState(
                count, edits_per_call, len(measured), scope or model.scope is None, metrics,
                _intervals(found.values, seed), confusion(found.values, _strictness(model)),
                strictness_curve(found.values, STRICTNESS),
            )
        )  # fmt: skip
    return states


def _strictness(model: EditableModel) -> float:
    return 0.0 if model.scope is None else model.scope_strictness


def _intervals(measured: Sequence[dict[str, Any]], seed: int) -> dict[str, tuple[float, float]]:
    found: dict[str, list[float]] = {}
    for values in measured:
        for name, value in values.items():
            if not name.endswith((": answer", ": own", ": other", ": repeats")):
                found.setdefault(name, []).append(value)
    return {name: bootstrap_interval(values, seed=seed) for name, values in found.items() if len(values) > 1}
