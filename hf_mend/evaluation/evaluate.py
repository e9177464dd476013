"""
Evaluation of an editor or method on a data set, with 1, 10, 100, ... edits kept at once: metrics with confidence
intervals, time and memory. An evaluation can be resumed, and the same seed gives the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..bases.limits import longest_input
from ..data.deprecation import renamed_arguments
from ..data.readers.reading import check_targets
from ..data.records import EditRecord
from ..editing.calibration_text import observe_calibration_text
from ..editing.proposals import default_options
from ..editing.requests import check_limits
from ..model import EditableModel
from .checks import check_asked
from .metrics import Measured, metric_values, summarize
from .resume import hash_of, hash_of_editor
from .run import Run
from .scores import bootstrap_interval, harmonic_score, held_out_passages, perplexity
from .sharing import PartsMissingError, in_shares, progress_of
from .units import check_groups, shuffled_units, without_conflicts


# Metric -> the field of a record that it needs; docs/evaluation.md defines the metrics.
METRICS: dict[str, str | None] = {
    "success": None,
    "generality": "paraphrases",
    "neighborhood": "neighborhood",
    "unrelated": "unrelated",
    "drawdown": "unrelated",
    "exact_match": None,
    "counterfact": "ground_truth",
    "portability": "portability",
    "perplexity": None,
    "fluency": "generation",
    "in_the_wild": None,
}
# The metrics that generate long texts, which takes longer than all others together.
SLOW_METRICS = ("fluency", "in_the_wild")


@renamed_arguments(in_calls_of="edits_per_call")
@dataclass
class State:
    """
    The measurements of a model that carries a number of edits at once.

    Args:
        edits (`int`): Number of edits, each of one fact or one group of facts.
        edits_per_call (`int`, *optional*): Number of edits per call of `edit`; one call makes all if `None`.
        measured (`int`): Number of measured records.
        metrics (`dict[str, float]`): Name -> value; docs/evaluation.md defines the metrics.
        intervals (`dict[str, tuple[float, float]]`): Name -> 95 % bootstrap interval over the records.
        seconds_an_edit (`float`): Mean time per edit in such calls; the median of single edits if `edits` is 1.
        peak_memory (`int`, *optional*): Peak in bytes while editing, with the model; `None` if it cannot be known.
    """

    edits: int
    edits_per_call: int | None
    measured: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds_an_edit: float = 0.0
    peak_memory: int | None = None


# One function with all that an evaluation depends on: a class of options would only repeat its names.
@renamed_arguments(in_calls_of="edits_per_call")
def evaluate(
    model: EditableModel,
    records: Sequence[EditRecord],
    *,
    edits: Sequence[int] = (1,),
    edits_per_call: int | None = None,
    metrics: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    text: str | None = None,
    max_steps: int | None = None,
    batch_size: int = 10,
    progress_file: str | Path | None = None,
    scope: bool = True,
) -> list[State]:
    """
    Evaluate a model's editor, or its editing method, on a data set.

    Single edits run side by side in one forward pass, each row under its own edit. A state with several edits is made
    by [`~hf_mend.EditableModel.edit`], measured and undone; if it has more edits than there are facts to measure,
    other facts are edited among them. Records of one `group` are edited together and count as one. Of facts with
    different targets for one prompt, only the first is in a state with several edits.

    Args:
        model ([`EditableModel`]): The model, which carries no edits before and after.
        records (`Sequence[EditRecord]`): The data set; it may stay on disk.
        edits (`Sequence[int]`, defaults to `(1,)`): The number of edits kept at once, for each state.
        edits_per_call (`int`, *optional*): The number of edits per call of `edit`; one call makes all by default.
        metrics (`Sequence[str]`, *optional*): Names in `METRICS`; by default those that the data's fields allow,
            without `SLOW_METRICS`, which generate long texts. `success` is always included.
        limit (`int`, *optional*): Number of facts (or groups) to measure, drawn by the seed; all by default.
        seed (`int`, defaults to 0): Seed of the order of the facts, the intervals, and methods that draw.
        text (`str`, *optional*): Text for perplexity; that of [`~hf_mend.evaluation.scores.held_out_passages`] by
            default.
        max_steps (`int`, *optional*): As for `edit`.
        batch_size (`int`, defaults to 10): Records in one forward pass.
        progress_file (`str` or `Path`, *optional*): JSON lines of finished measurements, from which an interrupted
            evaluation resumes when it is called again with the same arguments, editor, base and data.
        scope (`bool`, defaults to `True`): Whether edits keep their scopes. Without them they act everywhere: what
            merged weights and LoRA adapters would do.

    Returns:
        `list[State]`: The states in the order of `edits`.

    Raises:
        ValueError: An argument is not valid, the data set is empty, a text has no token or too many, a group has two
            targets for one prompt, a metric is not known or no record has the field it needs, there are fewer facts
            than edits, or the model carries edits already.
    """
    if model.edits:
        raise ValueError(f"the model carries {len(model.edits)} edits; undo them first, evaluate makes its own")
    for count in edits:
        check_limits(edits=count)
    check_limits(edits_per_call=edits_per_call, limit=limit, max_steps=max_steps, batch_size=batch_size)
    check_targets(records, model.encoder, longest_input(model.config))
    chosen = choose_metrics(metrics, records, model)
    usable = _usable(records, edits, seed)
    asked = {i for units in usable.values() for unit in units[:limit] for i in unit}
    check_asked(model, records, sorted(asked), chosen)
    method = model.editor
    if not method.trains and not method.is_calibrated:
        observe_calibration_text(model.context, model.encoder)
    passages = held_out_passages(model, text) if "perplexity" in chosen else []
    steps = default_options(method, model.scope is not None, max_steps).max_steps or 1
    settings = {
        "version": __version__,
        "editor": hash_of_editor(model),
        "data": hash_of(asdict(record) for record in records),
        "text": hash_of(passages),
        "metrics": sorted(chosen),
        "edits_per_call": edits_per_call,
        "limit": limit,
        "seed": seed,
        "max_steps": steps,
        "batch_size": batch_size,
        **({} if scope else {"scope": False}),
    }
    run = Run(model, records, chosen, passages, steps, seed, batch_size, progress_of(progress_file, settings), scope)
    by_themselves = model.scope is not None and not scope  # acting everywhere, no two can share a pass
    before = perplexity(model, passages) if passages else None
    states = []
    for count in edits:
        measured, others = usable[count][:limit], usable[count][len(usable[count][:limit]) :]
        if count == 1 and all(len(unit) == 1 for unit in measured) and not by_themselves:
            measure: Callable[[], Iterable[dict[str, Any]]] = partial(run.alone, [unit[0] for unit in measured])
        else:
            measure = partial(run.kept_together, measured, others, count, edits_per_call)
        with suppress(PartsMissingError):
            parts = in_shares(run.progress, partial(_listed, measure))
            states.append(_state(parts, count, edits_per_call, before, seed))
    return states


def _listed(measure: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    return list(measure())


def _usable(records: Sequence[EditRecord], edits: Sequence[int], seed: int) -> dict[int, list[list[int]]]:
    """Return, for each number of edits kept at once, the units that can be edited, in the order of the seed."""
    units = shuffled_units(records, seed)
    check_groups(records, units)
    without = without_conflicts(units, records) if max(edits, default=1) > 1 else units
    for count in edits:
        if count > len(without):
            conflicting = len(units) - len(without)
            raise ValueError(
                f"{count} edits at once need as many facts, and the data set has {len(without)}"
                + (f" without {conflicting} that want another target of a prompt" if conflicting else "")
                + "; ask for fewer"
            )
    return {count: units if count == 1 else without for count in edits}


def choose_metrics(
    names: Sequence[str] | None, records: Sequence[EditRecord], model: EditableModel | None = None
) -> list[str]:
    """
    Return the metrics to measure, in the order of `METRICS`.

    Args:
        names (`Sequence[str]`, *optional*): Requested names; `"all"` means all that the data allows, with the slow
            ones.
        records (`Sequence[EditRecord]`): The data set.
        model ([`EditableModel`], *optional*): The model, which determines whether perplexity is possible.

    Raises:
        ValueError: A name is not known, or no record has the field that it needs.
    """
    needed = {name for name in METRICS.values() if name is not None}
    there: set[str] = set()
    for record in records:
        there |= {name for name in needed - there if getattr(record, name)}
        if there == needed:
            break
    reads = model is None or not model.encoder.is_encoder_decoder
    possible = {name for name, wanted in METRICS.items() if wanted is None or wanted in there}
    if not reads:
        possible.discard("perplexity")
    if names is None:
        return [name for name in METRICS if name in possible and name not in SLOW_METRICS]
    if "all" in names:
        return [name for name in METRICS if name in possible]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name!r}; the metrics are {', '.join(METRICS)}, and all")
        if name == "perplexity" and not reads:
            raise ValueError("perplexity of a text needs a decoder-only model, and this one is an encoder-decoder")
        if name not in possible:
            raise ValueError(
                f"the metric {name} needs the field {METRICS[name]!r}, which no record of the data has; "
                f"it allows {', '.join(n for n in METRICS if n in possible)}"
            )
    return [name for name in METRICS if name in names or name == "success"]


def _state(
    parts: Sequence[Mapping[str, Any]], count: int, edits_per_call: int | None, before: float | None, seed: int
) -> State:
    """Aggregate the parts of a state."""
    measured = [Measured(**values) for part in parts for values in part.get("measured", [])]
    metrics = summarize(measured)
    del metrics["edits"]
    intervals = {
        name: bootstrap_interval(values, seed=seed, weights=weights)
        for name, (values, weights) in metric_values(measured).items()
        if len(values) > 1
    }
    three = [metrics.get(f"{kind}_score") for kind in ("efficacy", "paraphrase", "neighborhood")]
    if all(value is not None for value in three):
        metrics["counterfact_score"] = harmonic_score(*three)  # type: ignore[arg-type]
    read = [part["perplexity"] for part in parts if "perplexity" in part]
    if before is not None and read:
        metrics |= {"perplexity_before": before, "perplexity": read[0], "perplexity_drawdown": read[0] - before}
    seconds = [part["seconds_an_edit"] for part in parts if "seconds_an_edit" in part]
    return State(
        count,
        edits_per_call if count > 1 else None,
        len(measured),
        metrics,
        intervals,
        sum(seconds) / len(seconds),
        max(filter(None, (part.get("peak_memory") for part in parts)), default=None),
    )
