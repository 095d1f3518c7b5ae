"""Plots of runs as matplotlib figures, without pyplot: no global state, no display. None if a run lacks the data.

Colours are Okabe and Ito's, distinct under every kind of colour vision; lines and markers differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..losses.metrics import auc
from .run_reading import Run

UP, DOWN, SHIFT, ONE = "#0072B2", "#D55E00", "#000000", "#009E73"
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
FEWEST_ROWS = 12
"""From here on rewards are drawn as a histogram."""
MAX_POINTS = 4000
"""Dots in a scatter plot; correlations use all rows."""


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _words(text: str) -> str:
    """A name for matplotlib: without formulas, and without a leading underscore, which would hide it."""
    text = text if len(text) <= 40 else f"{text[:18]}…{text[-20:]}"
    return ("\u200a" if text.startswith("_") else "") + text.replace("$", r"\$")


def _lines(title: str, unit: str, lines: Sequence[tuple[tuple[list, list], dict]], level: float | None = None):
    """Lines over the steps, ((steps, values), style) each, and a grey horizontal one; None if all are empty."""
    figure, axes = _figure()
    if not any(steps for (steps, _), _ in lines):
        return None
    for (steps, values), style in lines:
        if steps:
            axes.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=3.5, linewidth=1.6, **style)
    if level is not None:
        axes.axhline(level, color="grey", linewidth=0.8)
    axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


_TRAINING = {"color": UP, "label": "training batches"}
_HELD_OUT = {"color": DOWN, "linestyle": "--", "label": "held out"}


def plot_loss(run: Run):
    lines = [(run.series("loss"), _TRAINING), (run.series("eval_loss"), _HELD_OUT)]
    return _lines("Loss", _loss_unit(run.loss_type), lines)


def _loss_unit(loss_type: str) -> str:
    return "nats per token" if loss_type in ("sft", "bnf") else f"loss of {_words(loss_type)}"


def plot_margins(run: Run):
    lines = [(run.series("rewards/margins"), _TRAINING), (run.series("eval_rewards/margins"), _HELD_OUT)]
    return _lines("Margin: thumbs up minus thumbs down", f"difference of mean rewards ({run.reward_unit})", lines, 0)


def plot_ranking(run: Run):
    lines = [
        (run.series("eval_rewards/auc"), {"color": DOWN, "linestyle": "--", "label": "AUC, held out"}),
        (run.series("eval_rewards/accuracies"), {"color": ONE, "linestyle": ":", "label": "accuracy, held out"}),
        (run.series("rewards/accuracies"), {"color": UP, "alpha": 0.8, "label": "accuracy, training batches"}),
    ]
    figure = _lines("Are thumbs up ranked above thumbs down? (0.5 = chance)", "share, 0 to 1", lines, 0.5)
    if figure is not None:
        figure.axes[0].set_ylim(-0.02, 1.02)
    return figure


def plot_shift(run: Run):
    lines = [
        (run.series("rewards/chosen"), {"color": UP, "label": "mean reward, thumbs up"}),
        (run.series("rewards/rejected"), {"color": DOWN, "linestyle": "-.", "label": "mean reward, thumbs down"}),
    ]
    shifted = any(run.series("delta")[1])  # 0 throughout: this objective has no δ
    if shifted:
        lines.append((run.series("delta"), {"color": SHIFT, "linestyle": "--", "label": "δ"}))
    title = f"Rewards of the training batches by class{', and δ' if shifted else ''}"
    return _lines(title, run.reward_unit, lines)


def plot_log_ratio(run: Run):
    """Mean log-ratio to the reference by class. Not a KL divergence: see docs/report.md."""
    scale = run.nats
    if scale is None:
        if run.record:
            run.left_out.append(f"{run.loss_type} has no reference model: no log-ratio plot.")
        return None
    z_ref = "z_ref of kto (other prompts' completions, ≥ 0)"
    lines = [
        (run.series("rewards/chosen", scale), {"color": UP, "label": "thumbs up"}),
        (run.series("rewards/rejected", scale), {"color": DOWN, "linestyle": "-.", "label": "thumbs down"}),
        (run.series("kl"), {"color": SHIFT, "linestyle": "--", "label": z_ref}),
    ]
    unit = "nats per token" if run.record.get("options", {}).get("length_normalized") else "nats per completion"
    return _lines("Log-ratio to the reference: log π − log π_ref", f"mean, {unit}", lines, 0)


def plot_error_term(run: Run):
    """BCO's Fig. 3: the gap between the binary cross-entropy and the DPO loss."""
    if run.nats is None:
        return None
    lines = [(run.series("error_term"), _TRAINING), (run.series("eval_error_term"), _HELD_OUT)]
    return _lines("Error term: E₊[exp(−(r − δ))] + E₋[exp(r − δ)]", "gap between BCE and DPO", lines)


