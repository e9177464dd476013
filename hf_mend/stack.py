"""The edits that a model carries, summed a layer and applied beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import merge_adapters_
from .collection import check_apart, check_known
from .edits import Edit, Update, active_edits, check_supported, dense, each_support_once, side_path
from .targets import Target, add_to_weight_, check_own_weight, named_layers, writable_weight


# A dense sum is copied after this many edits, and after its square, so that taking back one of the last edits does not
# sum up all the others again.
_COPY_EVERY = 32


def dense_is_cheaper(rank: int, d_in: int, d_out: int) -> bool:
    """Whether a matrix costs less than two thin ones of this rank, in memory as in multiplications a token."""
    return rank * (d_in + d_out) > d_in * d_out


class LayerSum:
    """
    The sum of a layer's edits, in the form that is cheaper to apply.

    Two stacked thin matrices of `rank * (d_in + d_out)` values, until a dense one has fewer: then the matrix, `d_in *
    d_out` values, and up to two copies of it in CPU memory as of earlier edits. Both grow with each edit and are never
    made anew for one.

    The values depend on the list of edits alone, whatever came and went before: edits are added one by one in their
    order and none is ever subtracted, so that an undo is exact to the bit. It goes back to a copy and adds what
    followed: of `n` edits, an undo of the last costs up to 32 additions, of the oldest `n`. All of this happens when
    the sum is next needed, on the device where it is needed.

    Args:
        d_in (`int`): Width of the layer's input.
        d_out (`int`): Width of its output.
    """

    def __init__(self, d_in: int, d_out: int):
        self.d_in, self.d_out = d_in, d_out
        self.edits: list[Update] = []
        self._dtype = torch.float32
        self._rank = 0
        self._summed = 0  # how many of the edits the tensors hold
        self._thin: Update | None = None  # with room to grow: (capacity, d_in), (capacity, d_out)
        self._used = 0  # rows of them
        self._matrix: torch.Tensor | None = None  # (d_out, d_in)
        self._copies: dict[int, tuple[int, torch.Tensor]] = {}  # distance -> after how many edits, the matrix then

    @property
    def is_dense(self) -> bool:
        """Whether the sum is a matrix, not two stacked thin ones."""
        return dense_is_cheaper(self._rank, self.d_in, self.d_out)

    @property
    def nbytes(self) -> int:
        """Bytes that the sum takes beside the edits' own factors."""
        tensors = [*(self._thin or ()), *(copy for _, copy in self._copies.values())]
        return sum(t.nbytes for t in tensors) + (0 if self._matrix is None else self._matrix.nbytes)

    def replace(self, edits: Sequence[Update]) -> None:
        """Makes these the edits to sum up, `(u, v)` of shapes `(rank, d_in)` and `(rank, d_out)`."""
        edits = [pair for pair in edits if len(pair[0])]
        common = 0
        for mine, theirs in zip(self.edits[: self._summed], edits, strict=False):
            if mine[0] is not theirs[0] or mine[1] is not theirs[1]:
                break
            common += 1
        was_dense = self.is_dense
        self.edits, self._rank = edits, sum(len(u) for u, _ in edits)
        self._dtype = torch.float64 if any(u.dtype == torch.float64 for u, _ in edits) else torch.float32
        if self.is_dense != was_dense:
            self._forget()
        elif common < self._summed:
            self._rewind(common)

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        """
        What the edits add to the layer's output.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): The layer's input.
            device (`torch.device`): Where the layer runs.

        Returns:
            `torch.Tensor` of shape `(..., d_out)`, in float32, or float64 if an edit is.
        """
        self._sum_up(device)
        x = x.to(device)
        if self._matrix is not None:
            return nn.functional.linear(x.to(self._matrix.dtype), self._matrix)
        assert self._thin is not None
        u, v = self._thin
        return side_path(x, (u[: self._used], v[: self._used]))

    def matrix(self, device: torch.device) -> torch.Tensor:
        """The sum as a matrix `(d_out, d_in)`."""
        self._sum_up(device)
        if self._matrix is not None:
            return self._matrix
        assert self._thin is not None
        u, v = self._thin
        return dense((u[: self._used], v[: self._used]))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _sum_up(self, device: torch.device) -> None:
        """Brings the tensors up to date."""
        held = self._matrix if self._thin is None else self._thin[0]
        if held is not None and (held.device != device or held.dtype != self._dtype):
            self._forget()
        if self._summed == len(self.edits):
            return
        add = self._add_dense if self.is_dense else self._add_thin
        try:
            for u, v in self.edits[self._summed :]:
                add(u.to(device, self._dtype), v.to(device, self._dtype))
                self._summed += 1
        except BaseException:  # an interrupt must not leave an edit added and not counted
            self._forget()
            raise

    def _add_thin(self, u: torch.Tensor, v: torch.Tensor) -> None:
        rows = self._used + len(u)
        if self._thin is None or rows > len(self._thin[0]):
            # Never past the rank where a matrix takes over.
            capacity = max(rows, min(2 * rows, self.d_in * self.d_out // (self.d_in + self.d_out)))
            grown = u.new_empty(capacity, self.d_in), v.new_empty(capacity, self.d_out)
            if self._thin is not None:
                for new, old in zip(grown, self._thin, strict=True):
                    new[: self._used] = old[: self._used]
            self._thin = grown
        for side, rows_of_edit in zip(self._thin, (u, v), strict=True):
            side[self._used : rows] = rows_of_edit
        self._used = rows

    def _add_dense(self, u: torch.Tensor, v: torch.Tensor) -> None:
        if self._matrix is None:
            self._matrix = u.new_zeros(self.d_out, self.d_in)
        for distance in (_COPY_EVERY, _COPY_EVERY**2):
            if self._summed and self._summed % distance == 0:
                old = self._copies.get(distance)
                copy = torch.empty_like(self._matrix, device="cpu") if old is None else old[1]
                self._copies[distance] = (self._summed, copy.copy_(self._matrix))
        self._matrix.addmm_(v.T, u)  # in place, which autocast leaves alone

    def _rewind(self, count: int) -> None:
        """Back to what the tensors were after the first `count` edits, or fewer."""
        if self._matrix is None:
            self._summed, self._used = count, sum(len(u) for u, _ in self.edits[:count])
            return
        self._copies = {distance: kept for distance, kept in self._copies.items() if kept[0] <= count}
        if self._copies:
            self._summed, copy = max(self._copies.values(), key=lambda kept: kept[0])
            self._matrix.copy_(copy)
        else:
            self._summed = 0
            self._matrix.zero_()

    def _forget(self) -> None:
        self._summed = self._used = 0
        self._thin = self._matrix = None
        self._copies = {}


@dataclass(eq=False)
class AddsToOutput:
    """
    A forward hook that adds a layer's sum to its output. No closure: a deep copy of the model takes a sum of its own
    along, and a pickle the one it was saved with.

    Args:
        layer_sum ([`LayerSum`]): What to add.
        edit_ids (`Sequence[str]`): The edits in it.
    """

    layer_sum: LayerSum
    edit_ids: Sequence[str]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + self.layer_sum(args[0], output.device).to(output.dtype)


def acting_edits(model: nn.Module) -> set[str]:
    """Ids of the edits that act in a model, whichever [`EditStack`] put them there."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return {edit_id for hook in hooks if isinstance(hook, AddsToOutput) for edit_id in hook.edit_ids}


class EditStack:
    """
    The edits that a model carries, applied through forward hooks; the weights are never written to.

    Of several edits of one prompt the last acts, and the others wait for its undo: see
    [`~hf_mend.edits.active_edits`].

    Args:
        targets (`Sequence[Target]`): The layers that an editor changes.
        base_model (`nn.Module`, *optional*): The model, where edits from elsewhere may change its other linear layers.
    """

    def __init__(self, targets: Sequence[Target], base_model: nn.Module | None = None):
        self.targets = list(targets)
        self._base_model = base_model
        self.edits: list[Edit] = []
        self._sums = {target.name: LayerSum(target.d_in, target.d_out) for target in targets}
        self._handles: list[Any] = []
        self._disabled = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' sums take beside the edits' own factors."""
        return sum(one.nbytes for one in self._sums.values())

    @property
    def active(self) -> list[Edit]:
        """The edits that act."""
        return active_edits(self.edits)

    def replace(self, edits: Sequence[Edit]) -> None:
        """Makes these the model's edits."""
        self.edits = each_support_once(edits)
        for target in self._others(edits):
            self.targets.append(target)
            self._sums[target.name] = LayerSum(target.d_in, target.d_out)
        self._refresh()

    def check_fit(self, edits: Sequence[Edit], source: str | Path) -> None:
        """
        Raises:
            ValueError: An edit's layers or shapes are not this model's, its id is taken, or the support that it needs
                is missing.
        """
        shapes = {target.name: (target.d_in, target.d_out) for target in [*self.targets, *self._others(edits)]}
        check_supported(edits, source, among=self.edits)
        taken = {edit.id for edit in self.edits if not edit.support}
        for edit in edits:
            if edit.id in taken and not edit.support:
                raise ValueError(f"{source}: the model carries the edit {edit.id!r} already; undo it first")
            taken.add(edit.id)
            for name, (u, v) in edit.updates.items():
                fits = u.dim() == v.dim() == 2 and u.shape[0] == v.shape[0]
                if not fits or shapes.get(name) != (u.shape[1], v.shape[1]):
                    raise ValueError(
                        f"{source}: edit {edit.id!r} changes {name!r} with factors {tuple(u.shape)} and "
                        f"{tuple(v.shape)}, the model's edited layers are {shapes}; these edits belong to another "
                        "model or editor"
                    )

    @property
    def layers(self) -> list[Target]:
        """The targets, and the other layers that an edit changes."""
        names = {name for edit in self.edits for name in edit.updates} - {target.name for target in self.targets}
        return [*self.targets, *([] if self._base_model is None else named_layers(self._base_model, names))]

    def _others(self, edits: Sequence[Edit]) -> list[Target]:
        """The layers that these edits change and none did before."""
        names = {name for edit in edits for name in edit.updates} - self._sums.keys()
        return [] if self._base_model is None else named_layers(self._base_model, names)

    def remove(self, ids: Sequence[str]) -> list[Edit]:
        """
        Removes edits by id and returns them. A support that no other edit needs goes with them.

        Raises:
            KeyError: An id is not among the edits; nothing is removed.
            ValueError: An edit is part of a compressed one that stays; nothing is removed.
        """
        unwanted = set(ids)
        check_known(self.edits, ids)
        check_apart(self.edits, unwanted)
        gone = [edit for edit in self.edits if edit.id in unwanted]
        left = [edit for edit in self.edits if edit.id not in unwanted]
        needed = {edit.needs for edit in left}
        self.replace([edit for edit in left if not edit.support or edit.id in needed])
        return gone

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context, the model answers as if it had no edits."""
        self._disabled += 1
        self._refresh()
        try:
            yield
        finally:
            self._disabled -= 1
            self._refresh()

    def merge(self) -> None:
        """
        Adds all edits to the weights and forgets them. Adapters around the base model's layers are merged first: some
        scale the weight that they find.

        Raises:
            TypeError: A layer's weight cannot take an update, or is another's too; no weight has changed then.
        """
        edited = [target for target in self.targets if self._sums[target.name].edits]
        weights = [writable_weight(target.module) for target in edited]
        if self._base_model is not None:
            for target in edited:
                check_own_weight(self._base_model, target.module)
            with self.disabled():
                merge_adapters_(self._base_model)
        for target, weight in zip(edited, weights, strict=True):
            add_to_weight_(target.module, self._sums[target.name].matrix(weight.device))
        self.replace([])

    def _refresh(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        active = self.active
        for target in self.targets:
            layer_sum = self._sums[target.name]
            layer_sum.replace([edit.updates[target.name] for edit in active if target.name in edit.updates])
            if layer_sum.edits and not self._disabled:
                ids = [edit.id for edit in active if target.name in edit.updates and not edit.support]
                self._handles.append(target.module.register_forward_hook(AddsToOutput(layer_sum, ids)))
