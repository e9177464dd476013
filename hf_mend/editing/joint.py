"""Edits that one ridge regression merges: shifts are asked for, found together, and asked for again where needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from ..bases.gradients import Factors, trace
from ..bases.split import HiddenState, SplitModel, logits_of
from ..bases.targets import Target
from ..data.encoding import Rows
from ..edits.hook import applied
from ..edits.low_rank import Update, apart, compacted, together
from ..methods import EditMethod
from .requests import Answers


# A target counts as said for good when each of its tokens has this negative log-likelihood or less, in nats.
_SURE = 0.1
# How often a step that does not lead nearer to its target is halved.
_HALVINGS = 3


@dataclass
class FoundUpdates:
    """
    What a batch of requests comes to.

    Args:
        updates (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes `(rows, rank, d_in)`
            and `(rows, rank, d_out)`.
        before, after: What the model says to the rows without and with them; `after` is `None` without the check.
        steps (`list[int]`): Gradient steps a row took.
        inputs (`dict[str, torch.Tensor]`): Layer name -> `(rows, rank, d_in)`, the layers' inputs at the rows' tokens,
            from a method that joins.
    """

    updates: dict[str, Update]
    before: Answers
    after: Answers | None
    steps: list[int]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Chunk:
    """Rows that run in one pass, what they ask for, and the update that they see so far."""

    rows: Rows
    state: HiddenState
    before: Answers
    wanted: torch.Tensor  # (rows,), bool: rows that ask for more
    steps: list[int]
    level: torch.Tensor = field(init=False)  # (rows,): log-probability of the target at `best`
    tried: torch.Tensor = field(init=False)  # (rows,): how often the last step was tried and not found to lead nearer
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # (rows, seq, d_in), of the first step
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)  # (rows, seq, d_out), summed over the steps
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # the same without a step that is being tried
    keys: dict[str, torch.Tensor] = field(default_factory=dict)  # (rows, seq, d_in)
    seen: dict[str, Update] = field(default_factory=dict)  # as `applied` takes it
    # What the row's group had asked for when it said most, how much that was (-1 before any step), and the steps until
    # then.
    top: dict[str, torch.Tensor] = field(default_factory=dict)
    top_said: torch.Tensor = field(default_factory=lambda: torch.tensor(-1.0))
    top_steps: torch.Tensor = field(default_factory=lambda: torch.tensor(0))

    def __post_init__(self) -> None:
        self.level = torch.tensor(self.before.log_probability)
        self.tried = torch.zeros(len(self.rows))


@torch.no_grad()
def find_joint_updates(
    split: SplitModel,
    targets: Sequence[Target],
    method: EditMethod,
    batches: Sequence[Rows],
    max_steps: int = 1,
    force: bool = True,
    check: bool = True,
    edits_together: int | None = None,
    kept: Mapping[str, torch.Tensor] = MappingProxyType({}),
    progress: Callable[[int], object] | None = None,
) -> list[FoundUpdates]:
    """
    The updates that make all rows say their targets, for a method that [`~hf_mend.methods.EditMethod.join`]s them.

    Each step asks, on the model as the steps before left it, for shifts of the layers' outputs at each row's own
    inputs, and finds the update that does best for all that was asked so far. Rows that say their targets for sure ask
    for no more. A method that `sizes_steps` gets the step that would bring a row's loss to zero were the loss linear
    (Polyak 1987, "Introduction to Optimization"), and in the end all shifts times the configuration's `margin`, so
    that other words lead to the target too.

    Args:
        split ([`SplitModel`]): The model, with whatever edits it carries.
        targets (`Sequence[Target]`): The edited layers.
        method ([`EditMethod`]): Factors to shifts, shifts to updates.
        batches (`Sequence[Rows]`): Prompts and targets, a row a request, in batches that run in one pass.
        max_steps (`int`, defaults to 1): The most steps a row may take.
        force (`bool`, defaults to `True`): Take a step also where the model says the target already.
        check (`bool`, defaults to `True`): Ask the edited model; without it there is one step.
        edits_together (`int`, *optional*): How many neighbouring rows of a batch are one group; all rows of all
            batches when missing.
        kept (`Mapping[str, torch.Tensor]`): Layer name -> inputs at which the output is to stay, as `join`
            takes them.
        progress (`Callable`, *optional*): Told of the rows whose first step's gradient is there.

    Raises:
        ValueError: A gradient or an update is not finite.
    """
    chunks: list[Chunk] = []
    for step in range(max_steps if check else 1):
        found = []
        for i, rows in enumerate(batches):
            state = chunks[i].state if step else split.run_below(rows.inputs)
            with applied(targets, chunks[i].seen if step else {}):
                factors, logits = trace(split, targets, rows.inputs, rows.next_tokens, state)
            check_finite("gradient", factors)
            said = ask(rows, logits)
            if step == 0:
                wanted = torch.tensor([force or not all(right) for right in said.right])
                chunks.append(Chunk(rows, state, said, wanted, [0] * len(rows)))
                method.observe_edits(_of_rows(factors, wanted))
                if progress is not None:
                    progress(len(rows))
            found.append((factors, said))
        if step:
            if not method.sizes_steps:
                _keep_top(chunks, [said for _, said in found], edits_together)
            for chunk, (_, said) in zip(chunks, found, strict=True):
                _judge(chunk, said, method)
        if not any(chunk.wanted.any() or chunk.tried.any() for chunk in chunks):
            break
        for chunk, (factors, said) in zip(chunks, found, strict=True):
            _ask_for_more(chunk, method, factors, said)
        if step == 0:
            if not any(chunk.shifts for chunk in chunks):
                break
            set_keys(chunks, method, edits_together, kept)
        show(chunks, edits_together)
    if method.sizes_steps:
        for chunk in chunks:
            chunk.shifts = {name: shift * method.config.margin for name, shift in chunk.shifts.items()}
        show(chunks, edits_together)
    after = [look(split, targets, chunk) if check else None for chunk in chunks]
    if check and max_steps > 1 and any([_step_back(*pair) for pair in zip(chunks, after, strict=True)]):
        show(chunks, edits_together)
        after = [look(split, targets, chunk) for chunk in chunks]
    if check and max_steps > 1 and not method.sizes_steps and _back_to_top(chunks, after, edits_together):
        show(chunks, edits_together)
        after = [look(split, targets, chunk) for chunk in chunks]
    return [
        FoundUpdates(updates_of(chunk), chunk.before, said, chunk.steps, chunk.inputs)
        for chunk, said in zip(chunks, after, strict=True)
    ]


def ask(rows: Rows, logits: torch.Tensor) -> Answers:
    """What logits at the rows' positions say: `(positions, vocab)`."""
    labels = rows.next_tokens[rows.positions].to(logits.device)
    said = logits.argmax(-1)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    per_row = rows.positions.sum(-1).tolist()
    right = said == labels
    return Answers(
        [float(part.sum()) for part in log_probabilities.split(per_row)],
        [part.tolist() for part in said.split(per_row)],
        [part.tolist() for part in right.split(per_row)],
        [float(part.min()) for part in log_probabilities.split(per_row)],
    )


def check_finite(what: str, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """
    Raises:
        ValueError: A value is not finite.
    """
    for name, pair in pairs.items():
        if not all(torch.isfinite(tensor).all() for tensor in pair):
            raise ValueError(
                f"the {what} of layer {name!r} holds NaN or infinity, so nothing was edited; check that the base "
                "model's own outputs are finite (a float16 base may overflow: load it in bfloat16)"
            )


def _of_rows(factors: Factors, chosen: torch.Tensor) -> Factors:
    return {name: (x[chosen.to(x.device)], delta[chosen.to(x.device)]) for name, (x, delta) in factors.items()}


def _unsettled(said: Answers, method: EditMethod) -> torch.Tensor:
    """Rows that do not say their targets yet, or not for sure."""
    if method.sizes_steps:
        return torch.tensor([least < -_SURE for least in said.least])
    return torch.tensor([not all(right) for right in said.right])


def _judge(chunk: Chunk, said: Answers, method: EditMethod) -> None:
    """
    Keeps the steps that led nearer to their targets, tries others again at half their length, up to `_HALVINGS` times,
    and notes which rows are to ask for more.
    """
    level = torch.tensor(said.log_probability)
    worse = (chunk.tried > 0) & ~(level > chunk.level)
    again = worse & (chunk.tried <= _HALVINGS)
    for name, shift in chunk.shifts.items():
        best = torch.where(_wide(worse, shift), chunk.best[name], shift)
        chunk.best[name] = best
        chunk.shifts[name] = torch.where(_wide(again, shift), (best + shift) / 2, best)
    chunk.level = torch.where(worse, chunk.level, level)
    chunk.tried = torch.where(again, chunk.tried + 1, 0.0)
    chunk.wanted = ~worse & _unsettled(said, method) & torch.tensor(chunk.steps).bool()


def _step_back(chunk: Chunk, said: Answers | None) -> bool:
    """Rows that are less sure of their targets in the end go back to where they were best; whether there are any."""
    assert said is not None
    unsure = torch.tensor([least < -_SURE for least in said.least]) & torch.tensor(chunk.steps).bool()
    missed = unsure & (torch.tensor(said.log_probability) < chunk.level)
    chunk.shifts = {
        name: torch.where(_wide(missed, shift), chunk.best[name], shift) for name, shift in chunk.shifts.items()
    }
    return bool(missed.any())


def _said_by_group(saids: Sequence[Answers | None], edits_together: int | None) -> list[torch.Tensor]:
    """Each row's group's number of targets said, counted by their probabilities."""
    said = [torch.tensor(answers.log_probability).exp() for answers in saids if answers is not None]
    if edits_together is None:
        return [sum(values.sum() for values in said) + torch.zeros_like(values) for values in said]
    groups = [torch.arange(len(values)) // edits_together for values in said]
    return [
        torch.zeros(int(group[-1]) + 1).index_add(0, group, values)[group]
        for group, values in zip(groups, said, strict=True)
    ]


def _keep_top(chunks: Sequence[Chunk], saids: Sequence[Answers], edits_together: int | None) -> None:
    """
    Notes what each group asks for where it says more than ever before. Rows are judged one by one, each among the
    others' shifts of that step; what is best for each may be bad for all.
    """
    for chunk, said in zip(chunks, _said_by_group(saids, edits_together), strict=True):
        better = said > chunk.top_said
        for name, shift in chunk.shifts.items():
            chunk.top[name] = torch.where(_wide(better, shift), shift, chunk.top.get(name, torch.zeros_like(shift)))
        chunk.top_said = torch.where(better, said, chunk.top_said)
        chunk.top_steps = torch.where(better, torch.tensor(chunk.steps), chunk.top_steps)


def _back_to_top(chunks: Sequence[Chunk], after: Sequence[Answers | None], edits_together: int | None) -> bool:
    """Groups that said more at an earlier step go back to it; whether there are any."""
    found = False
    for chunk, said in zip(chunks, _said_by_group(after, edits_together), strict=True):
        worse = said < chunk.top_said
        for name, shift in chunk.shifts.items():
            if name in chunk.top:
                chunk.shifts[name] = torch.where(_wide(worse, shift), chunk.top[name], shift)
        chunk.steps = torch.where(worse, chunk.top_steps, torch.tensor(chunk.steps)).tolist()
        found = found or bool(worse.any())
    return found


def _wide(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value a row, beside `(rows, seq, width)`."""
    return values.to(like.device)[:, None, None]


def _ask_for_more(chunk: Chunk, method: EditMethod, factors: Factors, said: Answers) -> None:
    """Adds the shifts that the chunk's wanted rows ask for."""
    if not chunk.wanted.any():
        return
    more = method(factors)
    shares = chunk.wanted.float()
    if method.sizes_steps:
        # How much a row's loss would fall with its whole shift, were it linear.
        falls = -torch.stack([(factors[name][1].to(d) * d).sum((1, 2)).cpu() for name, (_, d) in more.items()]).sum(0)
        shares = torch.where(chunk.wanted & (falls > 0), -torch.tensor(said.log_probability) / falls, 0.0)
    moves = shares > 0
    chunk.tried = torch.where(moves, 1.0, chunk.tried)
    for name, (x, shift) in more.items():
        shift = torch.where(_wide(moves, shift), shift * _wide(shares.to(shift.dtype), shift), 0.0)
        chunk.inputs.setdefault(name, x)
        chunk.best.setdefault(name, torch.zeros_like(shift))
        chunk.shifts[name] = chunk.shifts[name] + shift if name in chunk.shifts else shift
    check_finite("update", {name: (chunk.inputs[name], shift) for name, shift in chunk.shifts.items()})
    chunk.steps = [count + int(share > 0) for count, share in zip(chunk.steps, shares.tolist(), strict=True)]


def set_keys(
    chunks: Sequence[Chunk], method: EditMethod, edits_together: int | None, kept: Mapping[str, torch.Tensor]
) -> None:
    """The keys of each row's inputs; they do not depend on what is asked for there."""
    asking = [chunk for chunk in chunks if chunk.shifts]
    if edits_together is not None:
        for chunk in asking:
            pairs = {name: (x, chunk.shifts[name]) for name, x in chunk.inputs.items()}
            groups = method.join(together(pairs, edits_together), kept)
            chunk.keys = {name: u for name, (u, _) in apart(groups, edits_together, len(chunk.rows)).items()}
        return
    for name in asking[0].inputs:
        present = [chunk.inputs[name].any(-1) for chunk in asking]
        x, shifts = (
            torch.cat([values[mask] for values, mask in zip(sides, present, strict=True)])
            for sides in ([chunk.inputs[name] for chunk in asking], [chunk.shifts[name] for chunk in asking])
        )  # (tokens, d_in), (tokens, d_out)
        keys = method.join({name: (x[None], shifts[None])}, kept)[name][0][0]
        for chunk, mask, own in zip(asking, present, keys.split([int(m.sum()) for m in present]), strict=True):
            chunk.keys[name] = torch.zeros_like(chunk.inputs[name])
            chunk.keys[name][mask] = own


def show(chunks: Sequence[Chunk], edits_together: int | None) -> None:
    """Lets each chunk's rows see what their group has asked for so far."""
    if edits_together is not None:
        for chunk in chunks:
            groups = together(updates_of(chunk), edits_together)
            owner = torch.arange(len(chunk.rows)) // edits_together
            chunk.seen = {name: (u[owner.to(u.device)], v[owner.to(v.device)]) for name, (u, v) in groups.items()}
        return
    asking = [chunk for chunk in chunks if chunk.shifts]
    for name in asking[0].shifts if asking else ():
        pairs = [(chunk.keys[name].flatten(0, 1), chunk.shifts[name].flatten(0, 1)) for chunk in asking]
        shared = compacted((torch.cat([u for u, _ in pairs]), torch.cat([v for _, v in pairs])))
        for chunk in chunks:
            chunk.seen[name] = shared


def updates_of(chunk: Chunk) -> dict[str, Update]:
    return {name: (chunk.keys[name], shift) for name, shift in chunk.shifts.items()}


def look(split: SplitModel, targets: Sequence[Target], chunk: Chunk) -> Answers:
    """What the model says now."""
    with applied(targets, chunk.seen):
        return ask(chunk.rows, logits_of(split, chunk.rows, chunk.state))
