"""What figures in the wild come to: means, a table of the scope's decisions, and the trade-off of its strictness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..hub.cards import table


Values = Mapping[str, Any]

# What a scope can do at a text's end.
RIGHT, MISSED, WRONG, FIRED = "right edit", "missed", "wrong edit", "fired"


def wild_means(measured: Sequence[Values]) -> dict[str, float]:
    """
    Return the means over the edits, and `repeats`: the share of all right answers that say the target three times or
    more.

    Args:
        measured (`Sequence[Values]`): Of each record, what
            [`~hf_mend.evaluation.wild.measure_in_the_wild`] returned.
    """
    means: dict[str, float] = {"edits": float(len(measured))}
    names = dict.fromkeys(name for values in measured for name in values)
    for name in names:
        if not name.endswith((": answer", ": own", ": other")):
            found = [values[name] for values in measured if name in values]
            means[name] = sum(found) / len(found)
    right = [values[f"{kind}: repeats"] for values in measured for kind in _said(values) if values[kind]]
    return {**means, "repeats": sum(right) / max(1, len(right))}


def _said(values: Values) -> list[str]:
    return [name.removesuffix(": answer") for name in values if name.endswith(": answer")]


def _decided(measured: Sequence[Values]) -> dict[str, list[tuple[float, float, bool]]]:
    """Return, of each form or kind, the margins of each text, own and other, and whether it should say the target."""
    found: dict[str, list[tuple[float, float, bool]]] = {}
    for values in measured:
        said = set(_said(values))
        for name in values:
            kind = name.removesuffix(": own")
            if kind != name and values[name] is not None:
                other = values[f"{kind}: other"]
                found.setdefault(kind, []).append((values[name], -2.0 if other is None else other, kind in said))
    return found


def _shares(texts: Iterable[tuple[float, float, bool]], strictness: float) -> dict[str, float]:
    """Return the share of texts at whose end the scope does this or that."""
    counts: dict[str, int] = {}
    for own, other, said in texts:
        if max(own, other) < strictness:
            what = MISSED if said else ""
        else:
            what = FIRED if not said else RIGHT if own >= other else WRONG
        counts[what] = counts.get(what, 0) + 1
    total = sum(counts.values())
    return {what: counts.get(what, 0) / total for what in (RIGHT, MISSED, WRONG, FIRED)}


def confusion(measured: Sequence[Values], strictness: float = 0.0) -> dict[str, dict[str, float]]:
    """
    Return what the scope decides at the end of each form's texts: of what should say a target, the shares of the right
    edit, of none ("missed") and of the wrong edit; of what must stay, the share at which an edit acts ("fired"). Empty
    for edits without a scope.

    Args:
        measured (`Sequence[Values]`): As for [`wild_means`].
        strictness (`float`, defaults to 0.0): What is added to every threshold.
    """
    table: dict[str, dict[str, float]] = {}
    for kind, texts in _decided(measured).items():
        names = (RIGHT, MISSED, WRONG) if texts[0][2] else (FIRED,)
        shares = _shares(texts, strictness)
        table[kind] = {name: shares[name] for name in names}
    return table


def strictness_curve(measured: Sequence[Values], strictness: Sequence[float]) -> list[dict[str, float]]:
    """
    Return the trade-off of the scope's strictness, from scores alone: of each value, `strictness`, the share of texts
    of each form at which the right edit acts, of each kind of what must stay at which one acts, and over all of them
    `recall`, `wrong edit` and `fired`.

    Args:
        measured (`Sequence[Values]`): As for [`wild_means`].
        strictness (`Sequence[float]`): The values.
    """
    decided = _decided(measured)
    curve = []
    for value in strictness if decided else ():
        point = {"strictness": value}
        for kind, texts in decided.items():
            point[kind] = _shares(texts, value)[RIGHT if texts[0][2] else FIRED]
        said = [text for texts in decided.values() for text in texts if text[2]]
        stays = [text for texts in decided.values() for text in texts if not text[2]]
        over_all = _shares(said, value) if said else {}
        point |= {"recall": over_all.get(RIGHT, 0.0), "wrong edit": over_all.get(WRONG, 0.0)}
        curve.append(point | {"fired": _shares(stays, value)[FIRED] if stays else 0.0})
    return curve


def figures_table(groups: Mapping[str, Mapping[str, float]]) -> str:
    """Return groups of figures as a Markdown table, a line a figure and a column a group."""
    names = dict.fromkeys(name for group in groups.values() for name in group)
    rows = [[name, *(f"{group[name]:.3f}" if name in group else "" for group in groups.values())] for name in names]
    return table(("", *groups), rows)
