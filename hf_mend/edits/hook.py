"""The one forward hook by which updates act beside the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..bases.targets import Target
from .low_rank import Update, side_path


if TYPE_CHECKING:
    from .edit import Edit


# The term that is added to a layer's output, `(..., d_out)` in the updates' dtype, from the layer's input,
# `(..., d_in)`, and the device where the layer runs.
Addend = Callable[[torch.Tensor, torch.device], torch.Tensor]


@dataclass(eq=False)
class SidePath:
    """
    The output of an update, one for all rows or one for each run of them: see [`~hf_mend.edits.low_rank.side_path`].

    Args:
        update (`tuple[torch.Tensor, torch.Tensor]`): `(u, v)`.
    """

    update: Update

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        u, v = self.update
        if u.device != device:
            self.update = u.to(device), v.to(device)  # an offloaded layer runs elsewhere
        return side_path(x.to(device), self.update)


@dataclass(eq=False)
class Masked:
    """
    The output of an update at some of the tokens, zero at the others.

    Args:
        addend ([`Addend`]): The output at all tokens.
        where (`torch.Tensor` of shape `(rows, seq)`, bool): The tokens.
    """

    addend: Addend
    where: torch.Tensor

    def __call__(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        term = self.addend(x, device)
        return term * self.where.to(device).reshape(*term.shape[:-1], 1)


@dataclass(eq=False)
class AddsToOutput:
    """
    A forward hook that adds to a layer's output. It is no closure: a deep copy of the model has an addend of its own,
    and a pickle the one it was saved with.

    Args:
        addend ([`Addend`]): The term to add: the [`~hf_mend.edits.layer_sum.LayerSum`] of the edits that the model
            carries, or the [`SidePath`] of an update that acts within a context.
        edit_ids (`Sequence[str]`): Ids of the edits in it.
    """

    addend: Addend
    edit_ids: Sequence[str] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + self.addend(args[0], output.device).to(output.dtype)


@dataclass(frozen=True)
class Acting:
    """
    Where edits act in one pass.

    Args:
        tokens (`Mapping[str, torch.Tensor]`): An edit's id -> the numbers of the tokens at which it acts, counted
            through all rows. No token has two edits.
        count (`int`): The number of tokens of the pass, in all rows.
    """

    tokens: Mapping[str, torch.Tensor]
    count: int


class Gate(Protocol):
    """Decides in each pass where which edits act: [`~hf_mend.scope.gate.ScopeGate`]."""

    scope_id: str

    def replace(self, edits: Sequence[Edit]) -> None:
        """Set the edits that it decides on, all of which have a scope."""

    def acting(self) -> Acting | None:
        """Return where edits act in the pass that this thread is in, `None` where none does."""

    def suspended(self) -> AbstractContextManager[None]:
        """Let no edit act within the context, in this thread."""


@dataclass(eq=False)
class AddsWhereAsked:
    """
    A forward hook that adds each edit to a layer's output at the tokens that ask for it, and returns the layer's own
    output, untouched, where there are none.

    Args:
        gate ([`Gate`]): Knows these tokens.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): An edit's id -> its `(u, v)` of this layer.
    """

    gate: Gate
    updates: Mapping[str, Update]

    @property
    def edit_ids(self) -> Sequence[str]:
        """Ids of the edits."""
        return [*self.updates]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        acting = self.gate.acting()
        if acting is None:
            return output
        flat = output.reshape(-1, output.shape[-1])
        if len(flat) != acting.count:
            raise RuntimeError(
                f"a layer ran on {len(flat)} of the pass's {acting.count} tokens, so that it is not known where edits "
                "act in it; edit layers that see every token, by the editor's target_modules"
            )
        x = args[0].reshape(-1, args[0].shape[-1])
        for edit_id, tokens in acting.tokens.items():
            if edit_id in self.updates:
                update = tuple(side.to(output.device) for side in self.updates[edit_id])
                term = side_path(x[tokens.to(x.device)].to(output.device), (update[0], update[1]))
                flat = flat.index_add(0, tokens.to(output.device), term.to(output.dtype))
        return flat.reshape(output.shape)


@contextmanager
def applied(
    targets: Sequence[Target], *updates: Mapping[str, Update], where: torch.Tensor | None = None
) -> Iterator[None]:
    """
    Add the updates to the target layers' outputs within the context.

    Args:
        targets (`Sequence[Target]`): The layers.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)`, as
            [`~hf_mend.edits.low_rank.side_path`] takes them; other layers stay as they are. Several mappings add up.
        where (`torch.Tensor` of shape `(rows, seq)`, bool, *optional*): The tokens at which they act; all of them when
            missing.
    """
    with ExitStack() as hooks:
        for target in targets:
            for one in updates:
                if target.name in one:
                    path: Addend = SidePath(one[target.name])
                    hook = AddsToOutput(path if where is None else Masked(path, where))
                    hooks.callback(target.module.register_forward_hook(hook).remove)
        yield
