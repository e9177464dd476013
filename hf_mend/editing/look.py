"""The model as a method sees it that searches for its update by repeated passes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..bases.gradients import Factors, gradient_factors, kl_divergence, row_means
from ..bases.split import HiddenState, logits_of
from ..data.encoding import EncodedBatch
from ..edits.low_rank import Update
from ..methods import Seen
from .batch_state import check_finite
from .context import EditingContext
from .scoring import score_targets


class BatchLook:
    """
    Run a batch of requests under candidate updates. The blocks below the edited ones run once.

    Args:
        context ([`EditingContext`]): The model, with its active edits, and its edited layers.
        rows ([`EncodedBatch`]): Prompts and targets, a row a request.
        hidden ([`HiddenState`]): Their output of `run_below`.
        wanted (`torch.Tensor`): The numbers of the rows to edit.
        beside (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Updates that the rows are under already, one for
            all or one for each.
    """

    def __init__(
        self,
        context: EditingContext,
        rows: EncodedBatch,
        hidden: HiddenState,
        wanted: torch.Tensor,
        beside: Mapping[str, Update] = MappingProxyType({}),
    ):
        self.context, self.rows, self.hidden, self.wanted, self.beside = context, rows, hidden, wanted, beside

    def __call__(self, updates: Mapping[str, Update], requests: torch.Tensor) -> Seen:
        rows = self.rows[requests]
        beside = {name: _of_requests(pair, requests) for name, pair in self.beside.items()}
        factors, logits = self.context.trace(rows, self.hidden.rows(requests), (beside, updates))
        check_finite("gradient", factors)
        answers = score_targets(rows, logits)
        return Seen(answers.all_correct, torch.tensor(answers.min_log_probability, dtype=torch.float32), factors)

    def places(self, layer: str) -> torch.Tensor:
        side = next(target.side for target in self.context.targets if target.name == layer)
        rows = (self.rows if self.hidden.answers is None else self.hidden.answers[0])[self.wanted]
        last = rows.positions.int().argmax(-1)  # the position that predicts the answer's first token
        if "decoder_input_ids" in rows.inputs:
            if side != "encoder":
                return last.cpu()
            width = rows.inputs["attention_mask"].shape[1]
            last = (rows.inputs["attention_mask"] * torch.arange(width, device=rows.positions.device)).argmax(-1)
        if rows.subjects is None or self.context.scoped:  # with a scope, an edit does not act at its subject
            return last.cpu()
        return torch.where(rows.subjects >= 0, rows.subjects, last).cpu()

    def drift(self, updates: Mapping[str, Update], texts: EncodedBatch) -> Factors:
        split, targets = self.context.split, self.context.targets
        requests = len(next(iter(updates.values()))[0])
        hidden = split.state_of(texts)
        base = logits_of(split, texts, hidden)  # (positions, vocab)
        every = torch.arange(len(texts)).repeat(requests)
        rows = texts[every]

        def divergence(logits: torch.Tensor) -> torch.Tensor:
            per_position = kl_divergence(logits, base.to(logits.device).repeat(requests, 1))
            return row_means(per_position, rows).sum() / len(texts)

        with self.context.applied(rows, updates):
            inputs = split.inputs_of(rows)
            factors, _ = gradient_factors(split, targets, inputs, rows.places, divergence, hidden.rows(every))
        check_finite("gradient", factors)
        return Factors(
            {
                name: (x.reshape(requests, -1, x.shape[-1]), delta.reshape(requests, -1, delta.shape[-1]))
                for name, (x, delta) in factors.items()
            }
        )


def _of_requests(update: Update, requests: torch.Tensor) -> Update:
    """Return the update of each request, or the one of all."""
    u, v = update
    return update if u.dim() == 2 else (u[requests.to(u.device)], v[requests.to(v.device)])
