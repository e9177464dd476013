"""One evaluation, in parts that are independent of one another: each makes, measures and undoes its edits."""

from __future__ import annotations

import logging as python_logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.encoding import batches
from ..data.estimate import Estimate
from ..data.records import EditRecord
from ..edits.edit import without_scopes
from ..model import EditableModel
from .generation import answer
from .metrics import Measured, evaluate_records, measure_records
from .resume import Progress
from .scores import counterfact_scores, in_the_wild, n_gram_entropy, perplexity, portability


_ALONE = 5  # number of single edits that are timed, and for which perplexity is measured, one by one
_FLUENCY_TOKENS = 100


@dataclass
class Run:
    """
    One evaluation: the inputs of its parts, and the parts that are finished.

    Args:
        model ([`EditableModel`]): The model, which carries no edits.
        records (`Sequence[EditRecord]`): The data set, whose records the parts select by index.
        metrics (`list[str]`): Names in [`~hf_mend.evaluation.evaluate.METRICS`].
        passages (`list[list[int]]`): Token ids of the texts for perplexity; empty if it is not measured.
        max_steps (`int`): As for [`~hf_mend.EditableModel.edit`].
        seed (`int`): The seed of methods that draw.
        batch_size (`int`): Records in one forward pass.
        progress ([`~hf_mend.evaluation.resume.Progress`]): The store of the finished parts.
        scope (`bool`, defaults to `True`): Whether edits keep their scopes.
    """

    model: EditableModel
    records: Sequence[EditRecord]
    metrics: list[str]
    passages: list[list[int]]
    max_steps: int
    seed: int
    batch_size: int
    progress: Progress
    scope: bool = True

    def alone(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Measure single edits: a few one by one, for time, memory and perplexity; then all, in batches."""
        yield self.progress.part("alone/by themselves", lambda: self._by_themselves(numbers[:_ALONE]))
        chunks = {f"alone/{i}": chunk for i, chunk in enumerate(batches(numbers, self.batch_size))}
        estimate = self._estimate("Single edits", {name: len(chunk) for name, chunk in chunks.items()})
        with tqdm(total=len(numbers), desc="Single edits") as bar:
            for name, chunk in chunks.items():
                known = name in self.progress.parts
                yield self.progress.part(name, partial(self._side_by_side, chunk))
                bar.update(len(chunk))
                estimate.done(0 if known else len(chunk))

    def _estimate(self, what: str, sizes: Mapping[str, int]) -> Estimate:
        """Return an estimate for the parts that are not finished, each of so many facts."""
        return Estimate(what, sum(size for name, size in sizes.items() if name not in self.progress.parts), "facts")

    def kept_together(
        self, measured: Sequence[list[int]], others: Sequence[list[int]], count: int, edits_per_call: int | None
    ) -> Iterator[dict[str, Any]]:
        """Measure states of `count` edits, group after group, until all facts are measured."""
        what = f"{count} edit{'s' if count > 1 else ''} at once"
        groups = {f"{count}/{i}": first for i, first in enumerate(range(0, len(measured), count))}
        sizes = {name: len(measured[first : first + count]) for name, first in groups.items()}
        estimate = self._estimate(what, sizes)
        with tqdm(total=len(measured), desc=what) as bar:
            for name, first in groups.items():
                group = measured[first : first + count]
                rest = [*others, *measured[:first], *measured[first + count :]]
                made = _spread(group, rest, count)
                measure = partial(self._made_and_measured, group, made, edits_per_call, read=first == 0)
                known = name in self.progress.parts
                yield self.progress.part(name, measure)
                bar.update(len(group))
                estimate.done(0 if known else len(group))

    def _by_themselves(self, numbers: Sequence[int]) -> dict[str, Any]:
        seconds, read, peaks = [], [], []
        for number in numbers:
            with self._made([[number]], None) as (second, peak):
                seconds.append(second)
                peaks.append(peak)
                if self.passages:
                    read.append(perplexity(self.model, self.passages))
        mean = {"perplexity": sum(read) / len(read)} if read else {}
        return {
            "seconds_an_edit": statistics.median(seconds),
            "peak_memory": max(filter(None, peaks), default=None),
            **mean,
        }

    def _side_by_side(self, numbers: Sequence[int]) -> dict[str, Any]:
        model, chosen = self.model, [self.records[i] for i in numbers]
        if model.scope is not None:  # an edit's own decision where it acts is part of what is measured
            units = [[i] for i in numbers]
            return {"measured": self._made_and_measured(units, units, None, read=False)["measured"]}
        with _as_it_was(model, self.seed):
            measured = evaluate_records(
                model.split, model.targets, model.editor, model.encoder, [self._reduced(r) for r in chosen],
                self.batch_size, self.max_steps, generate="exact_match" in self.metrics, progress=False,
                further=lambda i: self._further(chosen[i]),
            )  # fmt: skip
        return {"measured": [asdict(m) for m in measured]}

    def _made_and_measured(
        self, group: Sequence[list[int]], made: Sequence[list[int]], edits_per_call: int | None, read: bool
    ) -> dict[str, Any]:
        model = self.model
        with self._made(made, edits_per_call) as (seconds, peak):
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
                # Portability of a group of edits is measured once.
                result.further = self._further(record if first else replace(record, portability=[]))
            found: dict[str, Any] = {"measured": [asdict(m) for m in measured], "seconds_an_edit": seconds / len(made)}
            if read and self.passages:
                found["perplexity"] = perplexity(model, self.passages)
        return {**found, "peak_memory": peak}

    @contextmanager
    def _made(self, units: Sequence[list[int]], edits_per_call: int | None) -> Iterator[tuple[float, int | None]]:
        """Yield, while the model carries the edits of these records, the editing time and the peak of memory."""
        model = self.model
        with _as_it_was(model, self.seed), _quiet():
            try:
                peak = _PeakMemory(model.device)
                began = time.perf_counter()
                for call in batches(units, edits_per_call or len(units)):
                    # Leave out the probes, which an edit of a record would check.
                    records = [
                        replace(self.records[i], paraphrases=[], neighborhood=[]) for unit in call for i in unit
                    ]
                    # What did not take is measured too, as in the literature.
                    model.edit(records, max_steps=self.max_steps, force=True, keep_failed=True, check_earlier=0)
                cost = time.perf_counter() - began, peak.read()
                with nullcontext() if self.scope else model.carrying(without_scopes(model.edits)):
                    yield cost
            finally:
                model.undo_all()

    def _reduced(self, record: EditRecord) -> EditRecord:
        """Return the record without the fields that only unrequested metrics need."""
        local = {"unrelated", "drawdown"} & set(self.metrics)
        return replace(
            record,
            paraphrases=record.paraphrases if "generality" in self.metrics else [],
            neighborhood=record.neighborhood if "neighborhood" in self.metrics else [],
            unrelated=record.unrelated if local else [],
        )

    def _further(self, record: EditRecord) -> dict[str, float]:
        """Return the metrics that are measured record by record, of the model with its present edits."""
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
    """Return `count` units, with those of `group` at even distances among the others."""
    places = {i * count // len(group): unit for i, unit in enumerate(group)}
    rest = iter(others)
    return [places[i] if i in places else next(rest) for i in range(count)]


@contextmanager
def _as_it_was(model: EditableModel, seed: int) -> Iterator[None]:
    """
    Make draws within the context depend on the seed alone, and restore the method's statistics after it. Thus no part
    of an evaluation depends on earlier ones, and a resumed evaluation equals an uninterrupted one.
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
    """Silence the warnings about edits that do not take, which the metrics count, and about the time of a call."""
    loggers = [python_logging.getLogger(name) for name in ("hf_mend.model", "hf_mend.data.estimate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(python_logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _PeakMemory:
    """The peak of memory since construction: of the process, or of the tensors on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        except OSError:
            self.known = False  # not Linux

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or not self.known:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
