"""Runs the search of a method that looks for its update by repeated passes of the edited model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from ..bases.gradients import Factors, gradient_factors, kl_divergence, row_means, trace
from ..bases.split import HiddenState, SplitModel, logits_of
from ..bases.targets import Target
from ..data.encoding import Rows
from ..edits.hook import applied
from ..edits.low_rank import Update
from ..methods import IterativeMethod, Seen
from .joint import Chunk, FoundUpdates, ask, check_finite, look, set_keys, show, updates_of
from .requests import Answers


class BatchLook:
    """
    Looks at a batch of requests under candidate updates; what lies below the edited blocks runs once.

    Args:
        split ([`SplitModel`]): The model, with whatever edits it carries.
        targets (`Sequence[Target]`): The edited layers.
        rows ([`Rows`]): Prompts and targets, a row a request.
        state ([`HiddenState`]): What `run_below` gave for them.
        wanted (`torch.Tensor`): The numbers of the rows that are to be edited.
        carried (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Updates that the rows are under already, one for
            all or one for each.
    """

    def __init__(
        self,
        split: SplitModel,
        targets: Sequence[Target],
        rows: Rows,
        state: HiddenState,
        wanted: torch.Tensor,
        carried: Mapping[str, Update] = MappingProxyType({}),
    ):
        self.split, self.targets, self.rows, self.state, self.wanted = split, targets, rows, state, wanted
        self.carried = carried

    def __call__(self, updates: Mapping[str, Update], requests: torch.Tensor) -> Seen:
        rows, state = self.rows[requests], self.state.rows(requests)
        carried = {name: _of_requests(pair, requests) for name, pair in self.carried.items()}
        with applied(self.targets, carried), applied(self.targets, updates):
            factors, logits = trace(self.split, self.targets, rows.inputs, rows.next_tokens, state)
        check_finite("gradient", factors)
        said = ask(rows, logits)
        return Seen(torch.tensor([all(right) for right in said.right]), torch.tensor(said.least), factors)

    def places(self, layer: str) -> torch.Tensor:
        kind = next(target.stack for target in self.targets if target.name == layer)
        rows = self.rows[self.wanted]
        last = rows.positions.int().argmax(-1)  # the position that predicts the answer's first token
        if "decoder_input_ids" in rows.inputs:
            if kind != "encoder":
                return last.cpu()
            width = rows.inputs["attention_mask"].shape[1]
            last = (rows.inputs["attention_mask"] * torch.arange(width, device=rows.positions.device)).argmax(-1)
        if rows.subjects is None:
            return last.cpu()
        return torch.where(rows.subjects >= 0, rows.subjects, last).cpu()

    def drift(self, updates: Mapping[str, Update], texts: Rows) -> Factors:
        requests = len(next(iter(updates.values()))[0])
        state = self.split.run_below(texts.inputs)
        base = logits_of(self.split, texts, state)  # (positions, vocab)
        every = torch.arange(len(texts)).repeat(requests)
        rows = texts[every]

        def divergence(logits: torch.Tensor) -> torch.Tensor:
            per_position = kl_divergence(logits, base.to(logits.device).repeat(requests, 1))
            return row_means(per_position, rows).sum() / len(texts)

        with applied(self.targets, updates):
            factors, _ = gradient_factors(
                self.split, self.targets, rows.inputs, rows.positions, divergence, state.rows(every)
            )
        check_finite("gradient", factors)
        return {
            name: (x.reshape(requests, -1, x.shape[-1]), delta.reshape(requests, -1, delta.shape[-1]))
            for name, (x, delta) in factors.items()
        }


# How often a method that joins lets rows that do not say their targets beside the others ask for more.
_ROUNDS = 3


@torch.no_grad()
def search_updates(
    split: SplitModel,
    targets: Sequence[Target],
    method: IterativeMethod,
    rows: Rows,
    max_steps: int | None = None,
    force: bool = True,
    check: bool = True,
) -> FoundUpdates:
    """
    The updates that an [`~hf_mend.methods.IterativeMethod`] finds for a batch of rows, each row's on its own.

    Args:
        split, targets, method, rows: As for [`~hf_mend.editing.search.find_updates`].
        max_steps (`int`, *optional*): The most steps a row may take; the method's own number when missing.
        force (`bool`, defaults to `True`): Take a step also where the model says the target already.
        check (`bool`, defaults to `True`): Ask the edited model in the end.

    Raises:
        ValueError: A gradient or an update is not finite, or the method has not seen the text it needs.
    """
    state = split.run_below(rows.inputs)
    before = ask(rows, logits_of(split, rows, state))
    wanted = torch.tensor([i for i, right in enumerate(before.right) if force or not all(right)], dtype=torch.long)
    steps = [0] * len(rows)
    updates: dict[str, Update] = {}
    if len(wanted):
        look = BatchLook(split, targets, rows, state, wanted)
        found, taken = method.find(look, method.max_steps if max_steps is None else max_steps)
        check_finite("update", found)
        updates = {name: (_in_place(u, wanted, rows), _in_place(v, wanted, rows)) for name, (u, v) in found.items()}
        for i, count in zip(wanted.tolist(), taken, strict=True):
            steps[i] = count
    after: Answers | None = None
    if check:
        with applied(targets, updates):
            after = ask(rows, logits_of(split, rows, state)) if updates else before
    return FoundUpdates(updates, before, after, steps)


@torch.no_grad()
def search_joint_updates(
    split: SplitModel,
    targets: Sequence[Target],
    method: IterativeMethod,
    batches: Sequence[Rows],
    max_steps: int | None = None,
    force: bool = True,
    check: bool = True,
    edits_together: int | None = None,
    kept: Mapping[str, torch.Tensor] = MappingProxyType({}),
    progress: Callable[[int], object] | None = None,
) -> list[FoundUpdates]:
    """
    The updates of an [`~hf_mend.methods.IterativeMethod`] that joins the edits of a call: the shifts are sought for
    each row on its own and merged. Rows that do not say their targets beside the others then ask for more, on the
    model as the merged update left it.

    Args:
        split, targets, method, batches, max_steps, force, check, edits_together, kept, progress: As for
            [`~hf_mend.editing.joint.find_joint_updates`]; `max_steps` is the method's own number when missing, and
            without
            the check no row asks again.

    Raises:
        ValueError: A gradient or an update is not finite.
    """
    chunks = []
    for rows in batches:
        state = split.run_below(rows.inputs)
        before = ask(rows, logits_of(split, rows, state))
        wanted = torch.tensor([force or not all(right) for right in before.right])
        chunks.append(Chunk(rows, state, before, wanted, [0] * len(rows)))
    asked = [chunk.wanted for chunk in chunks]
    steps = method.max_steps if max_steps is None else max_steps
    after: list[Answers | None] = [None] * len(chunks)
    for again in range(_ROUNDS if check else 1):
        for chunk in chunks:
            _seek(split, targets, method, chunk, steps)
            if progress is not None and not again:
                progress(len(chunk.rows))
        if not any(chunk.shifts for chunk in chunks):
            return [FoundUpdates({}, chunk.before, chunk.before if check else None, chunk.steps) for chunk in chunks]
        if not again:
            set_keys(chunks, method, edits_together, kept)
        show(chunks, edits_together)
        if not check:
            break
        after = [look(split, targets, chunk) for chunk in chunks]
        for chunk, rows_asked, said in zip(chunks, asked, after, strict=True):
            assert said is not None
            chunk.wanted = rows_asked & torch.tensor([not all(right) for right in said.right])
        if not any(chunk.wanted.any() for chunk in chunks):
            break
    return [
        FoundUpdates(updates_of(chunk), chunk.before, said, chunk.steps, chunk.inputs)
        for chunk, said in zip(chunks, after, strict=True)
    ]


def _seek(split: SplitModel, targets: Sequence[Target], method: IterativeMethod, chunk: Chunk, max_steps: int) -> None:
    """Adds the shifts that the chunk's wanted rows ask for, on the model under what they see."""
    wanted = chunk.wanted.nonzero()[:, 0]
    if not len(wanted):
        return
    found, taken = method.find(BatchLook(split, targets, chunk.rows, chunk.state, wanted, chunk.seen), max_steps)
    check_finite("update", found)
    for name, (x, shift) in found.items():
        chunk.inputs.setdefault(name, _in_place(x, wanted, chunk.rows))  # rows that ask again were in the first round
        shift = _in_place(shift, wanted, chunk.rows)
        chunk.shifts[name] = chunk.shifts[name] + shift if name in chunk.shifts else shift
    for i, count in zip(wanted.tolist(), taken, strict=True):
        chunk.steps[i] += count


def _of_requests(update: Update, requests: torch.Tensor) -> Update:
    """An update for each request, or one for all."""
    u, v = update
    return update if u.dim() == 2 else (u[requests.to(u.device)], v[requests.to(v.device)])


def _in_place(side: torch.Tensor, wanted: torch.Tensor, rows: Rows) -> torch.Tensor:
    """One side of the wanted rows' updates among all rows; the others' is zero."""
    if len(wanted) == len(rows):
        return side
    whole = side.new_zeros(len(rows), *side.shape[1:])
    whole[wanted.to(side.device)] = side
    return whole
