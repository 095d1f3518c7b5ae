"""Plots of runs as matplotlib figures, without pyplot: no global state, no display. None where a run has not what it takes.

Colours are Okabe and Ito's, told apart by every kind of colour vision; lines and markers differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run_reading import Run

UP, DOWN, SHIFT, ONE = "#0072B2", "#D55E00", "#000000", "#009E73"
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MAX_POINTS = 4000
"""Dots in a scatter plot; correlations are of all rows."""


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _words(text: str) -> str:
    """A name as matplotlib shall print it: no formulas, and no leading underscore, which would hide it."""
    text = text if len(text) <= 40 else f"{text[:18]}…{text[-20:]}"
    return ("\u200a" if text.startswith("_") else "") + text.replace("$", r"\$")


def _line(axes, steps, values, **style) -> bool:
    if steps:
        axes.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=3.5, linewidth=1.6, **style)
    return bool(steps)


def _steps(axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8.5)


def plot_loss(run: Run):
    figure, axes = _figure()
    drawn = [
        _line(axes, *run.series("loss"), color=UP, label="training batches"),
        _line(axes, *run.series("eval_loss"), color=DOWN, linestyle="--", label="held out"),
    ]
    if not any(drawn):
        return None
    _steps(axes, "Loss", _loss_unit(run.loss_type))
    return figure


def _loss_unit(loss_type: str) -> str:
    return {"sft": "nats per token", "bnf": "nats per token"}.get(loss_type, f"loss of {_words(loss_type)}")


def plot_margins(run: Run):
    figure, axes = _figure()
    drawn = [
        _line(axes, *run.series("rewards/margins"), color=UP, label="training batches"),
        _line(axes, *run.series("eval_rewards/margins"), color=DOWN, linestyle="--", label="held out"),
    ]
    if not any(drawn):
        return None
    axes.axhline(0, color="grey", linewidth=0.8)
    _steps(axes, "Margin: thumbs up minus thumbs down", f"difference of mean rewards ({run.reward_unit})")
    return figure


def plot_ranking(run: Run):
    figure, axes = _figure()
    drawn = [
        _line(axes, *run.series("eval_rewards/auc"), color=DOWN, linestyle="--", label="AUC, held out"),
        _line(axes, *run.series("eval_rewards/accuracies"), color=ONE, linestyle=":", label="accuracy, held out"),
        _line(axes, *run.series("rewards/accuracies"), color=UP, alpha=0.8, label="accuracy, training batches"),
    ]
    if not any(drawn):
        return None
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set_ylim(-0.02, 1.02)
    _steps(axes, "Are thumbs up ranked above thumbs down? (0.5 = chance)", "share, 0 to 1")
    return figure


def plot_shift(run: Run):
    figure, axes = _figure()
    drawn = [
        _line(axes, *run.series("rewards/chosen"), color=UP, label="mean reward, thumbs up"),
        _line(axes, *run.series("rewards/rejected"), color=DOWN, linestyle="-.", label="mean reward, thumbs down"),
    ]
    if not any(drawn):
        return None
    shifted = any(run.series("delta")[1])  # 0 throughout: this objective has no δ
    if shifted:
        _line(axes, *run.series("delta"), color=SHIFT, linestyle="--", label="δ")
    _steps(axes, f"Rewards of the training batches by class{', and δ' if shifted else ''}", run.reward_unit)
    return figure


def plot_log_ratio(run: Run):
    """Mean log-ratio to the reference by class. Not a KL divergence: see docs/report.md."""
    scale = run.nats
    if scale is None:
        if run.record:
            run.left_out.append(f"{run.loss_type} has no reference model: no log-ratio plot.")
        return None
    figure, axes = _figure()
    drawn = [
        _line(axes, *run.series("rewards/chosen", scale), color=UP, label="thumbs up"),
        _line(axes, *run.series("rewards/rejected", scale), color=DOWN, linestyle="-.", label="thumbs down"),
        _line(
            axes, *run.series("kl"), color=SHIFT, linestyle="--", label="z_ref of kto (other prompts' completions, ≥ 0)"
        ),
    ]
    if not any(drawn):
        return None
    axes.axhline(0, color="grey", linewidth=0.8)
    unit = "nats per token" if run.record.get("options", {}).get("length_normalized") else "nats per completion"
    _steps(axes, "Log-ratio to the reference: log π − log π_ref", f"mean, {unit}")
    return figure


def plot_histogram(run: Run):
    if run.rows is None:
        return None
    label, reward = run.rows["label"], run.rows["reward"]
    low, high = np.quantile(reward, [0.005, 0.995])
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    edges = np.linspace(low, high, 31)
    figure, axes = _figure()
    for mine, color, name, hatch in ((label, UP, "thumbs up", None), (~label, DOWN, "thumbs down", "///")):
        if mine.any():
            values = np.clip(reward[mine], low, high)
            weights = np.full(len(values), 1 / len(values))
            style = {"color": color, "label": f"{name} ({mine.sum():,})"}
            axes.hist(values, edges, weights=weights, histtype="stepfilled", alpha=0.35, hatch=hatch, **style)
            axes.hist(values, edges, weights=weights, histtype="step", linewidth=1.5, color=color)
    shift = run.last("eval_delta")
    if shift:
        axes.axvline(shift, color=SHIFT, linestyle="--", linewidth=1.4, label=f"δ = {shift:.3g}")
    found = auc(reward, label)
    title = f"Held-out rewards at step {run.rows_step}" + ("" if math.isnan(found) else f", AUC {found:.3f}")
    axes.set(
        title=title, xlabel=f"reward ({run.reward_unit}; the ends hold what lies beyond)", ylabel="share of the class"
    )
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def plot_length(run: Run):
    if run.rows is None:
        return None
    label, reward, tokens = run.rows["label"], run.rows["reward"], run.rows["tokens"]
    figure, axes = _figure()
    stride = -(-len(reward) // MAX_POINTS)
    for mine, color, name, marker in ((label, UP, "thumbs up", "o"), (~label, DOWN, "thumbs down", "x")):
        if mine.any():
            text = f"{name}, r = {_r(tokens[mine], reward[mine])}"
            axes.scatter(tokens[mine][::stride], reward[mine][::stride], s=14, marker=marker, alpha=0.5, color=color, linewidths=0.9, label=text)  # fmt: skip
    axes.set(
        title=f"Length against reward: r = {_r(tokens, reward)} (held out, step {run.rows_step})",
        xlabel="tokens of the completion",
        ylabel=f"reward ({run.reward_unit})",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8.5, title="Pearson's r by class", title_fontsize=8.5)
    return figure


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN for fewer than three values, or if one of the two does not vary."""
    if len(x) < 3 or not x.std() or not y.std():
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _r(x, y) -> str:
    value = correlation(x, y)
    return "n/a" if math.isnan(value) else f"{value:+.2f}"


