"""The edits that a model carries, summed a layer and applied beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..bases.merge_adapters import merge_adapters_, weight_with_adapters
from ..bases.targets import Target, named_layers
from ..bases.weights import add_to_weight_, check_finite_weight, check_own_weight, with_update, writable_weight
from .collection import check_apart, check_known
from .edit import Edit, active_edits, check_required, each_base_delta_once, warn_of_no_scope
from .hook import AddsToOutput, AddsWhereAsked, Gate
from .layer_sum import LayerSum
from .preserved_keys import PreservedKeys


def acting_edits(model: nn.Module) -> set[str]:
    """Return the ids of the edits that act in a model, whichever [`ActiveEdits`] put them there."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return {edit_id for hook in hooks if isinstance(hook, (AddsToOutput, AddsWhereAsked)) for edit_id in hook.edit_ids}


class ActiveEdits:
    """
    The edits that a model carries, applied through forward hooks; the weights are never written to.

    Of several edits of one prompt the last acts, and the others wait for its undo: see
    [`~hf_mend.edits.edit.active_edits`].

    Args:
        targets (`Sequence[Target]`): The layers that an editor changes. Other layers that an edit changes are appended
            to them.
        base_model (`nn.Module`, *optional*): The model, where edits from elsewhere may change its other linear layers.
        gate ([`~hf_mend.edits.hook.Gate`], *optional*): Decides where the edits that have a scope act.
    """

    def __init__(self, targets: Sequence[Target], base_model: nn.Module | None = None, gate: Gate | None = None):
        self.targets = list(targets)
        self.gate = gate
        self._base_model = base_model
        self.edits: list[Edit] = []
        self._sums = {target.name: LayerSum(target.d_in, target.d_out) for target in targets}
        self.preserved_keys = PreservedKeys()  # of the edits that a joining method made
        self._handles: list[Any] = []
        self._disabled = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' sums, beside the edits' own factors."""
        return sum(one.nbytes for one in self._sums.values())

    @property
    def active(self) -> list[Edit]:
        """The edits that act."""
        return active_edits(self.edits)

    def replace(self, edits: Sequence[Edit]) -> None:
        """Make these edits the model's."""
        self.edits = each_base_delta_once(edits)
        for target in self._others(edits):
            self.targets.append(target)
            self._sums[target.name] = LayerSum(target.d_in, target.d_out)
        self._refresh()

    def check_fit(self, edits: Sequence[Edit], source: str | Path) -> None:
        """
        Raises:
            ValueError: An edit's layers or shapes are not this model's, the model has an edit of its id already, or
                the base delta that it requires is missing.
        """
        shapes = {target.name: (target.d_in, target.d_out) for target in [*self.targets, *self._others(edits)]}
        check_required(edits, source, among=self.edits)
        used = {edit.id for edit in self.edits if not edit.is_base_delta}
        for edit in edits:
            self._check_scope(edit, source)
            if edit.id in used and not edit.is_base_delta:
                raise ValueError(f"{source}: the model carries the edit {edit.id!r} already; undo it first")
            used.add(edit.id)
            for name, (u, v) in edit.updates.items():
                fits = u.dim() == v.dim() == 2 and u.shape[0] == v.shape[0]
                if not fits or shapes.get(name) != (u.shape[1], v.shape[1]):
                    raise ValueError(
                        f"{source}: edit {edit.id!r} changes {name!r} with factors {tuple(u.shape)} and "
                        f"{tuple(v.shape)}, the model's edited layers are {shapes}; these edits belong to another "
                        "model or editor"
                    )

    def _check_scope(self, edit: Edit, source: str | Path) -> None:
        if edit.scope is None:
            return
        own = None if self.gate is None else self.gate.scope_id
        if own != edit.scope.scope_id:
            has = "this model has none" if own is None else f"this model's is {own!r}"
            raise ValueError(
                f"{source}: the edit {edit.id!r} acts where the scope {edit.scope.scope_id!r} says, and {has}; "
                "load the editor that made the edits with EditableModel.from_pretrained"
            )

    def _others(self, edits: Sequence[Edit]) -> list[Target]:
        """Return the layers that these edits change and none did before."""
        names = {name for edit in edits for name in edit.updates} - self._sums.keys()
        return [] if self._base_model is None else named_layers(self._base_model, names)

    def remove(self, ids: Sequence[str]) -> list[Edit]:
        """
        Remove edits by id and return them. A base delta that no other edit requires goes with them.

        Raises:
            KeyError: An id is not among the edits; nothing is removed.
            ValueError: An edit is part of a compressed one that stays; nothing is removed.
        """
        unwanted = set(ids)
        check_known(self.edits, ids)
        check_apart(self.edits, unwanted)
        gone = [edit for edit in self.edits if edit.id in unwanted]
        left = [edit for edit in self.edits if edit.id not in unwanted]
        required = {edit.requires for edit in left}
        self.replace([edit for edit in left if not edit.is_base_delta or edit.id in required])
        return gone

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all edits within the context."""
        self._disabled += 1
        self._refresh()
        try:
            yield
        finally:
            self._disabled -= 1
            self._refresh()

    def merge(self, safe: bool = False) -> None:
        """
        Add all edits to the weights and discard them. Adapters around the base model's layers are merged first: some
        scale the weight that they find.

        Args:
            safe (`bool`, defaults to `False`): Check first that all merged weights are finite.

        Raises:
            TypeError: A layer's weight cannot be written to, or is another's too; no weight has changed then.
            ValueError: With `safe`, a merged weight would hold NaN or infinity; no weight has changed then.
        """
        self._act_everywhere()
        edited = [target for target in self.targets if self._sums[target.name].edits]
        weights = [writable_weight(target.module) for target in edited]
        if self._base_model is not None:
            for target in edited:
                check_own_weight(self._base_model, target.module)
        if safe:
            for target, weight in zip(edited, weights, strict=True):
                update = self._sums[target.name].matrix(weight.device)
                check_finite_weight(target.name, with_update(weight_with_adapters(target.module), update))
        if self._base_model is not None:
            with self.disabled():
                merge_adapters_(self._base_model)
        for target, weight in zip(edited, weights, strict=True):
            add_to_weight_(target.module, self._sums[target.name].matrix(weight.device))
        self.replace([])

    def _act_everywhere(self) -> None:
        """Let the edits that have a scope act everywhere, as a merged weight does."""
        warn_of_no_scope(self.active)
        if any(edit.scope is not None for edit in self.edits):
            self.replace([edit if edit.scope is None else replace(edit, scope=None) for edit in self.edits])

    def _refresh(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        scoped = [edit for edit in self.active if edit.scope is not None]
        everywhere = [edit for edit in self.active if edit.scope is None]
        if self.gate is not None:
            self.gate.replace([] if self._disabled else scoped)
        for target in self.targets:
            layer_sum, name = self._sums[target.name], target.name
            layer_sum.replace([edit.updates[name] for edit in everywhere if name in edit.updates])
            if self._disabled:
                continue
            if layer_sum.edits:
                ids = [edit.id for edit in everywhere if name in edit.updates and not edit.is_base_delta]
                self._handles.append(target.module.register_forward_hook(AddsToOutput(layer_sum, ids)))
            own = {edit.id: edit.updates[name] for edit in scoped if name in edit.updates}
            if own and self.gate is not None:
                self._handles.append(target.module.register_forward_hook(AddsWhereAsked(self.gate, own)))
