"""
A data set's evaluation: an editor or method with 1, 10, 100, ... edits kept at once, by all metrics that the data
allows, with confidence intervals, time and memory; resumable, and the same for the same seed.
"""

from __future__ import annotations

import hashlib
import json
import logging as python_logging
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .. import __version__
from ..bases.fingerprint import fingerprint_of
from ..bases.limits import longest_input
from ..data.encoding import batches
from ..data.readers.reading import check_targets
from ..data.records import EditRecord
from ..editing.calibration_text import observe_ordinary_text
from ..editing.requests import check_limits
from ..edits.edit import same_prompt
from ..model import EditableModel
from .checks import check_asked, check_groups
from .generation import answer
from .metrics import Measured, evaluate_records, measure_records, metric_values, summarize
from .resume import Progress
from .scores import (
    bootstrap_interval,
    counterfact_scores,
    harmonic_score,
    held_out_passages,
    in_the_wild,
    n_gram_entropy,
    perplexity,
    portability,
)


logger = logging.get_logger(__name__)

# Metric -> the field of a record that it needs. docs/evaluation.md defines each.
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
# These generate long texts, which takes longer than all else together.
SLOW_METRICS = ("fluency", "in_the_wild")
_ALONE = 5  # single edits that are timed one by one, and read under
_FLUENCY_TOKENS = 100


@dataclass
class State:
    """
    What was measured of a model that carries a number of edits at once.

    Args:
        edits (`int`): How many: facts, or groups of facts that belong together.
        in_calls_of (`int`, *optional*): So many to a call of `edit`; all in one where it is `None`.
        measured (`int`): Records that were measured.
        metrics (`dict[str, float]`): Name -> value; docs/evaluation.md defines them.
        intervals (`dict[str, tuple[float, float]]`): Name -> 95 % bootstrap interval over the records.
        seconds_an_edit (`float`): Of an edit made in such a call; of one edit made by itself where `edits` is 1.
        peak_memory (`int`, *optional*): Bytes while editing, the model's included; `None` where it cannot be known.
    """

    edits: int
    in_calls_of: int | None
    measured: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds_an_edit: float = 0.0
    peak_memory: int | None = None


def evaluate(
    model: EditableModel,
    records: Sequence[EditRecord],
    *,
    edits: Sequence[int] = (1,),
    in_calls_of: int | None = None,
    metrics: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    text: str | None = None,
    max_steps: int | None = None,
    batch_size: int = 10,
    progress_file: str | Path | None = None,
) -> list[State]:
    """
    Evaluates a model's editor, or the method it is edited by, on a data set.

    With one edit at a time, edits run side by side in one pass, each row of it under its own. With more, each state is
    made by [`~hf_mend.EditableModel.edit`], measured, and undone; its facts are measured, and where it has more edits
    than facts are to be measured, others stand among them. Records of one `group` are edited together and count as
    one. Of facts that want different targets of one prompt, the first alone is in a state with several.

    Args:
        model ([`EditableModel`]): The model. It carries no edits, and none afterwards.
        records (`Sequence[EditRecord]`): The data set; may be one that stays on disk.
        edits (`Sequence[int]`, defaults to `(1,)`): How many edits are kept at once, a state each.
        in_calls_of (`int`, *optional*): So many edits to a call, one call after another; all in one call by default.
        metrics (`Sequence[str]`, *optional*): Names in `METRICS`; by default those that the data's fields allow, but
            for the ones that generate long texts, `SLOW_METRICS`. `success` is always there.
        limit (`int`, *optional*): Measure so many facts (or groups), drawn by the seed; all by default.
        seed (`int`, defaults to 0): Of the order of the facts, the intervals, and methods that draw.
        text (`str`, *optional*): For perplexity; that of [`~hf_mend.evaluation.scores.held_out_passages`] by default.
        max_steps (`int`, *optional*): As for `edit`.
        batch_size (`int`, defaults to 10): Records in one pass.
        progress_file (`str` or `Path`, *optional*): JSON lines that keep what was measured: an evaluation that is cut
            off goes on from there when it is called again with the same arguments, editor, base and data.

    Returns:
        `list[State]`: In the order of `edits`.

    Raises:
        ValueError: An argument makes no sense, the data set is empty, a text that is to be read has no token or too
            many, a group wants two targets of one prompt, a metric is not known or no record has the field it needs,
            there are fewer facts than edits, or the model carries edits already.
    """
    if model.edits:
        raise ValueError(f"the model carries {len(model.edits)} edits; undo them first, evaluate makes its own")
    for count in edits:
        check_limits(edits=count)
    check_limits(in_calls_of=in_calls_of, limit=limit, max_steps=max_steps, batch_size=batch_size)
    check_targets(records, model.encoder, longest_input(model.config))
    chosen = choose_metrics(metrics, records, model)
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
    asked = {i for count in edits for unit in (units if count == 1 else without)[:limit] for i in unit}
    check_asked(model, records, sorted(asked), chosen)
    method = model.editor
    if not method.trains and not method.is_calibrated:
        observe_ordinary_text(model.context, model.encoder)
    passages = held_out_passages(model, text) if "perplexity" in chosen else []
    steps = method.max_steps if max_steps is None else max_steps
    settings = {
        "version": __version__,
        "editor": _hash_of_editor(model),
        "data": _hash(asdict(record) for record in records),
        "text": _hash(passages),
        "metrics": sorted(chosen),
        "in_calls_of": in_calls_of,
        "limit": limit,
        "seed": seed,
        "max_steps": steps,
        "batch_size": batch_size,
    }
    run = _Run(model, records, chosen, passages, steps, seed, batch_size, Progress(progress_file, settings))
    before = perplexity(model, passages) if passages else None
    states = []
    for count in edits:
        usable = units if count == 1 else without
        measured = usable[:limit]
        if count == 1 and all(len(unit) == 1 for unit in measured):
            parts = list(run.alone([unit[0] for unit in measured]))
        else:
            parts = list(run.kept_together(measured, usable[len(measured) :], count, in_calls_of))
        states.append(_state(parts, count, in_calls_of, before, seed))
    return states


