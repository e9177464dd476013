"""One edit, and the rules by which several edits act."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..data.deprecation import renamed_arguments
from ..data.display import html_table, shown
from ..hub.files import shortened
from .edit_scope import SCOPE_NAMES, EditScope, is_scope_description
from .four_bit import FOUR_BIT_TENSORS, FourBitUpdates, is_four_bit_description
from .low_rank import Update, same_pairs


logger = logging.get_logger(__name__)

# The names of an edit's state in files -> its attributes; files keep the first release's names.
_KEYS = {"enabled": "enabled", "replaces": "replaces", "needs": "requires", "support": "is_base_delta"}


@renamed_arguments(needs="requires", support="is_base_delta", asked="prompt_key")
@dataclass
class Edit:
    """
    One edit: for each edited layer two thin matrices whose product is added to the weight.

    Args:
        id (`str`): Unique among the edits of a model.
        prompt (`str`): The prompt.
        target (`str`): The answer that the model should give.
        updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes `(rank, d_in)`
            and `(rank, d_out)`; the weight `(d_out, d_in)` changes by `v^T u`. Of an edit with a scope they are
            usually kept in four bits: [`~hf_mend.edits.four_bit.FourBitUpdates`].
        metadata (`dict[str, str]`): Further facts of the edit: time, editor, chat.
        enabled (`bool`, defaults to `True`): A disabled edit stays among a model's edits, without effect.
        replaces (`list[str]`): Ids of the edits whose sum this one is, which have no effect beside it.
        requires (`str`, *optional*): Id of the base delta that this edit was found with and acts with.
        is_base_delta (`bool`, defaults to `False`): Whether this is not an edit of a prompt but a change of the base
            that others require. It acts, once, while one of them does.
        scope ([`EditScope`], *optional*): Where the edit acts; everywhere when missing.
    """

    id: str
    prompt: str
    target: str
    updates: Mapping[str, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    enabled: bool = True
    replaces: list[str] = field(default_factory=list)
    requires: str | None = None
    is_base_delta: bool = False
    scope: EditScope | None = None

    # A dataclass's own would ask tensors for one truth value.
    def __eq__(self, other: object) -> bool:
        """Whether another edit is the same in all that a file keeps: text, state, and every tensor to the bit."""
        if not isinstance(other, Edit):
            return NotImplemented
        if self is other:
            return True
        return self.describe() == other.describe() and same_pairs(self.pairs(), other.pairs())

    def __repr__(self) -> str:
        return f"Edit({self.id!r}, {shown(self.prompt)} -> {shown(self.target)}, {self._state})"

    def _repr_html_(self) -> str:
        rows = [("prompt", shown(self.prompt, 300)), ("target", shown(self.target, 300)), ("state", self._state)]
        return html_table(f"Edit {self.id}", [*rows, *self.metadata.items()])

    @property
    def _state(self) -> str:
        off = "" if self.enabled else ", disabled"
        return f"rank {self.rank} in {len(self.updates)} layer{'' if len(self.updates) == 1 else 's'}{off}"

    @property
    def prompt_key(self) -> tuple[str, bool] | None:
        """The identity of the prompt, as [`same_prompt`] gives it; `None` for an edit without a prompt."""
        chat, messages = self.metadata.get("chat") == "true", self.metadata.get("messages", "")
        return same_prompt(self.prompt, chat, messages) if self.prompt else None

    @property
    def rank(self) -> int:
        """The largest rank among the layers."""
        return max((u[0] for u, _ in self.shapes().values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and of the scope's keys."""
        pairs = [] if self.scope is None else [*self.scope.tensors().values()]
        if isinstance(self.updates, FourBitUpdates):
            return self.updates.nbytes + sum(u.nbytes + v.nbytes for u, v in pairs)
        return sum(u.nbytes + v.nbytes for u, v in [*self.updates.values(), *pairs])

    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the shapes of each layer's `u` and `v`."""
        if isinstance(self.updates, FourBitUpdates):
            return self.updates.shapes()
        return {name: (tuple(u.shape), tuple(v.shape)) for name, (u, v) in self.updates.items()}

    def norms(self) -> dict[str, float]:
        """Return the Frobenius norm of each layer's update, without forming it: `|v^T u|^2 = tr((u u^T)(v v^T))`."""
        return {
            name: float((u.double() @ u.double().T * (v.double() @ v.double().T)).sum().clamp(min=0).sqrt())
            for name, (u, v) in self.updates.items()
        }

    def describe(self) -> dict[str, Any]:
        """Describe the edit, all but its matrices, in plain JSON values."""
        state: dict[str, Any] = {"enabled": self.enabled}
        state |= {key: value for key, name in _KEYS.items() if name != "enabled" and (value := getattr(self, name))}
        if self.scope is not None:
            state["scope"] = self.scope.describe()
        if isinstance(self.updates, FourBitUpdates):
            state["four_bit"] = self.updates.describe()
        return {"id": self.id, "prompt": self.prompt, "target": self.target, "metadata": self.metadata, **state}

    def pairs(self) -> dict[str, Update]:
        """
        Return all tensors as files hold them: the layers' factors, or their codes of four bits, and those of the
        scope.
        """
        factors = self.updates.tensors() if isinstance(self.updates, FourBitUpdates) else dict(self.updates)
        return factors | ({} if self.scope is None else self.scope.tensors())

    @classmethod
    def from_file(cls, described: Mapping[str, Any], pairs: Mapping[str, Update], where: str) -> Edit:
        """
        Rebuild an edit from the outputs of [`describe`], which [`is_description`] has checked, and of [`pairs`].

        Raises:
            ValueError: Tensors do not fit the description.
        """
        texts = (described["id"], described["prompt"], described["target"])
        state = {name: described[key] for key, name in _KEYS.items() if key in described}
        scope, four_bit = described.get("scope"), described.get("four_bit")
        updates: Mapping[str, Update] = dict(pairs)
        if scope is not None:
            updates = {name: pair for name, pair in pairs.items() if name not in SCOPE_NAMES}
            state["scope"] = EditScope.from_file(scope, pairs, where)
        codes = [name for name, pair in updates.items() if torch.uint8 in (pair[0].dtype, pair[1].dtype)]
        expected = [] if four_bit is None else [f"{FOUR_BIT_TENSORS}{number}" for number in range(len(four_bit))]
        if sorted(codes) != sorted(expected) or (four_bit is not None and len(updates) != len(expected)):
            raise ValueError(
                f"{where}: an edit has the tensors {shortened([*updates])}, of which {shortened(codes)} are codes of "
                f"four bits, and its description expects {shortened(expected)}; the file was altered, restore it from "
                "a copy"
            )
        if four_bit is not None:
            updates = FourBitUpdates.from_file(four_bit, updates, where)
        return cls(*texts, updates, dict(described["metadata"]), **state)


