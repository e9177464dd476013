"""The edits that a model carries, summed a layer and applied beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bases.merge_adapters import merge_adapters_, weight_with_adapters
from ..bases.targets import Target, named_layers
from ..bases.weights import add_to_weight_, check_finite_weight, check_own_weight, with_update, writable_weight
from ..data.places import joined
from .collection import check_apart, check_known
from .edit import Edit, check_required, warn_of_no_scope, without_scopes
from .hook import Gate
from .passes import ActsInPasses
from .snapshot import Snapshot
from .store import EditStore


_LARGEST_IN_KEY = 1.01  # of a unit vector's numbers, with rounding


class ActiveEdits(ActsInPasses):
    """
    The edits that a model carries, applied through forward hooks; the weights are never written to.

    Of several edits of one prompt the last acts, and the others wait for its undo: see
    [`~hf_mend.edits.edit.active_edits`].

    A change is made beside what acts and comes into its place by one assignment: it is whole or not at all, whatever
    interrupts it. Whoever reads the edits to change them holds `lock`.

    Args:
        targets (`Sequence[Target]`): The layers that an editor changes. Other layers that an edit changes are appended
            to them.
        base_model (`nn.Module`, *optional*): The model, where edits from elsewhere may change its other linear layers.
        gate ([`~hf_mend.edits.hook.Gate`], *optional*): Decides where the edits that have a scope act.
    """

    def __init__(self, targets: Sequence[Target], base_model: nn.Module | None = None, gate: Gate | None = None):
        super().__init__(targets, base_model)
        self.store: EditStore | None = None  # records all changes but those of drafts
        self.set_gate(gate)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"store": None}  # which belongs to one model

    # ---- changes ----

    def replace(self, edits: Sequence[Edit]) -> None:
        """Make these edits the model's, or the draft's."""
        with self.lock:
            bank = None if self.gate is None else self.gate.bank
            new = self._now.followed_by(edits, self._others, bank)
            try:
                self._place(new)
            finally:
                self._tidy()

    def _place(self, new: Snapshot) -> None:
        draft = self._draft()
        self._hook(new)
        if draft is not None:
            draft.snapshot = new
            return
        if self.store is None:
            self._installed = new
        else:
            self._record(self.store, self._installed.edits, new)

    def _record(self, store: EditStore, before: Sequence[Edit], new: Snapshot) -> None:
        """Put a change into a store, and then in its place here: in both, or in none."""
        try:
            store.follow(before, new.edits)
            self._installed, self.store = new, store
        except BaseException:
            # Interrupted after it was on the disk: then the change has happened.
            if _has_followed(store, before, new.edits):
                self._installed, self.store = new, store
            raise

    def install(self, made: Snapshot) -> None:
        """Put in the place of the model's edits, or the draft's, what a draft has made of them."""
        with self.lock:
            try:
                self._place(made)
            finally:
                self._tidy()

    def open_store(self, store: EditStore, edits: Sequence[Edit]) -> None:
        """Make these edits the model's, the store's first, and record all changes in the store from now on."""
        with self.lock:
            bank = None if self.gate is None else self.gate.bank
            new = self._installed.followed_by(edits, self._others, bank)
            try:
                self._hook(new)
                self._record(store, list(store.edits), new)
            finally:
                self._tidy()

    def check_lasting(self, name: str) -> None:
        """
        Check that the edits here are the model's own.

        Args:
            name (`str`): The method that is to keep them for good, for the message.

        Raises:
            RuntimeError: They are a draft's, and end with it.
        """
        if self._draft() is not None:
            raise RuntimeError(
                f"{name} was called within edited() or carrying(), whose edits end with them and are not for the "
                "disk; call it before it or after it"
            )

    def discard(self) -> None:
        """Remove all edits, from a model that is nobody's any more."""
        self._installed = Snapshot(self._installed.targets)
        self._tidy()

    def set_gate(self, gate: Gate | None) -> None:
        """
        Give edits that have a scope another gate.

        Raises:
            ValueError: Edits with a scope are set aside by a context, and would be without theirs after it.
        """
        if any(edit.scope is not None for edit in self._installed.edits):
            raise ValueError(
                "the model carries edits with keys in its present scope, which carrying() or edited() have set aside; "
                "undo_all() outside of them before set_scope"
            )
        self.gate = gate
        if gate is not None:
            gate.bank_now = self._acting_bank

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
            for name, (u, v) in edit.shapes().items():
                fits = len(u) == len(v) == 2 and u[0] == v[0]
                if not fits or shapes.get(name) != (u[1], v[1]):
                    raise ValueError(
                        f"{source}: edit {edit.id!r} changes {name!r} with factors {u} and {v}, the "
                        f"model's edited layers are {shapes}; these edits belong to another model or editor"
                    )
        _check_keys(edits, source)

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
        width = edit.scope.keys.shape[1]
        if self.gate is not None and width != self.gate.key_width:
            raise ValueError(
                f"{source}: the keys of the edit {edit.id!r} have {width} numbers, this model's scope gives "
                f"{self.gate.key_width}; the file was altered, restore it from a copy"
            )
        contrasts = edit.scope.contrasts
        if self.gate is not None and len(contrasts) and contrasts.shape[1] != self.gate.contrast_width:
            raise ValueError(
                f"{source}: the contrasts of the edit {edit.id!r} have {contrasts.shape[1]} numbers, this model's "
                f"scope gives {self.gate.contrast_width}; the file was altered, restore it from a copy"
            )

    def _others(self, edits: Sequence[Edit]) -> list[Target]:
        """Return the layers that these edits change and none did before."""
        names = set().union(*(edit.updates for edit in edits)) - {target.name for target in self.targets}
        return [] if self._base_model is None else named_layers(self._base_model, names)

    def remove(self, ids: Sequence[str]) -> list[Edit]:
        """
        Remove edits by id and return them. A base delta that no other edit requires goes with them.

        Raises:
            KeyError: An id is not among the edits; nothing is removed.
            ValueError: An edit is part of a compressed one that stays; nothing is removed.
        """
        with self.lock:
            unwanted = set(ids)
            check_known(self.edits, ids)
            check_apart(self.edits, unwanted)
            gone = [edit for edit in self.edits if edit.id in unwanted]
            left = [edit for edit in self.edits if edit.id not in unwanted]
            required = {edit.requires for edit in left}
            self.replace([edit for edit in left if not edit.is_base_delta or edit.id in required])
            return gone

    @contextmanager
    def merged(self, safe: bool = False, only: Sequence[Edit] | None = None) -> Iterator[None]:
        """
        Add all edits to the weights and discard them. Adapters around the base model's layers are merged first: some
        scale the weight that they find. If the context ends in an error, weights, adapters and edits are as they were.

        Args:
            safe (`bool`, defaults to `False`): Check first that all merged weights are finite.
            only (`Sequence[Edit]`, *optional*): The edits that are merged; the others are discarded.

        Raises:
            TypeError: A layer's weight cannot be written to, or is another's too; no weight has changed then.
            ValueError: With `safe`, a merged weight would hold NaN or infinity; no weight has changed then.
        """
        with self.lock, self.draft():  # what is left of a scope for the merge is nobody's else
            if only is not None:
                self.replace(only)
            self._act_everywhere()
            now, before = self._now, self._installed
            edited = [target for target in now.targets if target.name in now.sums and now.sums[target.name].edits]
            weights = [writable_weight(target.module) for target in edited]
            if self._base_model is not None:
                for target in edited:
                    check_own_weight(self._base_model, target.module)
            undo = ExitStack()
            try:
                for hook in self._hooks_of(before):
                    hook.remove()  # a copy of a layer would take the model along with them
                for target, weight in zip(edited if safe else [], weights, strict=False):
                    update = now.sums[target.name].matrix(weight.device)
                    check_finite_weight(target.name, with_update(weight_with_adapters(target.module), update))
                if self._base_model is not None:
                    merge_adapters_(self._base_model, undo)
                for target, weight in zip(edited, weights, strict=True):
                    update = now.sums[target.name].matrix(weight.device)
                    undo.callback(weight.detach().copy_, weight.detach().clone())
                    add_to_weight_(target.module, update)
                self._installed = Snapshot(before.targets)
                yield
                self._tidy()
            except BaseException:
                self._installed = before
                with torch.no_grad():
                    undo.close()
                self._hook(before)
                raise

    def _act_everywhere(self) -> None:
        """Let the edits that have a scope act everywhere, as a merged weight does."""
        warn_of_no_scope(self.active)
        if any(edit.scope is not None for edit in self.edits):
            self.replace(without_scopes(self.edits))


