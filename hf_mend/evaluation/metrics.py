"""Edit success, generality and locality of edits that are made alone or in groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..bases.gradients import kl_divergence, row_means
from ..bases.limits import longest_input
from ..bases.split import SplitModel, logits_of
from ..bases.targets import Target
from ..data.checks import missing_subjects
from ..data.deprecation import renamed_arguments
from ..data.encoding import EncodedBatch, Encoder, Query, batches
from ..data.records import EditRecord
from ..editing.batch_state import FoundUpdates
from ..editing.calibration_text import observe_calibration_text
from ..editing.context import EditingContext
from ..editing.proposals import SearchOptions
from ..editing.search import find_updates
from ..editing.writing import greedy_tokens
from ..edits.hook import applied
from ..edits.low_rank import Update, together
from ..methods import EditMethod


logger = logging.get_logger(__name__)


@dataclass
class Measured:
    """
    The measurements of one record; shares are over its own rows, and `None` if it has none.

    Args:
        success (`bool`): Every target token is the argmax, teacher-forced, on the prompt.
        generality (`float`, *optional*): Share of paraphrases for which the same is true.
        neighborhood (`float`, *optional*): Share of neighbouring prompts whose greedy next token stays.
        unrelated (`float`, *optional*): Share of unrelated answers' tokens whose greedy prediction stays.
        neighborhood_kl (`float`, *optional*): Mean KL(un-edited || edited) on neighbouring prompts, in nats.
        unrelated_kl (`float`, *optional*): Mean KL(un-edited || edited) on unrelated answers, in nats.
        exact_match (`bool`, *optional*): Free greedy decoding from the prompt says the target and then ends the word.
        drawdown (`float`, *optional*): Loss of accuracy on unrelated questions, where an answer is correct if all its
            tokens are (Mitchell et al. 2022, section 2).
        rows (`dict[str, int]`): Number of rows of each kind.
        further (`dict[str, float]`): Values that the `further` of [`evaluate_records`] returned.
    """

    success: bool
    generality: float | None = None
    neighborhood: float | None = None
    unrelated: float | None = None
    neighborhood_kl: float | None = None
    unrelated_kl: float | None = None
    exact_match: bool | None = None
    drawdown: float | None = None
    rows: dict[str, int] = field(default_factory=dict)
    further: dict[str, float] = field(default_factory=dict)


@renamed_arguments(edits_together="group_size")
def evaluate_records(  # its eleven parameters are public
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    records: Sequence[EditRecord],
    batch_size: int = 10,
    max_steps: int | None = None,
    group_size: int = 1,
    generate: bool = False,
    progress: bool = True,
    further: Callable[[int], dict[str, float]] | None = None,
) -> list[Measured]:
    """
    Edit each record and measure it. The edits of a batch run side by side, each row under its own edit or its group's.

    Args:
        split ([`SplitModel`]): The base model.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): The method that maps factors to updates.
        encoder ([`Encoder`]): The encoder of the texts.
        records (`Sequence[EditRecord]`): The facts.
        batch_size (`int`, defaults to 10): Number of edits per batch.
        max_steps (`int`, *optional*): The most steps of an edit, as for [`~hf_mend.editing.search.find_updates`].
        group_size (`int`, defaults to 1): Number of consecutive records whose edits are applied together while their
            rows are measured. Each edit is found on the un-edited model, or jointly by a method that joins edits.
        generate (`bool`, defaults to `False`): Measure `exact_match` too, which takes most of the time.
        progress (`bool`, defaults to `True`): Show a progress bar.
        further (`Callable[[int], dict[str, float]]`, *optional*): A function that is called with each record's index
            while the model carries its edit or its group's; its result goes into [`Measured`].
    """
    measured: list[Measured] = []
    context = EditingContext(split, targets, method)
    if not method.trains and not method.is_calibrated:
        observe_calibration_text(context, encoder)
    if method.edits_at_subject and (note := missing_subjects((r.prompt, r.subject) for r in records)):
        logger.warning(note)
    with torch.no_grad(), tqdm(total=len(records), desc="Measuring", disable=not progress) as bar:
        for chunk in batches(records, max(1, batch_size // group_size) * group_size):
            queries = [Query(record.prompt, record.target, subject=record.subject) for record in chunk]
            edits = encoder(queries).to(split.device)
            found = find_updates(context, [edits], SearchOptions(max_steps), group_size)[0]
            edited = _under_edits(context, found, group_size)
            results = measure_records(split, encoder, chunk, edited, generate=generate)
            for i, result in enumerate(results if further is not None else []):
                with edited(torch.tensor([i])):
                    assert further is not None
                    result.further = further(len(measured) + i)
            measured += results
            bar.update(len(chunk))
    return measured


def summarize(measured: Sequence[Measured]) -> dict[str, float]:
    """
    Return the means over edits of `edit_success` and `exact_match`, and over rows of the other metrics, as the field
    reports them. `score` is the mean of success, generality, neighborhood and unrelated.
    """
    out = {"edits": float(len(measured))}
    for name, (values, weights) in metric_values(measured).items():
        out[name] = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
    scored = [out[name] for name in ("edit_success", "generality", "neighborhood", "unrelated") if name in out]
    out["score"] = sum(scored) / len(scored)
    return out


def metric_values(measured: Sequence[Measured]) -> dict[str, tuple[list[float], list[int]]]:
    """Return each metric's values and their weights in rows, over the records that have one; see [`summarize`]."""
    found: dict[str, tuple[list[float], list[int]]] = {}

    def note(name: str, value: float | None, rows: int = 1) -> None:
        if value is not None and rows:
            values, weights = found.setdefault(name, ([], []))
            values.append(float(value))
            weights.append(rows)

    for m in measured:
        note("edit_success", m.success)
        for name in ("generality", "neighborhood", "unrelated", "neighborhood_kl", "unrelated_kl"):
            note(name, getattr(m, name), m.rows.get(name.removesuffix("_kl"), 0))
        note("exact_match", m.exact_match)
        note("drawdown", m.drawdown, m.rows.get("unrelated", 0))
        for name, value in m.further.items():
            note(name, value)
    return found


