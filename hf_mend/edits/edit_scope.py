"""Where an edit acts: its keys in a scope, and those of what it must leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .low_rank import same_pairs


# The names of a scope's tensors in files of edits, in place of a layer's name, and their sides.
SCOPE_TENSORS = "scope.keys"
EXCLUDED_TENSORS = "scope.excluded"
CONTRAST_TENSORS = "scope.contrasts"
SCOPE_NAMES = (SCOPE_TENSORS, EXCLUDED_TENSORS, CONTRAST_TENSORS)


@dataclass
class EditScope:
    """
    The scope of one edit: it acts at a token if the text so far asks for one of its keys, more than for any excluded
    one, and is no more like its contrasts.

    Args:
        scope_id (`str`): The id of the scope that gave the keys, to which alone they mean something.
        keys (`torch.Tensor` of shape `(keys, width)`): What asks for the edit: its prompt, further forms of it, and
            what was included.
        thresholds (`torch.Tensor` of shape `(keys,)`): The least score at which each counts.
        texts (`list[str]`): What each key was made of.
        excluded (`torch.Tensor` of shape `(excluded, width)`): Keys of texts for which the edit must not act.
        excluded_texts (`list[str]`): These texts.
        contrasts (`torch.Tensor` of shape `(contrasts, width)`): Keys, without their words, of texts that only name
            what the edit is about, which ask for it less than its own do.
        about (`str`, *optional*): What that is.
    """

    scope_id: str
    keys: torch.Tensor
    thresholds: torch.Tensor
    texts: list[str] = field(default_factory=list)
    excluded: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    excluded_texts: list[str] = field(default_factory=list)
    contrasts: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    about: str | None = None

    def __eq__(self, other: object) -> bool:
        """Whether another scope has the same texts, and the same keys and thresholds to the bit."""
        if not isinstance(other, EditScope):
            return NotImplemented
        return self.describe() == other.describe() and same_pairs(self.tensors(), other.tensors())

    def describe(self) -> dict[str, Any]:
        """Describe the scope, all but its tensors, in plain JSON values."""
        about = {} if self.about is None else {"about": self.about}
        return {"id": self.scope_id, "texts": self.texts, "excluded_texts": self.excluded_texts, **about}

    def tensors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the tensors in pairs, as files hold an edit's factors."""
        pairs = {SCOPE_TENSORS: (self.keys, self.thresholds[:, None])}
        for name, keys in ((EXCLUDED_TENSORS, self.excluded), (CONTRAST_TENSORS, self.contrasts)):
            if len(keys):
                pairs[name] = keys, keys.new_zeros(len(keys), 1)
        return pairs

    @classmethod
    def from_file(
        cls, described: Mapping[str, Any], pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], where: str
    ) -> EditScope:
        """
        Rebuild a scope from the outputs of [`describe`] and [`tensors`], whose values are known to be finite.

        Raises:
            ValueError: The tensors do not fit the description.
        """
        keys, thresholds = pairs.get(SCOPE_TENSORS) or (torch.zeros(0, 0), torch.zeros(0, 1))
        texts, excluded_texts = list(described.get("texts", [])), list(described.get("excluded_texts", []))
        excluded = keys[:0]
        good = keys.dim() == 2 and keys.shape[0] == len(texts) > 0 and thresholds.shape == (len(texts), 1)
        good = good and keys.is_floating_point() and thresholds.is_floating_point()
        if excluded_texts or EXCLUDED_TENSORS in pairs:
            excluded, beside = pairs.get(EXCLUDED_TENSORS) or (excluded, thresholds[:0])
            good = good and excluded.shape == (len(excluded_texts), keys.shape[1])
            good = good and beside.shape == (len(excluded_texts), 1) and not bool(beside.any())
            good = good and excluded.is_floating_point() and beside.is_floating_point()
        contrasts, beside = pairs.get(CONTRAST_TENSORS) or (keys[:0], thresholds[:0])
        about = described.get("about")
        good = good and contrasts.dim() == 2 and contrasts.shape[1] <= keys.shape[1] and not bool(beside.any())
        good = good and contrasts.is_floating_point() and beside.shape == (len(contrasts), 1)
        good = good and (about is not None) == (len(contrasts) > 0)
        kept = [keys, contrasts] if len(contrasts) else [keys]
        if good and not bool(
            (thresholds.abs() <= 1).all() and min(float(one.float().abs().amax(-1).min()) for one in kept) > 0
        ):
            raise ValueError(
                f"{where}: the edit's scope has a key of nothing but zeros, or a threshold that is not from -1 to 1; "
                "the file was altered, restore it from a copy"
            )
        if not good:
            raise ValueError(
                f"{where}: the edit's scope has keys of shape {tuple(keys.shape)} in {keys.dtype} for {len(texts)} "
                f"texts and {tuple(excluded.shape)} excluded ones for {len(excluded_texts)}, with thresholds of shape "
                f"{tuple(thresholds.shape)}, and contrasts of shape {tuple(contrasts.shape)} in "
                f"{contrasts.dtype} about {about!r}; the "
                "file was altered, restore it from a copy"
            )
        return cls(str(described["id"]), keys, thresholds[:, 0], texts, excluded, excluded_texts, contrasts, about)


def is_scope_description(value: Any) -> bool:
    """Whether a value has the form of [`EditScope.describe`]'s output."""
    if not isinstance(value, dict) or not isinstance(value.get("id"), str):
        return False
    lists = (value.get("texts"), value.get("excluded_texts"))
    about = value.get("about")
    return isinstance(about, str | None) and all(isinstance(one, list) and {*map(type, one)} <= {str} for one in lists)
