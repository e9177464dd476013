"""How the proposals of several rows become updates: each by itself, or joined in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..edits.low_rank import apart, compacted, together
from ..methods import EditMethod
from .batch_state import BatchState


class Combination:
    """
    Joins what the rows of a group ask for where the method does that, and lets them see it; otherwise each row sees
    its own update already.

    Args:
        batches (`Sequence[BatchState]`): The batches.
        method ([`EditMethod`]): Joins, or does not.
        group_size (`int`, *optional*): How many neighbouring rows of a batch are one group; all rows of all batches
            when missing.
        preserved_keys (`Mapping[str, torch.Tensor]`): Layer name -> inputs at which the output is to stay, as `join`
            takes them.
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
        """Combine what has been asked so far."""
        asking = [batch for batch in self.batches if batch.residuals]
        if not self.method.joins or not asking:
            return
        if not any(batch.keys for batch in asking):
            self._set_keys(asking)
        for batch in asking if self.group_size is not None else self.batches:
            batch.answers = None
        if self.group_size is None:
            self._show_all(asking)
        else:
            self._show_groups(asking, self.group_size)

    def _set_keys(self, asking: Sequence[BatchState]) -> None:
        """Set the keys of each row's inputs; they do not depend on what is asked for there."""
        if self.group_size is not None:
            for batch in asking:
                pairs = {name: (x, batch.residuals[name]) for name, x in batch.inputs.items()}
                groups = self.method.join(together(pairs, self.group_size), self.preserved_keys)
                batch.keys = {name: u for name, (u, _) in apart(groups, self.group_size, len(batch.rows)).items()}
            return
        for name in asking[0].inputs:
            present = [batch.inputs[name].any(-1) for batch in asking]
            x, residuals = (
                torch.cat([values[mask] for values, mask in zip(sides, present, strict=True)])
                for sides in ([batch.inputs[name] for batch in asking], [batch.residuals[name] for batch in asking])
            )  # (tokens, d_in), (tokens, d_out)
            keys = self.method.join({name: (x[None], residuals[None])}, self.preserved_keys)[name][0][0]
            for batch, mask, own in zip(asking, present, keys.split([int(m.sum()) for m in present]), strict=True):
                batch.keys[name] = torch.zeros_like(batch.inputs[name])
                batch.keys[name][mask] = own

    def _show_all(self, asking: Sequence[BatchState]) -> None:
        """Let all rows of all batches see one update."""
        for name in asking[0].residuals:
            pairs = [(batch.keys[name].flatten(0, 1), batch.residuals[name].flatten(0, 1)) for batch in asking]
            shared = compacted((torch.cat([u for u, _ in pairs]), torch.cat([v for _, v in pairs])))
            for batch in self.batches:
                batch.seen[name] = shared

    def _show_groups(self, asking: Sequence[BatchState], size: int) -> None:
        """Let each row see its group's update."""
        for batch in asking:
            groups = together(batch.updates, size)
            owner = torch.arange(len(batch.rows)) // size
            batch.seen = {name: (u[owner.to(u.device)], v[owner.to(v.device)]) for name, (u, v) in groups.items()}