def choose_metrics(
    names: Sequence[str] | None, records: Sequence[EditRecord], model: EditableModel | None = None
) -> list[str]:
    """
    The metrics to measure, in the order of `METRICS`.

    Args:
        names (`Sequence[str]`, *optional*): Those asked for; `"all"` stands for all that the data allows, slow or not.
        records (`Sequence[EditRecord]`): The data set.
        model ([`EditableModel`], *optional*): Says whether there is a perplexity.

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


def shuffled_units(records: Sequence[EditRecord], seed: int) -> list[list[int]]:
    """The numbers of the records, those of one group together, in an order that depends on the seed alone."""
    units: list[list[int]] = []
    last = None
    for i, record in enumerate(records):
        if record.group is not None and record.group == last:
            units[-1].append(i)
        else:
            units.append([i])
        last = record.group
    random.Random(seed).shuffle(units)
    return units


def without_conflicts(units: Sequence[list[int]], records: Sequence[EditRecord]) -> list[list[int]]:
    """Those of which no record wants another target than an earlier one's of the same prompt: a model says one."""
    wanted: dict[Any, list[str]] = {}
    kept = []
    for unit in units:
        pairs = [(same_prompt(records[i].prompt, chat=False), records[i].target.split()) for i in unit]
        if all(wanted.get(prompt, target) == target for prompt, target in pairs):
            wanted.update(pairs)
            kept.append(unit)
    if len(kept) < len(units):
        logger.warning(f"{len(units) - len(kept)} facts that want another target of a prompt are not kept together")
    return kept


