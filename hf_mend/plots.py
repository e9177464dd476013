"""The pictures of a model card, drawn where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path


CURVE_NAME = "training.png"
METRICS_NAME = "metrics.png"
_SHARES = {
    "edit_success": "edit success",
    "generality": "generality",
    "neighborhood": "neighborhood",
    "unrelated": "unrelated",
}


def can_draw() -> bool:
    """Whether matplotlib is installed: `pip install hf_mend[plots]`."""
    return util.find_spec("matplotlib") is not None


def draw_training(path: str | Path, history: Sequence[Mapping[str, float]]) -> bool:
    """
    Draws the loss, and what was measured meanwhile, over the training steps.

    Args:
        path (`str` or `Path`): The PNG file.
        history (`Sequence[Mapping[str, float]]`): The trainer's log.

    Returns:
        `bool`: Whether there was something to draw.
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
        for name, label in _SHARES.items():
            points = [(row["step"], row[f"eval_{name}"]) for row in scored if f"eval_{name}" in row]
            if points:
                right.plot(*zip(*points, strict=True), marker="o", label=label)
        right.legend(loc="center right", fontsize="small")
    figure.savefig(path, dpi=110)
    return True


def draw_metrics(path: str | Path, measured: Mapping[str, Mapping[str, float]]) -> None:
    """
    Draws the shares that were measured as bars, a group of bars a metric, a colour a group of facts.

    Args:
        path (`str` or `Path`): The PNG file.
        measured (`Mapping[str, Mapping[str, float]]`): Title of a group of facts -> metrics.
    """
    from matplotlib.figure import Figure

    names = [name for name in _SHARES if any(name in metrics for metrics in measured.values())]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(measured)
    for number, (title, metrics) in enumerate(measured.items()):
        places = [i + (number - (len(measured) - 1) / 2) * width for i in range(len(names))]
        bars = axes.bar(places, [metrics.get(name, 0.0) for name in names], width, label=title)
        axes.bar_label(bars, fmt="%.2f", fontsize="x-small")
    axes.set_xticks(range(len(names)), [_SHARES[name] for name in names])
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(loc="upper center", ncols=min(3, len(measured)), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