@torch.no_grad()
def measure_records(
    split: SplitModel,
    encoder: Encoder,
    records: Sequence[EditRecord],
    edited: Callable[[torch.Tensor], AbstractContextManager[None]],
    unedited: Callable[[], AbstractContextManager[None]] = nullcontext,
    generate: bool = False,
) -> list[Measured]:
    """
    Measure edits that are already made, in one batch for each kind of row.

    Args:
        split ([`SplitModel`]): The base model.
        encoder ([`Encoder`]): The encoder of the texts.
        records (`Sequence[EditRecord]`): The facts.
        edited (`Callable`): Returns a context in which a batch is under its edits, given the record index of each row.
        unedited (`Callable`): Returns a context without edits; the default suits edits that act only in `edited`.
        generate (`bool`, defaults to `False`): Measure `exact_match` too.
    """
    results = [Measured(False) for _ in records]
    kinds = {
        "success": [[Query(r.prompt, r.target)] for r in records],
        "generality": [[Query(text, r.target) for text in r.paraphrases] for r in records],
        "neighborhood": [[Query(text) for text in r.neighborhood] for r in records],
        "unrelated": [[Query(*pair) for pair in r.unrelated] for r in records],
    }
    for kind, queries in kinds.items():
        owner = torch.tensor([i for i, group in enumerate(queries) for _ in group])
        if len(owner) == 0:
            continue
        rows = encoder([query for group in queries for query in group]).to(split.device)
        state = split.state_of(rows)
        with edited(owner):
            after = logits_of(split, rows, state)
        before = None
        if kind in ("neighborhood", "unrelated"):
            with unedited():
                before = logits_of(split, rows, state)
        for i, values in enumerate(_of_rows(kind, rows, after, before, owner, len(records))):
            if values:
                results[i].rows[kind] = int((owner == i).sum())
            for name, value in values.items():
                setattr(results[i], name, value)
    if generate:
        said = _says_freely(split, encoder, records, edited)
        for result, correct in zip(results, said, strict=True):
            result.exact_match = correct
    return results


