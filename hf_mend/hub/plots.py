"""The pictures of a model card and of a comparison, drawn where matplotlib is installed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any


CURVE_NAME = "training.png"
METRICS_NAME = "metrics.png"
STRICTNESS_NAME = "strictness.png"
# The metrics that are shares and their titles.
SHARES = {
    "edit_success": "edit success",
    "generality": "generality",
    "neighborhood": "neighborhood",
    "unrelated": "unrelated",
}
# How the names of what must stay in the wild begin; the others are forms of asking.
STAYS = ("another question", "another subject", "before it asks", "neighbours", "same subject", "unrelated")


def can_draw() -> bool:
    """Return whether matplotlib is installed: `pip install hf_mend[plots]`."""
    return util.find_spec("matplotlib") is not None


def draw_training(path: str | Path, history: Sequence[Mapping[str, float]]) -> bool:
    """
    Draw the loss and the evaluation metrics over the training steps.

    Args:
        path (`str` or `Path`): The PNG file.
        history (`Sequence[Mapping[str, float]]`): The trainer's log.

    Returns:
        `bool`: Whether there was anything to draw.
    """
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    if len(losses) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    left.plot(*zip(*losses, strict=True), color="tab:gray", label="loss")
    left.set(xlabel="step", ylabel="loss")
    scored = [row for row in history if "eval_edit_success" in row]
    if scored:
        right = left.twinx()
        right.set(ylabel="measured", ylim=(0, 1.02))
        for name, label in SHARES.items():
            points = [(row["step"], row[f"eval_{name}"]) for row in scored if f"eval_{name}" in row]
            if points:
                right.plot(*zip(*points, strict=True), marker="o", label=label)
        right.legend(loc="center right", fontsize="small")
    figure.savefig(path, dpi=110)
    return True


def draw_metrics(path: str | Path, measured: Mapping[str, Mapping[str, float]]) -> None:
    """
    Draw the measured shares as bars, with a group of bars per metric and a colour per group of facts.

    Args:
        path (`str` or `Path`): The PNG file.
        measured (`Mapping[str, Mapping[str, float]]`): Title of a group of facts -> metrics.
    """
    from matplotlib.figure import Figure

    names = [name for name in SHARES if any(name in metrics for metrics in measured.values())]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(measured)
    for number, (title, metrics) in enumerate(measured.items()):
        places = [i + (number - (len(measured) - 1) / 2) * width for i in range(len(names))]
        bars = axes.bar(places, [metrics.get(name, 0.0) for name in names], width, label=title)
        axes.bar_label(bars, fmt="%.2f", fontsize="x-small")
    axes.set_xticks(range(len(names)), [SHARES[name] for name in names])
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(loc="upper center", ncols=min(3, len(measured)), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def draw_strictness(path: str | Path, curve: Sequence[Mapping[str, float]]) -> None:
    """
    Draw how often the right edit acts, by form of asking, against how often one acts where none should.

    Args:
        path (`str` or `Path`): The PNG file.
        curve (`Sequence[Mapping[str, float]]`): Points of
            [`~hf_mend.evaluation.wild_figures.strictness_curve`].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    over_all = ("strictness", "wrong edit", "fired")
    forms = [name for name in curve[0] if name not in over_all and not name.startswith(STAYS)]
    for name, color in zip(forms, itertools.cycle(series_colors()), strict=False):
        style = {"linewidth": 2.5, "color": "black"} if name == "recall" else {"color": color}
        axes.plot([point["fired"] for point in curve], [point[name] for point in curve], "o-", label=name, **style)
    for point in curve[:: max(1, len(curve) // 6)]:
        place = (point["fired"], point["recall"])
        axes.annotate(f"{point['strictness']:+g}", place, xytext=(4, -10), textcoords="offset points", fontsize=7)
    axes.set(xlabel="an edit acts where none should", ylabel="the right edit acts", ylim=(-0.02, 1.05))
    _finish(axes)
    figure.savefig(path, dpi=110)


def draw_comparison(folder: str | Path, results: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """
    Draw the results of an evaluation of several editors and methods.

    Args:
        folder (`str` or `Path`): The folder for the PNG files.
        results (`Sequence[Mapping[str, Any]]`): Results as [`~hf_mend.evaluation.reports.as_result`] returns
            them.

    Returns:
        `dict[str, Path]`: Title -> file of each plot that was drawn.
    """
    from matplotlib.figure import Figure

    drawn = {}
    for name, (title, draw) in _COMPARISONS.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        if draw(figure, results):
            drawn[title] = Path(folder) / f"{name}.png"
            figure.savefig(drawn[title], dpi=110)
    return drawn


def _success_against_locality(figure: Any, results: Sequence[Mapping[str, Any]]) -> bool:
    axes = figure.subplots()
    for result, color in _colored(results):
        points = [
            (locality, state["metrics"]["edit_success"], state["edits"])
            for state in result["states"]
            if (locality := _locality(state["metrics"])) is not None
        ]
        if points:
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=color, label=_label(result))
        for x, y, edits in points:
            axes.annotate(str(edits), (x, y), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    if not axes.lines:
        return False
    axes.set(xlabel="locality", ylabel="edit success", xlim=(-0.02, 1.05), ylim=(-0.02, 1.05))
    _finish(axes)
    return True


def _success_against_edits(figure: Any, results: Sequence[Mapping[str, Any]]) -> bool:
    axes = figure.subplots()
    for result, color in _colored(results):
        states = sorted(result["states"], key=lambda state: state["edits"])
        values = [state["metrics"]["edit_success"] for state in states]
        between = [
            state["intervals"].get("edit_success", (value, value)) for state, value in zip(states, values, strict=True)
        ]
        # A percentile interval need not contain the mean itself.
        low = [max(0.0, value - pair[0]) for value, pair in zip(values, between, strict=True)]
        high = [max(0.0, pair[1] - value) for value, pair in zip(values, between, strict=True)]
        counts = [state["edits"] for state in states]
        axes.errorbar(counts, values, yerr=(low, high), fmt="o-", capsize=3, color=color, label=_label(result))
    counts = sorted({state["edits"] for result in results for state in result["states"]})
    axes.set(xlabel="edits kept at once", ylabel="edit success", xscale="log", ylim=(-0.02, 1.05))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    _finish(axes)
    return True


def _time_and_memory(figure: Any, results: Sequence[Mapping[str, Any]]) -> bool:
    left, right = figure.subplots(1, 2)
    names = [_label(result) for result in results]
    colors = [color for _, color in _colored(results)]
    seconds = [max(state["seconds_an_edit"] for state in result["states"]) for result in results]
    memory = [max((state["peak_memory"] or 0) / 1e6 for state in result["states"]) for result in results]
    left.barh(names, seconds, color=colors)
    left.set(xlabel="seconds an edit (slowest state)")
    right.barh(names, memory, color=colors)
    right.set(xlabel="peak memory, MB", yticks=[])
    for axes in (left, right):
        axes.invert_yaxis()
    return True


_COMPARISONS: dict[str, tuple[str, Callable[[Any, Sequence[Mapping[str, Any]]], bool]]] = {
    "success_locality": ("Success against locality; the numbers are edits kept at once", _success_against_locality),
    "success_edits": ("Success against the number of edits", _success_against_edits),
    "costs": ("Time and memory", _time_and_memory),
}


def _locality(metrics: Mapping[str, float]) -> float | None:
    values = [metrics[name] for name in ("neighborhood", "unrelated") if name in metrics]
    return sum(values) / len(values) if values else None


def series_colors() -> list[Any]:
    """Return twenty colours: ten strong ones, then their light shades."""
    from matplotlib import colormaps

    shades = colormaps["tab20"].colors  # type: ignore[attr-defined]  # strong and light alternate
    return [*shades[::2], *shades[1::2]]


def _colored(results: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Any]]:
    """Return each result with a colour; the colours repeat after twenty results."""
    return list(zip(results, itertools.cycle(series_colors()), strict=False))


def _label(result: Mapping[str, Any]) -> str:
    """Return a result's name escaped for matplotlib: no formulas, and no leading underscore, which would hide it."""
    name = str(result["name"])
    name = name if len(name) <= 40 else f"...{name[-37:]}"
    return name.replace("$", "\\$").lstrip("_") or "editor"


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