def auc(reward: np.ndarray, label: np.ndarray) -> float:
    """Probability that a thumbs up has the higher reward, ties counted half; NaN with one class. As `metrics.auc`."""
    up, down = np.sort(reward[label]), reward[~label]
    if not len(up) or not len(down):
        return math.nan
    above = 2 * len(up) - np.searchsorted(up, down, "left") - np.searchsorted(up, down, "right")
    return float(above.sum() / (2 * len(up) * len(down)))


PLOTS: dict[str, tuple[Callable, str]] = {
    "loss": (plot_loss, "loss over the steps"),
    "margins": (plot_margins, "margin over the steps"),
    "ranking": (plot_ranking, "accuracy and AUC over the steps"),
    "delta": (plot_shift, "rewards by class and delta over the steps"),
    "rewards": (plot_histogram, "histogram of held-out rewards by class"),
    "log_ratio": (plot_log_ratio, "log-ratio to the reference by class over the steps"),
    "length": (plot_length, "length of held-out completions against their reward"),
}


def compare(runs: Sequence[Run]) -> dict[str, tuple]:
    """Plots of several runs over one another: name -> (figure, what it shows). Only what has one unit is compared."""
    figures = {
        "auc": (
            _compared(runs, "eval_rewards/auc", "AUC of the held-out rewards", "AUC (0.5 = chance)"),
            "AUC of the runs",
        )
    }
    scales = [run.nats for run in runs]
    if None not in scales:
        title, unit = "Margin of the training batches, as log-ratio", "nats per completion"
        figures["margins"] = _compared(runs, "rewards/margins", title, unit, scales), "margins of the runs"
    if len({run.loss_type for run in runs}) == 1:
        figures["loss"] = (
            _compared(runs, "loss", "Loss of the training batches", _loss_unit(runs[0].loss_type)), "losses of the runs"
        )  # fmt: skip
    return {name: pair for name, pair in figures.items() if pair[0] is not None}


def _compared(runs: Sequence[Run], key: str, title: str, unit: str, scales: Sequence[float] | None = None):
    figure, axes = _figure()
    drawn = []
    for i, run in enumerate(runs):
        steps, values = run.series(key, scales[i] if scales else 1.0)
        style = {"color": RUNS[i % len(RUNS)], "linestyle": STYLES[(i // len(RUNS) + i) % len(STYLES)]}
        drawn.append(_line(axes, steps, values, label=_words(run.name), **style))
    if not any(drawn):
        return None
    _steps(axes, title, unit)
    return figure
