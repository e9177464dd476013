"""A request's way to an edit: encode, trace, transform, apply, check."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import resources

import torch
from tqdm.auto import tqdm

from .data import Encoder, Query, Rows, length_batches
from .edits import Edit, Update, applied
from .joint import FoundUpdates, ask, check_finite, find_joint_updates
from .methods import EditMethod
from .requests import Answers, EditRequest, EditResult
from .stack import EditStack
from .targets import Target
from .tracing import SplitModel, logits_of, record_inputs, trace


# Most tokens in one pass of edits, padding included: what bounds the memory of long requests.
_BATCH_TOKENS = 4096


@torch.no_grad()
def find_updates(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    rows: Rows,
    max_steps: int = 1,
    force: bool = True,
    check: bool = True,
    edits_together: int = 1,
) -> FoundUpdates:
    """
    The updates that make a batch of rows say their targets, each row's on its own, or for a method that joins them,
    those of `edits_together` neighbouring rows for one another (see [`~hf_mend.joint.find_joint_updates`]).

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
        edits_together (`int`, defaults to 1): Rows a group, for a method that joins.

    Raises:
        ValueError: A gradient or an update is not finite.
    """
    if method.joins:
        return find_joint_updates(split, targets, method, [rows], max_steps, force, check, edits_together)[0]
    state = split.run_below(rows.inputs)
    factors, logits = trace(split, targets, rows.inputs, rows.next_tokens, state)
    before = ask(rows, logits)
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

        def say(shares: torch.Tensor, total: dict[str, Update] = total, more: dict[str, Update] = more) -> Answers:
            with applied(targets, _joined(total, _scaled(more, shares))):
                return ask(rows, logits_of(split, rows, state))

        if max_steps == 1:
            shares, after = wanted.float(), say(wanted.float())
        else:
            shares, after = _best_shares(say, after, wanted)
        total = _joined(total, _scaled(more, shares))
        steps = [count + int(share > 0) for count, share in zip(steps, shares.tolist(), strict=True)]
        wanted = (shares > 0) & torch.tensor([not all(right) for right in after.right])
    return FoundUpdates(total, before, after, steps)


def _best_shares(
    say: Callable[[torch.Tensor], Answers], previous: Answers, wanted: torch.Tensor
) -> tuple[torch.Tensor, Answers]:
    """
    How much of a step each row takes, and what the model says then.

    Args:
        say (`Callable`): What the model says for given shares, `(rows,)`.
        previous: What it says without the step.
        wanted (`torch.Tensor` of shape `(rows,)`, bool): Rows that are to take it.
    """
    shares = wanted.float()
    best = say(shares)
    for share in (0.5, 0.25, 0.125):
        open_rows = wanted & torch.tensor([not all(right) for right in best.right])
        if not open_rows.any():
            break
        said = say(torch.where(open_rows, share, shares))
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
        [asked.least[i] for i, asked in enumerate(picks)],
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
    if not method.trains and not method.is_calibrated:
        with stack.disabled():
            observe_ordinary_text(split, targets, method, encoder)
    lengths = [sum(map(len, encoder.tokens(request.query))) for request in requests]
    chunks = list(length_batches(lengths, batch_size, _BATCH_TOKENS))
    results: dict[int, EditResult] = {}
    edits: dict[int, Edit] = {}
    probed = {i: _answers(split, encoder, r.probes) for i, r in enumerate(requests) if r.probes}
    started = time.perf_counter()
    batches = [encoder([requests[i].query for i in chosen]).to(split.device) for chosen in chunks]
    with tqdm(total=len(requests), desc="Editing", disable=len(requests) <= batch_size) as bar:
        if method.joins:
            kept = method.inputs_of([edit.id for edit in stack.edits])
            found = find_joint_updates(
                split, targets, method, batches, max_steps, force, check, kept=kept, progress=bar.update
            )
        else:
            found = []
            for rows in batches:
                found.append(find_updates(split, targets, method, rows, max_steps, force, check))
                bar.update(len(rows))
    seconds = (time.perf_counter() - started) / len(requests)
    for chosen, of_rows in zip(chunks, found, strict=True):
        for row, i in enumerate(chosen):
            results[i], edit = _as_result(requests[i], of_rows, row, encoder, seconds)
            if edit is not None:
                edits[i] = edit
                method.remember(edit.id, {name: x[row][x[row].any(-1)] for name, x in of_rows.inputs.items()})
    earlier = stack.edits
    stack.replace([*earlier, *(edits[i] for i in sorted(edits))])
    try:
        # Each was found without the others, unless they were joined: what does the model say with all of them?
        if check and len(requests) > 1 and not method.joins:
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


def observe_ordinary_text(
    split: SplitModel, targets: Sequence[Target], method: EditMethod, encoder: Encoder, batch_size: int = 16
) -> None:
    """
    Shows a method that needs no training what enters the layers on ordinary text: some 160 packaged lines.

    Args:
        split ([`SplitModel`]): The model.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Its statistics are set then.
        encoder ([`Encoder`]): Tokenises and pads.
        batch_size (`int`, defaults to 16): Lines in one pass.
    """
    text = resources.files("hf_mend").joinpath("templates/ordinary_text.txt").read_text(encoding="utf-8")
    longest = (getattr(split.model.config, "max_position_embeddings", None) or 512) // 2
    pairs = []
    for line in text.splitlines():  # in two halves, of which the decoder of an encoder-decoder model sees the second
        words = line.split(" ")
        halves = Query(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :]))
        prompt, answer = encoder.tokens(halves)
        pairs.append((prompt[:longest], answer[:longest]))
    for start in range(0, len(pairs), batch_size):
        rows = encoder.pad(pairs[start : start + batch_size]).to(split.device)
        method.observe_inputs(record_inputs(split, targets, rows))
    method.finish_observing()


def _as_result(
    request: EditRequest, found: FoundUpdates, row: int, encoder: Encoder, seconds: float
) -> tuple[EditResult, Edit | None]:
    updates = {name: (u[row], v[row]) for name, (u, v) in found.updates.items()}
    edit = _as_edit(request, updates) if found.steps[row] else None
    result = EditResult(
        id=edit.id if edit else None,
        prompt=request.prompt,
        target=request.target,
        before=encoder.decode(found.before.tokens[row]),
        after=None,
        probability_before=math.exp(found.before.log_probability[row]),
        probability_after=None,
        token_success=None,
        steps=found.steps[row],
        seconds=seconds,
        rank=edit.rank if edit else 0,
        update_norms=edit.norms() if edit else {},
    )
    if found.after is not None:
        result.set_after(found.after, row, encoder)
    return result, edit


def _finite_updates(method: EditMethod, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
    check_finite("gradient", factors)
    with torch.no_grad():
        updates = method(factors)
    check_finite("update", updates)
    return updates


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
    return ask(rows, logits_of(split, rows, split.run_below(rows.inputs)))