def _of_rows(
    kind: str, rows: EncodedBatch, after: torch.Tensor, before: torch.Tensor | None, owner: torch.Tensor, records: int
) -> list[dict[str, float | bool]]:
    """Return the metrics of one kind of row for each record."""
    labels = rows.next_tokens[rows.positions].to(after.device)
    correct = row_means((after.argmax(-1) == (labels if before is None else before.argmax(-1))).float(), rows)
    found: list[dict[str, float | bool]] = []
    if before is not None:
        kl = row_means(kl_divergence(after, before), rows)
        known, still = (row_means((said.argmax(-1) == labels).float(), rows) == 1 for said in (before, after))
    for i in range(records):
        mine = (owner == i).to(correct.device)
        if not mine.any():
            found.append({})
        elif kind == "success":
            found.append({"success": bool(correct[mine].item() == 1)})
        elif kind == "generality":
            found.append({"generality": float((correct[mine] == 1).float().mean())})
        else:
            found.append({kind: float(correct[mine].mean()), f"{kind}_kl": float(kl[mine].mean())})
            if kind == "unrelated":
                found[-1]["drawdown"] = float((known[mine].float() - still[mine].float()).mean())
    return found


def measure_with_scope(
    model: Any, records: Sequence[EditRecord], batch_size: int = 10, progress: bool = True
) -> list[Measured]:
    """
    Edit the records of a model with a scope in calls of a batch each, and measure each batch beside itself alone.

    Args:
        model ([`EditableModel`]): The model, without edits.
        records (`Sequence[EditRecord]`): The facts.
        batch_size (`int`, defaults to 10): Edits in a call.
        progress (`bool`, defaults to `True`): Show a progress bar.
    """
    measured: list[Measured] = []
    with tqdm(total=len(records), desc="Measuring", disable=not progress) as bar:
        for chunk in batches(records, batch_size):
            # Without probes, which edit would check; of two answers to one prompt the later one.
            bare = {record.prompt: replace(record, paraphrases=[], neighborhood=[]) for record in chunk}
            with model.edited([*bare.values()], check=False):
                measured += measure_records(
                    model.split, model.encoder, chunk, lambda owner: nullcontext(), model.disable_edits
                )
            bar.update(len(chunk))
    return measured


def _under_edits(
    context: EditingContext, found: FoundUpdates, group_size: int
) -> Callable[[torch.Tensor], AbstractContextManager[None]]:
    """Return a context with the rows under their group's edits, and the base delta where one acts."""
    updates = together(found.updates, group_size)
    groups = torch.arange(len(found.steps)) // group_size
    acts = (
        torch.zeros(len(groups), dtype=torch.float32).index_add(0, groups, torch.tensor(found.steps).float())[groups]
        > 0
    )

    def edited(owner: torch.Tensor) -> AbstractContextManager[None]:
        base_delta = _where(acts[owner], context.method.base_delta())
        return applied(context.targets, base_delta, _for_rows(updates, groups[owner]))

    return edited


def _for_rows(updates: dict[str, Update], owner: torch.Tensor) -> dict[str, Update]:
    return {name: (u[owner.to(u.device)], v[owner.to(v.device)]) for name, (u, v) in updates.items()}


def _where(acting: torch.Tensor, base_delta: dict[str, Update]) -> dict[str, Update]:
    """Return the method's base delta for the rows in which an edit acts, `(rows,)`."""
    if acting.all():
        return base_delta
    rows = len(acting)
    return {
        name: (u.expand(rows, *u.shape), v * acting.to(v.device, v.dtype)[:, None, None])
        for name, (u, v) in base_delta.items()
    }


def _says_freely(
    split: SplitModel,
    encoder: Encoder,
    records: Sequence[EditRecord],
    edited: Callable[[torch.Tensor], AbstractContextManager[None]],
    extra_tokens: int = 3,
) -> list[bool]:
    """
    Return whether greedy generation from the prompt says the target and then ends the word. Generation ends with the
    model's context, or where the model stops by itself.
    """
    queries = [encoder.tokens(Query(record.prompt, record.target)) for record in records]
    most = max(len(target) for _, target in queries) + extra_tokens + len(encoder.decoder_prefix[1:])
    longest = longest_input(split.model.config) or math.inf
    rows_of: dict[int, list[int]] = {}  # room in tokens -> the records
    for i, (prompt, _) in enumerate(queries):
        room = longest if encoder.is_encoder_decoder else longest - len(prompt)
        rows_of.setdefault(int(min(most, room)), []).append(i)
    said = [""] * len(records)
    for room, rows in rows_of.items():
        if room > 0:
            with edited(torch.tensor(rows)):
                out = greedy_tokens(split.model, encoder, [queries[i][0] for i in rows], room)
            for i, tokens in zip(rows, out, strict=True):
                said[i] = encoder.decode(tokens)
    return [
        text.startswith(record.target) and not text[len(record.target) :][:1].isalnum()
        for record, text in zip(records, said, strict=True)
    ]
