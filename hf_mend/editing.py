"""A request's way to an edit: encode, trace, transform, apply, check."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from tqdm.auto import tqdm

from .data import Encoder, Query, Rows, length_batches
from .edits import Edit, EditStack, Update, applied
from .methods import EditMethod
from .requests import Answers, EditRequest, EditResult
from .targets import Target
from .tracing import SplitModel, logits_of, trace


# Most tokens in one pass of edits, padding included: what bounds the memory of long requests.
_BATCH_TOKENS = 4096


@dataclass
class FoundUpdates:
    """
    What a batch of requests comes to.

    Args:
        updates (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes `(rows, rank, d_in)`
            and `(rows, rank, d_out)`.
        before, after: What the model says to the rows without and with them; `after` is `None` without the check.
        steps (`list[int]`): Gradient steps a row took.
    """

    updates: dict[str, Update]
    before: Answers
    after: Answers | None
    steps: list[int]


@torch.no_grad()
def find_updates(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    rows: Rows,
    max_steps: int = 1,
    force: bool = True,
    check: bool = True,
) -> FoundUpdates:
    """
    The updates that make a batch of rows say their targets, each row's on its own.

    A row that does not say its target after a whole step takes the half, quarter or eighth that does best instead, and
    then another step, computed on the model as its first ones left it: an editor has learned its steps on targets of a
    few tokens, and overshoots on others. A step that does not bring a row nearer to its target is not taken.

    Args:
        split ([`SplitModel`]): The model, with whatever edits it carries.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Factors to updates.
        rows ([`Rows`]): Prompts and targets, a row a request.
        max_steps (`int`, defaults to 1): The most steps a row may take; 1 is one whole step, come what may.
        force (`bool`, defaults to `True`): Take a step also where the model says the target already.
        check (`bool`, defaults to `True`): Ask the edited model; without it there is one step.

    Raises:
        ValueError: A gradient or an update is not finite.
    """
    state = split.run_below(rows.inputs)
    factors, logits = trace(split, targets, rows.inputs, rows.next_tokens, state)
    before = _ask(rows, logits)
    wanted = torch.tensor([force or not all(right) for right in before.right])
    if not check:
        updates = _scaled(_finite_updates(method, factors), wanted.float()) if wanted.any() else {}
        return FoundUpdates(updates, before, None, wanted.int().tolist())
    after = before
    steps = [0] * len(rows)
    total: dict[str, Update] = {}
    for step in range(max_steps):
        if not wanted.any():
            break
        if step > 0:
            with applied(targets, total):
                factors, _ = trace(split, targets, rows.inputs, rows.next_tokens, state)
        more = _finite_updates(method, factors)

        def ask(shares: torch.Tensor, total: dict[str, Update] = total, more: dict[str, Update] = more) -> Answers:
            with applied(targets, _joined(total, _scaled(more, shares))):
                return _ask(rows, logits_of(split, rows, state))

        if max_steps == 1:
            shares, after = wanted.float(), ask(wanted.float())
        else:
            shares, after = _best_shares(ask, after, wanted)
        total = _joined(total, _scaled(more, shares))
        steps = [count + int(share > 0) for count, share in zip(steps, shares.tolist(), strict=True)]
        wanted = (shares > 0) & torch.tensor([not all(right) for right in after.right])
    return FoundUpdates(total, before, after, steps)


def _best_shares(
    ask: Callable[[torch.Tensor], Answers], previous: Answers, wanted: torch.Tensor
) -> tuple[torch.Tensor, Answers]:
    """
    How much of a step each row takes, and what the model says then.

    Args:
        ask (`Callable`): What the model says for given shares, `(rows,)`.
        previous: What it says without the step.
        wanted (`torch.Tensor` of shape `(rows,)`, bool): Rows that are to take it.
    """
    shares = wanted.float()
    best = ask(shares)
    for share in (0.5, 0.25, 0.125):
        open_rows = wanted & torch.tensor([not all(right) for right in best.right])
        if not open_rows.any():
            break
        said = ask(torch.where(open_rows, share, shares))
        better = open_rows & torch.tensor([said.rank(i) > best.rank(i) for i in range(len(wanted))])
        shares = torch.where(better, share, shares)
        best = _chosen(better, said, best)
    worse = wanted & torch.tensor(
        [not all(best.right[i]) and best.log_probability[i] <= previous.log_probability[i] for i in range(len(wanted))]
    )
    return torch.where(worse, 0.0, shares), _chosen(worse, previous, best)


def _chosen(first: torch.Tensor, one: Answers, other: Answers) -> Answers:
    """`one`'s rows where `first` is set, else `other`'s."""
    picks = [one if flag else other for flag in first.tolist()]
    return Answers(
        [asked.log_probability[i] for i, asked in enumerate(picks)],
        [asked.tokens[i] for i, asked in enumerate(picks)],
        [asked.right[i] for i, asked in enumerate(picks)],
    )


def make_edits(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    stack: EditStack,
    requests: Sequence[EditRequest],
    max_steps: int = 3,
    batch_size: int = 16,
    force: bool = False,
    check: bool = True,
) -> list[EditResult]:
    """
    Makes the edits of one call and adds them to the stack. All see what the model carried before the call; what the
    results tell of after is of the model with all of them.

    Raises:
        ValueError: A gradient or an update is not finite; the stack is as it was.
    """
    lengths = [sum(map(len, encoder.tokens(request.query))) for request in requests]
    chunks = list(length_batches(lengths, batch_size, _BATCH_TOKENS))
    results: dict[int, EditResult] = {}
    edits: dict[int, Edit] = {}
    probed = {i: _answers(split, encoder, r.probes) for i, r in enumerate(requests) if r.probes}
    with tqdm(total=len(requests), desc="Editing", disable=len(requests) <= batch_size) as bar:
        for chosen in chunks:
            made = _edit_batch(split, targets, method, encoder, [requests[i] for i in chosen], max_steps, force, check)
            for i, (result, edit) in zip(chosen, made, strict=True):
                results[i] = result
                if edit is not None:
                    edits[i] = edit
            bar.update(len(chosen))
    earlier = stack.edits
    stack.replace([*earlier, *(edits[i] for i in sorted(edits))])
    try:
        if check and len(requests) > 1:  # each was found without the others: what does the model say with all of them?
            for chosen in chunks:
                asked = _answers(split, encoder, [requests[i].query for i in chosen])
                for row, i in enumerate(chosen):
                    results[i].set_after(asked, row, encoder)
        for i, before in probed.items():
            results[i].set_probes(requests[i], before, _answers(split, encoder, requests[i].probes), encoder)
    except BaseException:
        stack.replace(earlier)
        raise
    return [results[i] for i in range(len(requests))]


def _edit_batch(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    encoder: Encoder,
    requests: Sequence[EditRequest],
    max_steps: int,
    force: bool,
    check: bool,
) -> list[tuple[EditResult, Edit | None]]:
    started = time.perf_counter()
    rows = encoder([request.query for request in requests]).to(split.device)
    found = find_updates(split, targets, method, rows, max_steps, force, check)
    seconds = (time.perf_counter() - started) / len(requests)
    made = []
    for i, request in enumerate(requests):
        updates = {name: (u[i], v[i]) for name, (u, v) in found.updates.items()}
        edit = _as_edit(request, updates) if found.steps[i] else None
        result = EditResult(
            id=edit.id if edit else None,
            prompt=request.prompt,
            target=request.target,
            before=encoder.decode(found.before.tokens[i]),
            after=None,
            probability_before=math.exp(found.before.log_probability[i]),
            probability_after=None,
            token_success=None,
            steps=found.steps[i],
            seconds=seconds,
            rank=edit.rank if edit else 0,
            update_norms=edit.norms() if edit else {},
        )
        if found.after is not None:
            result.set_after(found.after, i, encoder)
        made.append((result, edit))
    return made


def _finite_updates(method: EditMethod, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
    for name, pair in factors.items():
        _check_finite(name, "gradient", pair)
    with torch.no_grad():
        updates = method(factors)
    for name, pair in updates.items():
        _check_finite(name, "update", pair)
    return updates


def _check_finite(name: str, what: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in pair):
        raise ValueError(
            f"the {what} of layer {name!r} holds NaN or infinity, so nothing was edited; check that the base model's "
            f"own "
            "outputs are finite (a float16 base may overflow: load it in bfloat16)"
        )


def _scaled(updates: dict[str, Update], shares: torch.Tensor) -> dict[str, Update]:
    """A share of each row's update."""
    return {name: (u, v * shares.to(v.device, v.dtype)[:, None, None]) for name, (u, v) in updates.items()}


def _joined(first: dict[str, Update], second: dict[str, Update]) -> dict[str, Update]:
    """The sum of two batches of updates; the first may be empty."""
    if not first:
        return second
    return {
        name: (torch.cat([u, second[name][0]], 1), torch.cat([v, second[name][1]], 1))
        for name, (u, v) in first.items()
    }


def _as_edit(request: EditRequest, updates: dict[str, Update]) -> Edit:
    kept = {}
    for name, (u, v) in updates.items():
        used = (v != 0).any(-1) & (u != 0).any(-1)
        kept[name] = (u[used].contiguous(), v[used].contiguous())
    metadata = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "chat": str(request.chat).lower()}
    return Edit(uuid.uuid4().hex[:12], request.prompt, request.target, kept, metadata)


@torch.no_grad()
def _answers(split: SplitModel, encoder: Encoder, queries: Sequence[Query]) -> Answers:
    """What the model says to each query, under the edits it carries."""
    rows = encoder(queries).to(split.device)
    return _ask(rows, logits_of(split, rows, split.run_below(rows.inputs)))


def _ask(rows: Rows, logits: torch.Tensor) -> Answers:
    labels = rows.next_tokens[rows.positions].to(logits.device)
    said = logits.argmax(-1)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    per_row = rows.positions.sum(-1).tolist()
    right = said == labels
    return Answers(
        [float(part.sum()) for part in log_probabilities.split(per_row)],
        [part.tolist() for part in said.split(per_row)],
        [part.tolist() for part in right.split(per_row)],
    )
