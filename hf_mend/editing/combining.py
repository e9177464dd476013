"""The combination of several rows' proposals into updates: each by itself, or joined in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..edits.low_rank import apart, compacted, together
from ..methods import EditMethod
from .batch_state import BatchState


class Combination:
    """
    Join the residuals of a group's rows where the method joins, and apply the result to them. Otherwise each row is
    under its own update already.

    Args:
        batches (`Sequence[BatchState]`): The batches.
        method ([`EditMethod`]): The method.
        group_size (`int`, *optional*): The number of neighbouring rows of a batch in one group; all rows of all
            batches when missing.
        preserved_keys (`Mapping[str, torch.Tensor]`): The argument of that name of the method's `join`.
    """

    def __init__(
        self,
        batches: Sequence[BatchState],
        method: EditMethod,
        group_size: int | None,
        preserved_keys: Mapping[str, torch.Tensor],
    ):
        self.batches, self.method, self.group_size = batches, method, group_size
        self.preserved_keys = preserved_keys

    def __call__(self) -> None:
        """Combine the residuals proposed so far."""
        started = [batch for batch in self.batches if batch.residuals]
        if not self.method.joins or not started:
            return
        if not any(batch.keys for batch in started):
            self._set_keys(started)
        for batch in started if self.group_size is not None else self.batches:
            batch.forget_answers(self.group_size != 1)  # a group's rows change one another's answers
        if self.group_size is None:
            self._show_all(started)
        else:
            self._show_groups(started, self.group_size)

    def _set_keys(self, started: Sequence[BatchState]) -> None:
        """Set the keys of each row's inputs. They do not depend on the residuals there."""
        if self.group_size is not None:
            for batch in started:
                pairs = {name: (x, batch.residuals[name]) for name, x in batch.inputs.items()}
                groups = self.method.join(together(pairs, self.group_size), self.preserved_keys)
                batch.keys = {name: u for name, (u, _) in apart(groups, self.group_size, batch.rows.facts).items()}
            return
        for name in started[0].inputs:
            present = [batch.inputs[name].any(-1) for batch in started]
            x, residuals = (
                torch.cat([values[mask] for values, mask in zip(sides, present, strict=True)])
                for sides in ([batch.inputs[name] for batch in started], [batch.residuals[name] for batch in started])
            )  # (tokens, d_in), (tokens, d_out)
            keys = self.method.join({name: (x[None], residuals[None])}, self.preserved_keys)[name][0][0]
            for batch, mask, own in zip(started, present, keys.split([int(m.sum()) for m in present]), strict=True):
                batch.keys[name] = torch.zeros_like(batch.inputs[name])
                batch.keys[name][mask] = own

    def _show_all(self, started: Sequence[BatchState]) -> None:
        """Put all rows of all batches under one update."""
        for name in started[0].residuals:
            pairs = [(batch.keys[name].flatten(0, 1), batch.residuals[name].flatten(0, 1)) for batch in started]
            shared = compacted((torch.cat([u for u, _ in pairs]), torch.cat([v for _, v in pairs])))
            for batch in self.batches:
                batch.seen[name] = shared

    def _show_groups(self, started: Sequence[BatchState], size: int) -> None:
        """Put each row under its group's update."""
        for batch in started:
            groups = together(batch.updates, size)
            owner = torch.arange(batch.rows.facts) // size
            batch.seen = {name: (u[owner.to(u.device)], v[owner.to(v.device)]) for name, (u, v) in groups.items()}
