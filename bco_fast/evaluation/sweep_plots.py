"""Plots of a sweep: a held-out figure over one option, a line for each combination of the others, intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .plots import RUNS, STYLES

FIGURES = {"auc": "AUC", "margin": "margin, reward units", "margin_nats": "margin, nats"}
"""Of held-out rows, beside one loss for each objective."""
MARKERS = "osD^vPX"


def draw(settings: Sequence[Mapping]) -> dict[str, Figure]:
    """Figures by file name: auc, margin_nats, and the loss if all settings have the same objective."""
    names = {name for setting in settings for name in setting["mean"]}
    losses = [name for name in names if name.startswith("loss of ")]
    wanted = {"auc": "auc", "margin_nats": "margin_nats"} | ({"loss": losses[0]} if len(losses) == 1 else {})
    return {file: _draw(settings, name) for file, name in wanted.items() if name in names}


def _draw(settings: Sequence[Mapping], name: str) -> Figure:
    axis, places, scale = _axis(settings)
    figure = Figure(figsize=(6.2, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    lines: dict[str, list[Mapping]] = {}
    for setting in settings:
        if name in setting["mean"]:
            others = ", ".join(f"{key} {value}" for key, value in setting["options"].items() if key != axis)
            lines.setdefault(others, []).append(setting)
    for i, (label, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda setting: places[setting["options"].get(axis, "")])
        x = [places[setting["options"].get(axis, "")] for setting in line]
        style = {
            "color": RUNS[i % len(RUNS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": STYLES[i % len(STYLES)],
        }
        halves = [setting["half"][name] or 0.0 for setting in line]
        axes.errorbar(x, [s["mean"][name] for s in line], halves, capsize=3, markersize=5, label=label or None, **style)
        for place, setting in zip(x, line, strict=True):
            values = setting["values"][name]
            axes.plot([place] * len(values), values, ".", color=style["color"], alpha=0.35, markersize=5)
    axes.set_xscale(scale)
    axes.set_xticks(list(places.values()), list(places), minor=False)
    axes.minorticks_off()
    if name == "auc":
        axes.axhline(0.5, color="grey", linewidth=0.8)
    title = FIGURES.get(name, name)
    axes.set(title=f"Held-out {title}: mean and 95 % interval over seeds", xlabel=axis or "all runs", ylabel=title)
    if any(lines):
        axes.legend(frameon=False, fontsize=8)
    return figure


def _axis(settings: Sequence[Mapping]) -> tuple[str, dict[str, float], str]:
    """The option with the most values, where each of them lies, and the scale of the axis."""
    values: dict[str, dict[str, None]] = {}
    for setting in settings:
        for name, value in setting["options"].items():
            values.setdefault(name, {})[value] = None
    if not values:
        return "", {"": 0.0}, "linear"
    axis = max(values, key=lambda name: len(values[name]))
    numbers = [_number(value) for value in values[axis]]
    if None in numbers:
        return axis, {value: float(i) for i, value in enumerate(values[axis])}, "linear"
    spread = min(numbers) > 0 and max(numbers) / min(numbers) >= 4
    return axis, dict(zip(values[axis], numbers, strict=True)), "log" if spread else "linear"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
