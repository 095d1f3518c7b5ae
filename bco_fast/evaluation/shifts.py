"""What alignment did to the tokens: shifts of log-likelihood and logits between policy and reference, and their Gini
coefficient (BNF, arXiv 2410.04834, Fig. 3).

For each completion token, policy minus reference of

    logp         log p(token), nats
    logit        the token's own logit
    mean_logit   the mean of the logits over the vocabulary; it moves no probability, so training is free to let it drift

A Gini coefficient of |shift| near 1 says that few tokens took most of the change, near 0 that all took an equal part.

This is the one place of bco_fast where logits are materialised, because their mean over the vocabulary is asked for: one
batch of `tokens_per_batch` positions at a time in the model's dtype, of which `ROWS` positions at a time in float32. Only
three numbers a token are kept, and the two models need not be in memory together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..data.batch import collate
from ..data.dataset import Example, Item
from ..files import atomic_path, atomic_text

SERIES = {"logp": "log-likelihood", "logit": "logit of the token", "mean_logit": "mean logit"}
ROWS = 256
"""Positions whose logits are held in float32 at a time."""


class ShiftError(ValueError):
    """Models or values that cannot be compared; names what and why."""


@dataclass(frozen=True)
class TokenValues:
    """What one model says of the completion tokens of a dataset, in its order; [tokens] float64."""

    logp: np.ndarray
    logit: np.ndarray
    mean_logit: np.ndarray


@torch.no_grad()
def token_values(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    vocabulary: int | None = None,
    tokens_per_batch: int = 2048,
) -> TokenValues:
    """Run a causal language model over the examples.

    Args:
        vocabulary: the first so many logits make the mean; None for all. Checkpoints pad their vocabulary with tokens
            that nobody trained, and `len(tokenizer)` leaves those out.
        tokens_per_batch: padded positions of a batch; a longer example makes a batch of its own.

    Raises:
        ShiftError: a value is not finite; names the example.
    """
    if tokens_per_batch < 1:
        raise ShiftError(f"tokens_per_batch must be at least 1, not {tokens_per_batch}")
    values: list[np.ndarray | None] = [None] * len(examples)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for chosen in _batches(examples, tokens_per_batch):
            batch = collate([Item(examples[i]) for i in chosen], pad_token_id)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits  # [B, T, V]
            logits = logits.flatten(0, 1)
            cuts = batch["cu_completions"][1:-1]
            parts = zip(chosen, batch["rows"].tensor_split(cuts), batch["targets"].tensor_split(cuts), strict=True)
            for i, rows, targets in parts:
                values[i] = _completion_values(logits, rows, targets, vocabulary)
                if not np.isfinite(values[i]).all():
                    raise ShiftError(f"example {i}: a log-likelihood or logit of {type(model).__name__} is not finite")
            del logits
    finally:
        model.train(training)
    return TokenValues(*np.concatenate(values, axis=1))


def _completion_values(logits, rows, targets, vocabulary: int | None) -> np.ndarray:  # [3, completion tokens] float64
    parts = []
    for some, tokens in zip(rows.split(ROWS), targets.split(ROWS), strict=True):
        z = logits[some.to(logits.device)].float()  # [ROWS, V]
        own = z.gather(-1, tokens.to(z.device)[:, None])[:, 0].double()
        parts.append(torch.stack([own - z.logsumexp(-1).double(), own, z[:, :vocabulary].double().mean(-1)]).cpu())
    return torch.cat(parts, dim=1).numpy()


def _batches(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of like lengths, longest first: what does not fit in memory fails at once."""
    batch: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        if batch and (len(batch) + 1) * len(examples[batch[0]]) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def gini(values: np.ndarray) -> float:
    """Gini coefficient of values >= 0: Σᵢ (2i - n - 1) x₍ᵢ₎ / (n Σ x), x sorted, i from 1.

    0 if all are equal, (n - 1) / n if one has everything; NaN without values or if all are 0.

    Raises:
        ValueError: a value is negative or not finite.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if len(x) and not (x[0] >= 0 and np.isfinite(x[-1])):
        raise ValueError("a Gini coefficient is of finite values >= 0")
    if not len(x) or x[-1] == 0:
        return math.nan
    x = x / x[-1]  # the sum of large values stays finite
    n = len(x)
    return float(((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * x.sum()))


def compare(policy: TokenValues, reference: TokenValues, labels: np.ndarray, *, bins: int = 60) -> dict:
    """The report: for each of `SERIES` the shifts by class.

    Args:
        labels: [tokens] bool, True for tokens of a thumbs up.
        bins: of the histograms, between the 0.5 and 99.5 % quantile of all tokens; the outer ones also hold what lies
            beyond.

    Returns:
        {"tokens": {up, down, all}, "shifts": {series: {"up", "down", "all": {"mean", "std", "mean_absolute", "gini",
        "quantiles": {"1" ... "99"}, "histogram": counts}, "edges"}}}. A class without tokens is None, a Gini
        coefficient of no shift at all too.
    """
    labels = np.asarray(labels, dtype=bool)
    classes = {"up": labels, "down": ~labels, "all": np.ones(len(labels), dtype=bool)}
    if len(policy.logp) != len(labels) or len(reference.logp) != len(labels):
        raise ShiftError(f"{len(policy.logp)} and {len(reference.logp)} tokens, {len(labels)} labels")
    report: dict = {"tokens": {name: int(where.sum()) for name, where in classes.items()}, "shifts": {}}
    for series in SERIES:
        shift = getattr(policy, series) - getattr(reference, series)
        low, high = np.quantile(shift, [0.005, 0.995])
        if high - low <= 1e-9:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, bins + 1)
        parts = {name: _summary(shift[where], edges) for name, where in classes.items()}
        report["shifts"][series] = parts | {"edges": edges.tolist()}
    return report


def _summary(shift: np.ndarray, edges: np.ndarray) -> dict | None:
    if not len(shift):
        return None
    concentration = gini(np.abs(shift))
    quantiles = (1, 5, 25, 50, 75, 95, 99)
    return {
        "mean": float(shift.mean()),
        "std": float(shift.std()),
        "mean_absolute": float(np.abs(shift).mean()),
        "gini": None if math.isnan(concentration) else concentration,
        "quantiles": {str(q): float(x) for q, x in zip(quantiles, np.percentile(shift, quantiles), strict=True)},
        "histogram": np.histogram(np.clip(shift, edges[0], edges[-1]), edges)[0].tolist(),
    }


def write(report: dict, output_dir: str | os.PathLike) -> None:
    """shifts.json and shifts.png in `output_dir`, each whole or not at all."""
    folder = Path(output_dir)
    with atomic_path(folder / "shifts.png") as partial:
        plot(report, partial)
    with atomic_text(folder / "shifts.json") as file:
        file.write(json.dumps(report, indent=1) + "\n")


def plot(report: dict, path: str | os.PathLike) -> None:
    """Histograms of the shifts by class, as shares of the class's tokens; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SERIES), figsize=(4.6 * len(SERIES), 3.8), layout="constrained")
    for axes, (series, title) in zip(panels, SERIES.items(), strict=True):
        part = report["shifts"][series]
        edges = np.array(part["edges"])
        for name, label, color in (("up", "thumbs up", "tab:green"), ("down", "thumbs down", "tab:red")):
            if part[name] is not None:
                counts = np.array(part[name]["histogram"])
                coefficient = part[name]["gini"]
                note = "" if coefficient is None else f", Gini {coefficient:.2f}"
                axes.stairs(counts / counts.sum(), edges, label=label + note, color=color, fill=True, alpha=0.45)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=f"Shift of {title}", xlabel="policy minus reference", ylabel="share of tokens")
        axes.margins(y=0.25)
        axes.legend(loc="upper center", ncols=1, fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def describe(report: dict) -> str:
    """The report as a table."""
    lines = [f"{'shift, policy - reference':28}{'tokens':>10}{'mean':>10}{'std':>10}{'mean |.|':>10}{'Gini':>8}"]
    for series, title in SERIES.items():
        for name, label in (("up", "thumbs up"), ("down", "thumbs down")):
            part = report["shifts"][series][name]
            if part is not None:
                coefficient = "-" if part["gini"] is None else f"{part['gini']:.3f}"
                lines.append(
                    f"{title + ', ' + label:32}{report['tokens'][name]:>6}{part['mean']:>10.4f}{part['std']:>10.4f}"
                    f"{part['mean_absolute']:>10.4f}{coefficient:>8}"
                )
    return "\n".join(lines)