def plot_divergence(run: Run):
    """BCO's Fig. 4a: −½ (mean log-ratio of thumbs up + that of thumbs down), which App. B takes for KL(π_ref ‖ π)."""
    if run.nats is None:
        return None
    lines = [(_divergence(run), _TRAINING), (_divergence(run, "eval_"), _HELD_OUT)]
    return _lines(DIVERGENCE, "nats per completion", lines, 0)


DIVERGENCE = "Estimate of KL(π_ref ‖ π) from the given completions"


def _divergence(run: Run, prefix: str = "") -> tuple[list, list]:  # steps, nats
    up, down = (
        dict(zip(*run.series(f"{prefix}rewards/{side}", -run.nats / 2), strict=True)) for side in ("chosen", "rejected")
    )
    steps = [step for step in up if step in down]
    return steps, [up[step] + down[step] for step in steps]


_WEIGHTS = ("bco", "bce", "kto", "una_binary_bce")


def plot_gradient(run: Run):
    """BCO's section 4.3: how much a held-out completion of each reward would pull, under BCO and under KTO."""
    if run.rows is None or run.loss_type not in _WEIGHTS:
        return None
    nats = run.nats or 1.0
    shift = (run.last("kl") or 0.0) / nats if run.loss_type == "kto" else run.last("eval_delta") or 0.0
    label, reward = run.rows["label"], run.rows["reward"]
    against = np.where(label, shift - reward, reward - shift)  # > 0: on the wrong side
    wrong = 1 / (1 + np.exp(-np.clip(against, -50, 50)))
    edges = np.unique(np.quantile(reward, np.linspace(0, 1, 13)))
    if len(edges) < 3:
        return None
    figure, axes = _figure()
    place = np.clip(np.searchsorted(edges, reward, side="right") - 1, 0, len(edges) - 2)
    centres = (edges[1:] + edges[:-1]) / 2
    for name, weight, line in (("bco, σ(−m)", wrong, "-"), ("kto, σ(m) σ(−m)", wrong * (1 - wrong), "--")):
        for mine, color, side, _, marker in _classes(run):
            bins = [k for k in range(len(centres)) if (mine & (place == k)).any()]
            means = [weight[mine & (place == k)].mean() for k in bins]
            axes.plot(centres[bins], means, line, color=color, marker=marker, markersize=4, label=f"{side}: {name}")
    axes.set(
        title="Weight of a completion in the gradient, by reward (held out)",
        xlabel=f"reward ({run.reward_unit}), twelfths of the rows; m = ±(reward − {shift:.3g})",
        ylabel="∣∂ loss / ∂ reward∣",
    )
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def _classes(run: Run) -> list[tuple]:
    """(mask, colour, name, hatch, marker) of each class that occurs among the held-out rows."""
    label = run.rows["label"]
    classes = [(label, UP, "thumbs up", None, "o"), (~label, DOWN, "thumbs down", "///", "x")]
    return [entry for entry in classes if entry[0].any()]


