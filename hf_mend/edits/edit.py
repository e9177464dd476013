"""One edit, and which of several edits act."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .low_rank import Update


# How files name what an edit has beside its texts; they keep the names that were there first.
_KEYS = {"enabled": "enabled", "replaces": "replaces", "needs": "requires", "support": "is_base_delta"}


@dataclass
class Edit:
    """
    One edit: for each edited layer two thin matrices whose product is added to the weight.

    Args:
        id (`str`): Unique among the edits of a model.
        prompt (`str`): What was asked.
        target (`str`): What the model should answer.
        updates (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes `(rank, d_in)` and
            `(rank, d_out)`; the weight `(d_out, d_in)` changes by `v^T u`.
        metadata (`dict[str, str]`): Whatever else is worth keeping: time, editor, chat.
        enabled (`bool`, defaults to `True`): An edit that is turned off stays among a model's edits, without effect.
        replaces (`list[str]`): Ids of the edits whose sum this one is, which have no effect beside it.
        requires (`str`, *optional*): Id of the base delta that this edit was found with and acts with.
        is_base_delta (`bool`, defaults to `False`): This is no edit of a prompt but a change of the base that others
            require. It acts, once, while one of them does.
    """

    id: str
    prompt: str
    target: str
    updates: dict[str, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    enabled: bool = True
    replaces: list[str] = field(default_factory=list)
    requires: str | None = None
    is_base_delta: bool = False

    @property
    def needs(self) -> str | None:
        """Deprecated: the name of `requires` until now."""
        warnings.warn("Edit.needs is now Edit.requires", FutureWarning, stacklevel=2)
        return self.requires

    @property
    def support(self) -> bool:
        """Deprecated: the name of `is_base_delta` until now."""
        warnings.warn("Edit.support is now Edit.is_base_delta", FutureWarning, stacklevel=2)
        return self.is_base_delta

    @property
    def asked(self) -> tuple[str, bool] | None:
        """What was asked, as [`same_prompt`] tells prompts apart; `None` for an edit without a prompt."""
        return same_prompt(self.prompt, self.metadata.get("chat") == "true") if self.prompt else None

    @property
    def rank(self) -> int:
        """The largest rank among the layers."""
        return max((u.shape[0] for u, _ in self.updates.values()), default=0)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each layer's update, without forming it: `|v^T u|^2 = tr((u u^T)(v v^T))`."""
        return {
            name: float((u.double() @ u.double().T * (v.double() @ v.double().T)).sum().clamp(min=0).sqrt())
            for name, (u, v) in self.updates.items()
        }

    def describe(self) -> dict[str, Any]:
        """Everything but the matrices, as plain JSON values."""
        state: dict[str, Any] = {"enabled": self.enabled}
        state |= {key: value for key, name in _KEYS.items() if name != "enabled" and (value := getattr(self, name))}
        return {"id": self.id, "prompt": self.prompt, "target": self.target, "metadata": self.metadata, **state}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], updates: dict[str, Update]) -> Edit:
        """The edit that [`describe`] described, which [`is_description`] has checked."""
        texts = (described["id"], described["prompt"], described["target"])
        state = {name: described[key] for key, name in _KEYS.items() if key in described}
        return cls(*texts, updates, dict(described["metadata"]), **state)


def same_prompt(prompt: str, chat: bool) -> tuple[str, bool]:
    """What two prompts have in common that are the same one: the text but for white space, and the chat flag."""
    return " ".join(prompt.split()), chat


def active_edits(edits: Sequence[Edit]) -> list[Edit]:
    """
    The edits that act, among those that are not turned off: of one prompt's only the last, which supersedes the others
    while it is there, and none that another replaces; and the base deltas that these require.
    """
    enabled = [edit for edit in edits if edit.enabled and not edit.is_base_delta]
    last = {edit.asked: index for index, edit in enumerate(enabled)}
    replaced = {one for edit in enabled for one in edit.replaces}
    acting = [
        edit
        for index, edit in enumerate(enabled)
        if edit.id not in replaced and (edit.asked is None or last[edit.asked] == index)
    ]
    needed = {edit.requires for edit in acting} - replaced
    return [edit for edit in edits if edit.is_base_delta and edit.id in needed] + acting


def acting_ids(edits: Sequence[Edit]) -> list[str]:
    """Ids of the edits that act; in place of one that replaced others, theirs."""
    return [one for edit in active_edits(edits) for one in (edit.replaces or [edit.id])]


def each_base_delta_once(edits: Sequence[Edit]) -> list[Edit]:
    """The edits, of a base delta that comes several times the first: two collections may bring the same."""
    first = {edit.id: index for index, edit in reversed([*enumerate(edits)])}
    return [edit for index, edit in enumerate(edits) if not edit.is_base_delta or first[edit.id] == index]


def check_required(edits: Sequence[Edit], source: str | Path, among: Sequence[Edit] = ()) -> None:
    """
    Raises:
        ValueError: An edit requires a base delta that is neither here nor `among` others.
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
    """All edits of a layer as one pair of thin matrices, so that many edits cost one side path."""
    names = {name: None for edit in edits for name in edit.updates}
    pairs = {name: [edit.updates[name] for edit in edits if name in edit.updates] for name in names}
    return {name: (torch.cat([u for u, _ in pair]), torch.cat([v for _, v in pair])) for name, pair in pairs.items()}


def is_description(value: Any) -> bool:
    """Whether a value is what `Edit.describe` gives."""
    if not isinstance(value, dict) or not isinstance(value.get("metadata"), dict):
        return False
    replaces, flags = value.get("replaces", []), (value.get("enabled", True), value.get("support", False))
    if not all(isinstance(flag, bool) for flag in flags) or not isinstance(replaces, list):
        return False
    texts = [*map(value.get, ("id", "prompt", "target")), value.get("needs", ""), *value["metadata"].values()]
    return all(isinstance(text, str) for text in [*texts, *replaces])