def _check_keys(edits: Sequence[Edit], source: str | Path) -> None:
    """Refuse keys that are no unit vectors, of all edits at once: an overflow in a score would stop every text."""
    scopes = [edit.scope for edit in edits if edit.scope is not None]
    tensors: dict[str, list[torch.Tensor]] = {}
    for name, (keys, _) in (item for one in scopes for item in one.tensors().items()):
        tensors.setdefault(name, []).append(keys)
    if any(float(joined(keys).abs().max()) > _LARGEST_IN_KEY for keys in tensors.values()):
        first = next(
            edit.id
            for edit in edits
            if edit.scope is not None
            and max(float(one.abs().max()) for one, _ in edit.scope.tensors().values()) > _LARGEST_IN_KEY
        )
        raise ValueError(
            f"{source}: a key of the edit {first!r} has numbers beyond 1, and keys are unit vectors; the file was "
            "altered, restore it from a copy"
        )


def _has_followed(store: EditStore, before: Sequence[Edit], after: Sequence[Edit]) -> bool:
    """Whether a store holds what has changed between two states of a model's edits."""
    held = {edit.id: edit for edit in store.edits}
    known, left = {id(edit) for edit in before}, {edit.id for edit in after}
    new = [edit for edit in after if id(edit) not in known]
    there = all(edit.id in held and held[edit.id].describe() == edit.describe() for edit in new)
    return there and not any(edit.id in held for edit in before if edit.id not in left and not edit.is_base_delta)