def _dots(run: Run, figure: Figure, axes: Axes):
    """Each held-out reward as a dot: of a few rows, a histogram would show nothing but its bins."""
    for height, (mine, color, name, _, marker) in enumerate(_classes(run)):
        values = run.rows["reward"][mine]
        axes.scatter(
            values, np.full(len(values), height), color=color, marker=marker, s=40, label=f"{name} ({mine.sum()})"
        )
    axes.set(
        title=f"Held-out rewards at step {run.rows_step}",
        xlabel=f"reward ({run.reward_unit})",
        yticks=[],
        ylim=(-1, 2.5),
    )
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def plot_histogram(run: Run):
    if run.rows is None:
        return None
    label, reward = run.rows["label"], run.rows["reward"]
    low, high = np.quantile(reward, [0.005, 0.995])
    room = max(0.5, 1e-6 * abs(low))
    low, high = (low, high) if high - low > 1e-9 * room else (low - room, low + room)
    edges = np.linspace(low, high, 31)
    figure, axes = _figure()
    if len(reward) < FEWEST_ROWS:
        return _dots(run, figure, axes)
    for mine, color, name, hatch, _ in _classes(run):
        values = np.clip(reward[mine], low, high)
        options = {"bins": edges, "weights": np.full(len(values), 1 / len(values)), "color": color}
        text = f"{name} ({mine.sum():,})"
        axes.hist(values, histtype="stepfilled", alpha=0.35, hatch=hatch, label=text, **options)
        axes.hist(values, histtype="step", linewidth=1.5, **options)
    shift = run.last("eval_delta")
    if shift:
        axes.axvline(shift, color=SHIFT, linestyle="--", linewidth=1.4, label=f"δ = {shift:.3g}")
    found = auc(torch.from_numpy(reward), torch.from_numpy(label))
    title = f"Held-out rewards at step {run.rows_step}" + ("" if math.isnan(found) else f", AUC {found:.3f}")
    axes.set(
        title=title, xlabel=f"reward ({run.reward_unit}; the ends hold what lies beyond)", ylabel="share of the class"
    )
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def plot_length(run: Run):
    if run.rows is None:
        return None
    reward, tokens = run.rows["reward"], run.rows["tokens"]
    figure, axes = _figure()
    stride = -(-len(reward) // MAX_POINTS)
    for mine, color, name, _, marker in _classes(run):
        points = tokens[mine][::stride], reward[mine][::stride]
        style = {"s": 14, "marker": marker, "alpha": 0.5, "color": color, "linewidths": 0.9}
        axes.scatter(*points, label=f"{name}, r = {_r(tokens[mine], reward[mine])}", **style)
    axes.set(
        title=f"Length against reward: r = {_r(tokens, reward)} (held out, step {run.rows_step})",
        xlabel="tokens of the completion",
        ylabel=f"reward ({run.reward_unit})",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8.5, title="Pearson's r by class", title_fontsize=8.5)
    return figure


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN for fewer than three values, or if either is constant."""
    if len(x) < 3 or not x.std() or not y.std():
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _r(x, y) -> str:
    value = correlation(x, y)
    return "n/a" if math.isnan(value) else f"{value:+.2f}"


PLOTS: dict[str, tuple[Callable, str]] = {
    "loss": (plot_loss, "loss over the steps"),
    "margins": (plot_margins, "margin over the steps"),
    "ranking": (plot_ranking, "accuracy and AUC over the steps"),
    "delta": (plot_shift, "rewards by class and delta over the steps"),
    "rewards": (plot_histogram, "histogram of held-out rewards by class"),
    "log_ratio": (plot_log_ratio, "log-ratio to the reference by class over the steps"),
    "error_term": (plot_error_term, "error term over the steps"),
    "divergence": (plot_divergence, "estimate of the KL divergence over the steps"),
    "gradient": (plot_gradient, "weight in the gradient by reward, under bco and kto"),
    "length": (plot_length, "length of held-out completions against their reward"),
}


def compare(runs: Sequence[Run]) -> dict[str, tuple]:
    """Plots of several runs in one figure: name -> (figure, its description). Only quantities of one unit are compared."""
    held_out = [run.series("eval_rewards/auc") for run in runs]
    auc = _compared(runs, held_out, "AUC of the held-out rewards", "AUC (0.5 = chance)")
    figures = {"auc": (auc, "AUC of the runs")}
    if all(run.loss_type in ("bco", "bce") for run in runs):
        terms = [run.series("error_term") for run in runs]
        error = _compared(runs, terms, "Error term of the training batches", "gap between BCE and DPO")
        figures["error_term"] = error, "error terms of the runs"
    referenced = [run for run in runs if run.nats is not None]
    if referenced:
        key, of = _held_out_or_training(referenced, "rewards/margins")
        title, unit = f"Margin of {of}, as log-ratio", "nats per completion"
        margins = [run.series(key, run.nats) for run in referenced]
        figures["margins"] = _compared(referenced, margins, title, unit), "margins of the runs"
        divergences = [_divergence(run) for run in referenced]
        figures["divergence"] = (
            _compared(referenced, divergences, DIVERGENCE, unit),
            "estimates of the runs' KL divergence",
        )
    if len({run.loss_type for run in runs}) == 1:
        key, of = _held_out_or_training(runs, "loss")
        losses = [run.series(key) for run in runs]
        figures["loss"] = _compared(runs, losses, f"Loss of {of}", _loss_unit(runs[0].loss_type)), "losses of the runs"
    return {name: pair for name, pair in figures.items() if pair[0] is not None}


def _held_out_or_training(runs: Sequence[Run], key: str) -> tuple[str, str]:
    """The held-out metric, and in words what it is of; that of the training batches where a run was evaluated once at most."""
    if all(len(run.series(f"eval_{key}")[0]) > 1 for run in runs):
        return f"eval_{key}", "the held-out rows"
    return key, "the training batches"


def _compared(runs: Sequence[Run], series: Sequence[tuple[list, list]], title: str, unit: str):
    lines = []
    for i, (run, values) in enumerate(zip(runs, series, strict=True)):
        style = {"color": RUNS[i % len(RUNS)], "linestyle": STYLES[(i // len(RUNS) + i) % len(STYLES)]}
        lines.append((values, style | {"label": _words(run.name)}))
    return _lines(title, unit, lines)
