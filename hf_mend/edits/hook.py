"""The one forward hook by which updates act beside the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..bases.targets import Target
from ..bases.threads import hooked, is_hooked, unhook
from .decoded import decoded
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
    A forward hook that adds to a layer's output within a context.

    Args:
        addend ([`Addend`]): The term to add.
    """

    addend: Addend

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return plus(output, self.addend(args[0], output.device))


@dataclass(frozen=True)
class Acting:
    """
    Where edits act in one pass.

    Args:
        tokens (`Mapping[str, torch.Tensor]`): An edit's id -> the numbers of the tokens at which it acts, counted
            through all rows. No token has two edits.
        count (`int`): The number of tokens of the pass, in all rows.
        by_row (`bool`, defaults to `False`): Both are of rows, and an edit acts at all tokens of a row.
    """

    tokens: Mapping[str, torch.Tensor]
    count: int
    by_row: bool = False

    def of_layer(self, count: int) -> Acting:
        """Return where edits act in a layer that runs on so many tokens."""
        if not self.by_row or count % self.count:
            return self
        each = count // self.count
        places = {
            one: torch.arange(each, device=rows.device) + each * rows[:, None] for one, rows in self.tokens.items()
        }
        return Acting({one: at.flatten() for one, at in places.items()}, count)


@dataclass(frozen=True, eq=False)
class Hook:
    """
    A hook that a model has while something acts in it.

    Args:
        module (`nn.Module`): The module.
        hook (`Callable`): The hook.
        before (`bool`, defaults to `True`): Whether it runs before the module's forward.
        options (`Mapping[str, bool]`): Of the module's `register_forward_hook` or `register_forward_pre_hook`.
    """

    module: nn.Module
    hook: Callable[..., Any]
    before: bool = True
    options: Mapping[str, bool] = field(default_factory=dict)

    def add(self) -> None:
        """Add it, unless it is there."""
        if not is_hooked(self.module, self.hook):
            register = self.module.register_forward_pre_hook if self.before else self.module.register_forward_hook
            register(self.hook, **self.options)

    def is_same(self, other: Hook) -> bool:
        """Whether the other is this hook of this module."""
        return self.module is other.module and self.hook == other.hook

    def remove(self) -> None:
        """Remove it, if it is there."""
        unhook(self.module, self.hook)


class Gate(Protocol):
    """Decides in each pass where which edits act: [`~hf_mend.scope.gate.ScopeGate`]."""

    scope_id: str
    key_width: int
    contrast_width: int
    # The bank of the edits that act in the pass that this thread is in, `None` where none does.
    bank_now: Callable[[], Any]

    def bank(self, edits: Sequence[Edit], before: Any = None, gone: Sequence[str] = ()) -> Any:
        """Return what is decided by, for edits that have a scope, behind those of another bank that are not gone."""

    def hooks(self) -> list[Hook]:
        """Return the hooks of a model in which such edits act."""

    def acting(self) -> Acting | None:
        """Return where edits act in the pass that this thread is in, `None` where none does."""

    def suspended(self) -> AbstractContextManager[None]:
        """Let no edit act within the context, in this thread."""


def added_where_asked(
    acting: Acting, edits: Mapping[str, Edit], name: str, x: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """
    Add each edit to a layer's output at the tokens that ask for it.

    Args:
        acting ([`Acting`]): These tokens.
        edits (`Mapping[str, Edit]`): Id -> edit.
        name (`str`): The layer.
        x (`torch.Tensor`): The layer's input.
        output (`torch.Tensor`): Its output, which is returned untouched where no edit acts.
    """
    flat = output.reshape(-1, output.shape[-1])
    acting = acting.of_layer(len(flat))
    if len(flat) != acting.count:
        raise RuntimeError(
            f"a layer ran on {len(flat)} of the pass's {acting.count} tokens, so that it is not known where edits "
            "act in it; edit layers that see every token, by the editor's target_modules"
        )
    x = x.reshape(-1, x.shape[-1])
    for edit_id, tokens in acting.tokens.items():
        edit = edits.get(edit_id)
        if edit is not None and name in edit.updates:
            update = decoded(edit.updates, name, output.device)
            if len(update[0]):
                term = side_path(x[tokens.to(x.device)].to(output.device), update)
                at = tokens.to(output.device)
                flat = flat.index_copy(0, at, plus(flat[at], term))
    return flat.reshape(output.shape)


def plus(output: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """
    Return a layer's output with an addition, in the output's dtype. In float16, where a sum may be out of range that
    is none in float32, it ends at the largest number.
    """
    if output.dtype != torch.float16:
        return output + term.to(output.dtype)
    most = torch.finfo(output.dtype).max
    return (output.to(term.dtype) + term).clamp(-most, most).to(output.dtype)


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
                    hooks.enter_context(hooked(target.module.register_forward_hook, hook))
        yield
