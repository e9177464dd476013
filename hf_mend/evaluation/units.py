"""What is edited and counted as one: a fact, or a group of facts that belong together."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from transformers.utils import logging

from ..data.records import EditRecord
from ..edits.edit import same_prompt
from .checks import record_name


logger = logging.get_logger(__name__)


def shuffled_units(records: Sequence[EditRecord], seed: int) -> list[list[int]]:
    """The numbers of the records, those of one group together, in an order that depends on the seed alone."""
    units: list[list[int]] = []
    last = None
    for i, record in enumerate(records):
        if record.group is not None and record.group == last:
            units[-1].append(i)
        else:
            units.append([i])
        last = record.group
    random.Random(seed).shuffle(units)
    return units


def without_conflicts(units: Sequence[list[int]], records: Sequence[EditRecord]) -> list[list[int]]:
    """Those of which no record wants another target than an earlier one's of the same prompt: a model says one."""
    wanted: dict[Any, list[str]] = {}
    kept = []
    for unit in units:
        pairs = [(same_prompt(records[i].prompt, chat=False), records[i].target.split()) for i in unit]
        if all(wanted.get(prompt, target) == target for prompt, target in pairs):
            wanted.update(pairs)
            kept.append(unit)
    if len(kept) < len(units):
        logger.warning(f"{len(units) - len(kept)} facts that want another target of a prompt are not kept together")
    return kept


def check_groups(records: Sequence[EditRecord], units: Iterable[Sequence[int]]) -> None:
    """
    Args:
        records (`Sequence[EditRecord]`): The data set.
        units (`Iterable[Sequence[int]]`): The numbers of the records that are edited together.

    Raises:
        ValueError: Two records of a group want different targets of one prompt, which no model can say.
    """
    for unit in units:
        first_of: dict[tuple[str, bool], int] = {}
        for number in unit if len(unit) > 1 else ():
            record = records[number]
            first = first_of.setdefault(same_prompt(record.prompt, chat=False), number)
            if records[first].target.split() != record.target.split():
                raise ValueError(
                    f"{record_name(records, first)} and {record_name(records, number)} of the group "
                    f"{record.group!r} want two answers to one prompt, {record.prompt[:60]!r}: "
                    f"{records[first].target[:60]!r} and {record.target[:60]!r}; leave one of them out"
                )
