"""Runs the search of a method that looks for its update by repeated passes of the edited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .data import Rows
from .edits import Update, applied
from .joint import FoundUpdates, ask, check_finite
from .losses import kl_divergence, row_means
from .methods import IterativeMethod, Seen
from .requests import Answers
from .targets import Target
from .tracing import Factors, HiddenState, SplitModel, gradient_factors, logits_of, trace


class BatchLook:
    """
    Looks at a batch of requests under candidate updates; what lies below the edited blocks runs once.

    Args:
        split ([`SplitModel`]): The model, with whatever edits it carries.
        targets (`Sequence[Target]`): The edited layers.
        rows ([`Rows`]): Prompts and targets, a row a request.
        state ([`HiddenState`]): What `run_below` gave for them.
        wanted (`torch.Tensor`): The numbers of the rows that are to be edited.
    """

    def __init__(
        self, split: SplitModel, targets: Sequence[Target], rows: Rows, state: HiddenState, wanted: torch.Tensor
    ):
        self.split, self.targets, self.rows, self.state, self.wanted = split, targets, rows, state, wanted

    def __call__(self, updates: Mapping[str, Update], requests: torch.Tensor) -> Seen:
        rows, state = self.rows[requests], self.state.rows(requests)
        with applied(self.targets, updates):
            factors, logits = trace(self.split, self.targets, rows.inputs, rows.next_tokens, state)
        check_finite("gradient", factors)
        said = ask(rows, logits)
        return Seen(torch.tensor([all(right) for right in said.right]), torch.tensor(said.least), factors)

    def places(self, layer: str) -> torch.Tensor:
        kind = next(target.stack for target in self.targets if target.name == layer)
        rows = self.rows[self.wanted]
        if "decoder_input_ids" not in rows.inputs:
            last = rows.positions.int().argmax(-1)  # the position that predicts the answer's first token
        elif kind == "encoder":
            width = rows.inputs["attention_mask"].shape[1]
            last = (rows.inputs["attention_mask"] * torch.arange(width, device=rows.positions.device)).argmax(-1)
        else:
            return torch.zeros(len(rows), dtype=torch.long)
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
        split, targets, method, rows: As for [`~hf_mend.editing.find_updates`].
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


def _in_place(side: torch.Tensor, wanted: torch.Tensor, rows: Rows) -> torch.Tensor:
    """One side of the wanted rows' updates among all rows; the others' is zero."""
    if len(wanted) == len(rows):
        return side
    whole = side.new_zeros(len(rows), *side.shape[1:])
    whole[wanted.to(side.device)] = side
    return whole
