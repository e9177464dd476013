"""All that acts in a model at one time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..bases.targets import Target
from .edit import Edit, active_edits, each_base_delta_once
from .layer_sum import LayerSum
from .preserved_keys import PreservedKeys


@dataclass(frozen=True, eq=False)
class Snapshot:
    """
    All that acts in a model at one time. It never changes: passes use the one that was the model's when they began,
    while the next is made beside it.

    Args:
        targets (`Sequence[Target]`): The layers that an editor changes, and others that its edits do.
        edits (`list[Edit]`): The edits.
        active (`list[Edit]`): Those that act.
        standing (`dict`): Prompt key -> the edit that acts for it.
        sums (`Mapping[str, LayerSum]`): Layer name -> the sum of the edits that act everywhere.
        scoped (`dict[str, Edit]`): Id -> the edits that act where they are asked for.
        scoped_layers (`frozenset[str]`): Names of the layers that those change.
        bank: What the gate decides on these by; `None` without any.
        replaced (`frozenset[str]`): Ids of the edits whose sum another is.
        preserved_keys ([`PreservedKeys`]): The inputs of the edits that a joining method made.
    """

    targets: Sequence[Target]
    edits: list[Edit] = field(default_factory=list)
    active: list[Edit] = field(default_factory=list)
    standing: dict[Any, Edit] = field(default_factory=dict)
    sums: Mapping[str, LayerSum] = field(default_factory=dict)
    scoped: dict[str, Edit] = field(default_factory=dict)
    scoped_layers: frozenset[str] = frozenset()
    bank: Any = None
    replaced: frozenset[str] = frozenset()
    preserved_keys: PreservedKeys = field(default_factory=PreservedKeys)

    def layers(self) -> list[Target]:
        """Return the layers in which something acts."""
        names = {name for name, one in self.sums.items() if one.edits} | self.scoped_layers
        return [target for target in self.targets if target.name in names]

    def followed_by(
        self, edits: Sequence[Edit], others: Callable[[Sequence[Edit]], list[Target]], bank: Callable[..., Any] | None
    ) -> Snapshot:
        """
        Return what acts with other edits.

        Args:
            edits (`Sequence[Edit]`): The edits.
            others (`Callable`): Edits -> the layers that they change and no editor does.
            bank (`Callable`, *optional*): [`Gate.bank`].
        """
        known = len(self.edits)
        if len(edits) > known and all(map(operator.is_, self.edits, edits)) and self._takes(edits[known:]):
            return self._extended(edits, edits[known:], others, bank)
        edits = each_base_delta_once(edits)
        active = active_edits(edits)
        targets = [*self.targets, *others(edits)]
        scoped = [edit for edit in active if edit.scope is not None]
        pairs: dict[str, list[Any]] = {target.name: [] for target in targets}
        for edit in active:
            if edit.scope is None:
                for name, pair in edit.updates.items():
                    if name in pairs:
                        pairs[name].append(pair)
        sums = {target.name: self._sum_of(target).replaced(pairs[target.name]) for target in targets}
        return Snapshot(
            targets,
            edits,
            active,
            {key: edit for edit in active if (key := edit.prompt_key) is not None},
            sums,
            {edit.id: edit for edit in scoped},
            frozenset().union(*(edit.updates for edit in scoped)),
            self._bank_of(scoped, bank) if scoped and bank is not None else None,
            frozenset(one for edit in edits for one in edit.replaces),
            self.preserved_keys,
        )

    def _bank_of(self, scoped: Sequence[Edit], bank: Callable[..., Any]) -> Any:
        """
        Return the bank of some edits, made from the present one: what both have is not looked at again, up to the
        first edit that is new or changed. Of edits that are one to the scope the later one counts.
        """
        before = {} if self.bank is None else self.scoped
        places = {edit_id: place for place, edit_id in enumerate(before)}
        kept: set[str] = set()
        last = -1
        for edit in scoped:
            known = before.get(edit.id)
            if known is None or known.scope is not edit.scope or places[edit.id] < last:
                break
            kept.add(edit.id)
            last = places[edit.id]
        return bank(scoped[len(kept) :], self.bank, [one for one in before if one not in kept])

    def _takes(self, new: Sequence[Edit]) -> bool:
        """Whether further edits act beside all that do, and change nothing of them."""
        keys = [key for edit in new if (key := edit.prompt_key) is not None]
        plain = all(
            edit.enabled and not (edit.is_base_delta or edit.replaces or edit.requires or edit.id in self.replaced)
            for edit in new
        )
        return plain and len({*keys}) == len(keys) and not any(key in self.standing for key in keys)

    def _extended(
        self,
        edits: Sequence[Edit],
        new: Sequence[Edit],
        others: Callable[[Sequence[Edit]], list[Target]],
        bank: Callable[..., Any] | None,
    ) -> Snapshot:
        everywhere = [edit for edit in new if edit.scope is None]
        scoped = [edit for edit in new if edit.scope is not None]
        targets = [*self.targets, *others(new)]
        sums = dict(self.sums)
        if everywhere:
            for target in targets:
                pairs = [edit.updates[target.name] for edit in everywhere if target.name in edit.updates]
                sums[target.name] = self._sum_of(target).extended(pairs)
        now = replace(
            self,
            targets=targets,
            edits=list(edits),
            active=[*self.active, *new],
            standing=self.standing | {key: edit for edit in new if (key := edit.prompt_key) is not None},
            sums=sums,
        )
        if not scoped:
            return now
        made = bank(scoped, self.bank) if bank is not None else None
        return replace(
            now,
            scoped=self.scoped | {edit.id: edit for edit in scoped},
            scoped_layers=self.scoped_layers.union(*(edit.updates for edit in scoped)),
            bank=made,
        )

    def _sum_of(self, target: Target) -> LayerSum:
        return self.sums.get(target.name) or LayerSum(target.d_in, target.d_out)
