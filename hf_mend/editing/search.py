"""The search for the updates of a batch of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..bases.gradients import trace
from ..bases.split import SplitModel, logits_of
from ..bases.targets import Target
from ..data.encoding import Rows
from ..edits.hook import applied
from ..edits.low_rank import Update
from ..methods import EditMethod, IterativeMethod
from .joint import FoundUpdates, ask, check_finite, find_joint_updates
from .requests import Answers
from .searching import search_joint_updates, search_updates


@torch.no_grad()
def find_updates(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    rows: Rows,
    max_steps: int | None = None,
    force: bool = True,
    check: bool = True,
    edits_together: int = 1,
    carried: Mapping[str, Update] | None = None,
) -> FoundUpdates:
    """
    The updates that make a batch of rows say their targets, each row's on its own, or for a method that joins them,
    those of `edits_together` neighbouring rows for one another (see [`~hf_mend.editing.joint.find_joint_updates`]).

    A row that does not say its target after a whole step takes the half, quarter or eighth that does best instead, and
    then another step, computed on the model as its first ones left it: an editor has learned its steps on targets of a
    few tokens, and overshoots on others. A step that does not bring a row nearer to its target is not taken.

    Args:
        split ([`SplitModel`]): The model, with whatever edits it carries.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Factors to updates.
        rows ([`Rows`]): Prompts and targets, a row a request.
        max_steps (`int`, *optional*): The most steps a row may take; 1 is one whole step, come what may. When missing
            it is 1, and for an [`~hf_mend.methods.IterativeMethod`] what its configuration says.
        force (`bool`, defaults to `True`): Take a step also where the model says the target already.
        check (`bool`, defaults to `True`): Ask the edited model; without it there is one step.
        edits_together (`int`, defaults to 1): Rows a group, for a method that joins.
        carried (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`, *optional*): What acts beside an update, from the
            first step on; the method's own when missing. Give none where the model has it already.

    Raises:
        ValueError: A gradient or an update is not finite.
    """
    if max_steps is None:
        max_steps = method.max_steps if isinstance(method, IterativeMethod) else 1
    if method.joins:
        return _joint_finder(method)(split, targets, method, [rows], max_steps, force, check, edits_together)[0]
    if isinstance(method, IterativeMethod):
        return search_updates(split, targets, method, rows, max_steps, force, check)
    carried = method.carried() if carried is None else carried
    state = split.run_below(rows.inputs)
    with applied(targets, carried):
        factors, logits = trace(split, targets, rows.inputs, rows.next_tokens, state)
    before = ask(rows, logits_of(split, rows, state) if carried else logits)
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
            with applied(targets, carried, total):
                factors, _ = trace(split, targets, rows.inputs, rows.next_tokens, state)
        more = _finite_updates(method, factors)

        def say(shares: torch.Tensor, total: dict[str, Update] = total, more: dict[str, Update] = more) -> Answers:
            with applied(targets, carried, _joined(total, _scaled(more, shares))):
                return ask(rows, logits_of(split, rows, state))

        if max_steps == 1:
            shares, after = wanted.float(), say(wanted.float())
        else:
            shares, after = _best_shares(say, after, wanted)
        total = _joined(total, _scaled(more, shares))
        steps = [count + int(share > 0) for count, share in zip(steps, shares.tolist(), strict=True)]
        wanted = (shares > 0) & torch.tensor([not all(right) for right in after.right])
    return FoundUpdates(total, before, after, steps)


def _joint_finder(method: EditMethod) -> Callable[..., list[FoundUpdates]]:
    """How a method that joins finds the updates of batches of rows."""
    return search_joint_updates if isinstance(method, IterativeMethod) else find_joint_updates


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
