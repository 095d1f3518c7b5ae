"""One sentence under each plot of a report that says what it shows. None where the numbers say nothing yet."""

from __future__ import annotations

import math

import numpy as np

from .plots import correlation
from .run_reading import Run

SAME = 0.05
"""Relative changes up to this are none."""
LONGER = 0.3
"""Correlations from here on are worth a warning."""


def _ends(run: Run, key: str) -> tuple[float, float] | None:
    values = run.series(key)[1]
    return (values[0], values[-1]) if len(values) > 1 else None


def _moved(first: float, last: float) -> str:
    if abs(last - first) <= SAME * max(abs(first), abs(last)):
        return f"stayed near {last:.3g}"
    return f"{'rose' if last > first else 'fell'} from {first:.3g} to {last:.3g}"


def read_loss(run: Run) -> str | None:
    steps, values = run.series("eval_loss")
    if len(values) < 2:
        ends = _ends(run, "loss")
        return None if ends is None else f"The training loss {_moved(*ends)}."
    best = int(np.argmin(values))
    if values[-1] > values[best] + SAME * abs(values[best]):
        return (
            f"Held-out loss was lowest at step {steps[best]} ({values[best]:.3g}) and is {values[-1]:.3g} now: "
            "what came after memorizes."
        )
    return f"Held-out loss {_moved(values[0], values[-1])}."


def read_margins(run: Run) -> str | None:
    training, held_out = run.last("rewards/margins"), run.last("eval_rewards/margins")
    if training is None or held_out is None:
        return None
    if held_out <= 0:
        return "On held-out rows, thumbs up have no higher reward than thumbs down."
    if training <= 0:
        return None
    share = held_out / training
    tail = "the rest is memorized" if share < 0.5 else "it carries over"
    return f"The held-out margin is {share:.2g} of that of the training batches: {tail}."


def read_ranking(run: Run) -> str | None:
    found = run.last("eval_rewards/auc")
    if (bounds := run.auc_bounds(found)) is None:
        return None
    (low, high), counts = bounds, run.record["data"]["held_out"]
    up, down = counts["up"], counts["down"]
    verdict = " That includes chance." if low <= 0.5 <= high else ""
    return (
        f"Held-out AUC {found:.3f} (95 % interval {low:.3f} to {high:.3f}, {up:,.0f} up and {down:,.0f} down).{verdict}"
    )


def read_shift(run: Run) -> str | None:
    up, down, delta = (run.last(key) for key in ("rewards/chosen", "rewards/rejected", "delta"))
    if None in (up, down, delta) or not delta:
        return None
    inside = min(up, down) <= delta <= max(up, down)
    return f"δ = {delta:.3g} lies {'between' if inside else 'outside'} the two classes' mean rewards."


def read_histogram(run: Run) -> str | None:
    up, down = run.rows["reward"][run.rows["label"]], run.rows["reward"][~run.rows["label"]]
    if not len(up) or not len(down):
        return "All held-out rows are of one class."
    shift = run.last("eval_delta") or 0.0
    return (
        f"{(up > shift).mean():.0%} of thumbs up lie above {'δ' if shift else '0'}, and {(down < shift).mean():.0%} of thumbs "
        "down below."
    )


def read_log_ratio(run: Run) -> str | None:
    scale = run.nats
    up, down = run.last("rewards/chosen"), run.last("rewards/rejected")
    if scale is None or up is None or down is None:
        return None
    up, down = up * scale, down * scale
    if up < 0 and down < 0:
        return f"Both classes have become less likely than under the reference ({up:.3g} and {down:.3g} nats)."
    return f"Against the reference, thumbs up moved by {up:+.3g} nats and thumbs down by {down:+.3g}."


def read_length(run: Run) -> str | None:
    r = correlation(run.rows["tokens"], run.rows["reward"])
    if math.isnan(r):
        return None
    if abs(r) < LONGER:
        return f"Length hardly correlates with the reward ({r:+.2f})."
    return f"Length correlates {r:+.2f} with the reward: {'long' if r > 0 else 'short'} completions are favoured."


READINGS = {
    "loss": read_loss,
    "margins": read_margins,
    "ranking": read_ranking,
    "delta": read_shift,
    "rewards": read_histogram,
    "log_ratio": read_log_ratio,
    "length": read_length,
}