@dataclass
class _Run:
    """One evaluation: what its parts need, and what is known of them already."""

    model: EditableModel
    records: Sequence[EditRecord]
    metrics: list[str]
    passages: list[list[int]]
    max_steps: int
    seed: int
    batch_size: int
    progress: Progress

    def alone(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Single edits: a few by themselves, for time, memory and perplexity; then all, side by side in batches."""
        yield self.progress.part("alone/by themselves", lambda: self._by_themselves(numbers[:_ALONE]))
        with tqdm(total=len(numbers), desc="Single edits") as bar:
            for i, chunk in enumerate(batches(numbers, self.batch_size)):
                yield self.progress.part(f"alone/{i}", partial(self._side_by_side, chunk))
                bar.update(len(chunk))

    def kept_together(
        self, measured: Sequence[list[int]], others: Sequence[list[int]], count: int, in_calls_of: int | None
    ) -> Iterator[dict[str, Any]]:
        """`count` edits at once, group after group, until all facts are measured."""
        with tqdm(total=len(measured), desc=f"{count} edit{'s' if count > 1 else ''} at once") as bar:
            for i, first in enumerate(range(0, len(measured), count)):
                group = measured[first : first + count]
                rest = [*others, *measured[:first], *measured[first + count :]]
                made = _spread(group, rest, count)
                measure = partial(self._made_and_measured, group, made, in_calls_of, read=first == 0)
                yield self.progress.part(f"{count}/{i}", measure)
                bar.update(len(group))

    def _by_themselves(self, numbers: Sequence[int]) -> dict[str, Any]:
        seconds, read, peaks = [], [], []
        for number in numbers:
            with self._made([[number]], None) as (second, peak):
                seconds.append(second)
                peaks.append(peak)
                if self.passages:
                    read.append(perplexity(self.model, self.passages))
        mean = {"perplexity": sum(read) / len(read)} if read else {}
        return {"seconds_an_edit": statistics.median(seconds), "peak_memory": _largest(peaks), **mean}

    def _side_by_side(self, numbers: Sequence[int]) -> dict[str, Any]:
        model, chosen = self.model, [self.records[i] for i in numbers]
        with _as_it_was(model, self.seed):
            measured = evaluate_records(
                model.split, model.targets, model.editor, model.encoder, [self._reduced(r) for r in chosen],
                self.batch_size, self.max_steps, generate="exact_match" in self.metrics, progress=False,
                further=lambda i: self._further(chosen[i]),
            )  # fmt: skip
        return {"measured": [asdict(m) for m in measured]}

    def _made_and_measured(
        self, group: Sequence[list[int]], made: Sequence[list[int]], in_calls_of: int | None, read: bool
    ) -> dict[str, Any]:
        model = self.model
        with self._made(made, in_calls_of) as (seconds, peak):
            chosen = [self.records[i] for unit in group for i in unit]
            firsts = {unit[0] for unit in group}
            asked = [i in firsts for unit in group for i in unit]
            measured: list[Measured] = []
            for chunk in batches(chosen, self.batch_size):
                measured += measure_records(
                    model.split, model.encoder, [self._reduced(r) for r in chunk], lambda owner: nullcontext(),
                    model.disable_edits, "exact_match" in self.metrics,
                )  # fmt: skip
            for result, record, first in zip(measured, chosen, asked, strict=True):
                # What follows from a group of edits is asked once.
                result.further = self._further(record if first else replace(record, portability=[]))
            found: dict[str, Any] = {"measured": [asdict(m) for m in measured], "seconds_an_edit": seconds / len(made)}
            if read and self.passages:
                found["perplexity"] = perplexity(model, self.passages)
        return {**found, "peak_memory": peak}

    @contextmanager
    def _made(self, units: Sequence[list[int]], in_calls_of: int | None) -> Iterator[tuple[float, int | None]]:
        """Within the context the model carries the edits of these records; how long that took, and the peak."""
        model = self.model
        with _as_it_was(model, self.seed), _quiet():
            try:
                peak = _PeakMemory(model.device)
                began = time.perf_counter()
                for call in batches(units, in_calls_of or len(units)):
                    # Without the texts that an edit of a record would be asked about.
                    records = [
                        replace(self.records[i], paraphrases=[], neighborhood=[]) for unit in call for i in unit
                    ]
                    model.edit(records, max_steps=self.max_steps, force=True)
                yield time.perf_counter() - began, peak.read()
            finally:
                model.undo_all()

    def _reduced(self, record: EditRecord) -> EditRecord:
        """The record without what only metrics that nobody asked for need."""
        local = {"unrelated", "drawdown"} & set(self.metrics)
        return replace(
            record,
            paraphrases=record.paraphrases if "generality" in self.metrics else [],
            neighborhood=record.neighborhood if "neighborhood" in self.metrics else [],
            unrelated=record.unrelated if local else [],
        )

    def _further(self, record: EditRecord) -> dict[str, float]:
        """The metrics that are found record by record, of the model as it is."""
        found: dict[str, float] = {}
        if "counterfact" in self.metrics and record.ground_truth:
            found |= counterfact_scores(self.model, record)
        if "portability" in self.metrics and record.portability:
            found["portability"] = portability(self.model, record)
            if record.group is not None:
                found["multi_hop"] = float(found["portability"] > 0)
        if "fluency" in self.metrics and record.generation:
            texts = [
                f"{prompt} {answer(self.model, prompt, max_new_tokens=_FLUENCY_TOKENS)}"
                for prompt in record.generation
            ]
            found["fluency"] = sum(map(n_gram_entropy, texts)) / len(texts)
        if "in_the_wild" in self.metrics:
            found |= {f"wild_{name}": float(said) for name, said in in_the_wild(self.model, record).items()}
        return found


def _spread(group: Sequence[list[int]], others: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` units: those of `group` at even distances among others."""
    places = {i * count // len(group): unit for i, unit in enumerate(group)}
    rest = iter(others)
    return [places[i] if i in places else next(rest) for i in range(count)]


def _state(
    parts: Sequence[Mapping[str, Any]], count: int, in_calls_of: int | None, before: float | None, seed: int
) -> State:
    """A state's figures from its parts."""
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
        in_calls_of if count > 1 else None,
        len(measured),
        metrics,
        intervals,
        sum(seconds) / len(seconds),
        _largest([part.get("peak_memory") for part in parts]),
    )


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


@contextmanager
def _as_it_was(model: EditableModel, seed: int) -> Iterator[None]:
    """
    Draws within the context depend on the seed alone, and a method's statistics are afterwards what they were: no part
    of an evaluation depends on those before it, so that one which goes on gives what an unbroken one would have.
    """
    kept = {name: buffer.clone() for name, buffer in model.editor.named_buffers()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.editor.named_buffers():
                    buffer.copy_(kept[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Edits that do not take are in the figures; a thousand warnings would say no more."""
    logger = python_logging.getLogger("hf_mend.model")
    level = logger.level
    logger.setLevel(python_logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _PeakMemory:
    """The most memory since it was made: of the process, or on a GPU of its tensors."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        except OSError:
            self.known = False  # not Linux

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or not self.known:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _hash_of_editor(model: EditableModel) -> str:
    """Of configuration and weights of the editor, and of the base."""
    digest = hashlib.sha256(model.editor_config.to_json().encode())
    base = [fingerprint_of(model.base_model, model.targets), str(model.config.name_or_path), str(model.dtype)]
    digest.update(json.dumps(base).encode())
    for name, tensor in sorted(model.editor.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash(values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()