def same_prompt(prompt: str, chat: bool, messages: str = "") -> tuple[str, bool]:
    """
    Return the identity of a prompt: its text, behind that of the chat's earlier messages, with white space normalised,
    and the chat flag.
    """
    return " ".join([*messages.split(), *prompt.split()]), chat


def active_edits(edits: Sequence[Edit]) -> list[Edit]:
    """
    Return the edits that act, among the enabled ones: of each prompt's edits the last, which supersedes the others,
    unless another edit replaces it; and the base deltas that these require.
    """
    enabled = [edit for edit in edits if edit.enabled and not edit.is_base_delta]
    keys = [edit.prompt_key for edit in enabled]
    last = {key: index for index, key in enumerate(keys)}
    replaced = {one for edit in enabled for one in edit.replaces}
    acting = [
        edit
        for index, (edit, key) in enumerate(zip(enabled, keys, strict=True))
        if edit.id not in replaced and (key is None or last[key] == index)
    ]
    required = {edit.requires for edit in acting} - replaced
    return [edit for edit in edits if edit.is_base_delta and edit.id in required] + acting


def acting_ids(edits: Sequence[Edit]) -> list[str]:
    """Return the ids of the edits that act. In place of an edit that replaced others, return theirs."""
    return [one for edit in active_edits(edits) for one in (edit.replaces or [edit.id])]


def each_base_delta_once(edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits with only the first copy of each base delta: two collections may bring the same."""
    first = {edit.id: index for index, edit in reversed([*enumerate(edits)])}
    return [edit for index, edit in enumerate(edits) if not edit.is_base_delta or first[edit.id] == index]


def check_required(edits: Sequence[Edit], source: str | Path, among: Sequence[Edit] = ()) -> None:
    """
    Raises:
        ValueError: An edit requires a base delta that is neither among these edits nor `among` others.
    """
    every = [*edits, *among]
    there = {edit.id for edit in every} | {one for edit in every for one in edit.replaces}
    for edit in edits:
        if edit.requires is not None and edit.requires not in there:
            raise ValueError(
                f"{source}: the edit {edit.id!r} acts with the change {edit.requires!r} beside it, which is missing; "
                "take it along from the edits of the model that made it"
            )


def stacked(edits: Sequence[Edit]) -> dict[str, Update]:
    """Stack all edits of a layer into one pair of thin matrices, so that many edits cost one side path."""
    names = {name: None for edit in edits for name in edit.updates}
    pairs = {name: [edit.updates[name] for edit in edits if name in edit.updates] for name in names}
    return {name: (torch.cat([u for u, _ in pair]), torch.cat([v for _, v in pair])) for name, pair in pairs.items()}


def without_scopes(edits: Iterable[Edit]) -> list[Edit]:
    """Return edits that act everywhere, as they do in merged weights and LoRA adapters."""
    return [edit if edit.scope is None else replace(edit, scope=None) for edit in edits]


def warn_of_no_scope(edits: Sequence[Edit]) -> None:
    """Warn, once, if edits that have a scope are about to be merged or exported, where there is none."""
    scoped = sum(edit.scope is not None for edit in edits)
    if scoped:
        logger.warning_once(
            f"{scoped} of the edits act only where they are asked for; in merged weights and LoRA adapters they act "
            "everywhere, and disturb one another and other texts. Merge or export few of them (edits=[ids]), and "
            "measure what that costs: evaluate_in_the_wild(..., scope=False), or hf-mend eval --no-scope"
        )


def is_description(value: Any) -> bool:
    """Whether a value has the form of `Edit.describe`'s output."""
    if not isinstance(value, dict) or not isinstance(value.get("metadata"), dict):
        return False
    replaces, flags = value.get("replaces", []), (value.get("enabled", True), value.get("support", False))
    if "scope" in value and not is_scope_description(value["scope"]):
        return False
    if "four_bit" in value and not is_four_bit_description(value["four_bit"]):
        return False
    if not all(isinstance(flag, bool) for flag in flags) or not isinstance(replaces, list):
        return False
    texts = [*map(value.get, ("id", "prompt", "target")), value.get("needs", ""), *value["metadata"].values()]
    return {*map(type, texts), *map(type, replaces)} == {str}
