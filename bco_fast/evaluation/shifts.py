"""What alignment did to the tokens: shifts of log-likelihood and logits between policy and reference, and their Gini
coefficient (BNF, arXiv 2410.04834, Fig. 3).

For each completion token, policy minus reference of

    logp         log p(token), nats
    logit        the token's own logit
    mean_logit   the mean of the logits over the vocabulary; it changes no probability, so it may drift in training

A Gini coefficient of |shift| near 1 means that few tokens took most of the change, near 0 that all took an equal part.

Only this module of bco_fast stores logits, because it needs their mean over the vocabulary: one batch of `tokens_per_batch`
positions at a time in the model's dtype, and `ROWS` positions of it at a time in float32. Three numbers are kept for each
token, and the two models need not be in memory together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..data.batch import collate
from ..data.dataset import Example, Item
from ..data.samplers import token_batches
from ..files import atomic_path, atomic_text

SERIES = {"logp": "log-likelihood", "logit": "logit of the token", "mean_logit": "mean logit"}
ROWS = 256
"""Positions whose logits are held in float32 at a time."""


class ShiftError(ValueError):
    """Models or values that cannot be compared."""


@dataclass(frozen=True)
class TokenValues:
    """One model's values of a dataset's completion tokens, in order; [tokens] float64 each."""

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
        vocabulary: number of leading logits in the mean; None for all. Checkpoints pad their vocabulary with untrained
            tokens; `len(tokenizer)` leaves those out.
        tokens_per_batch: padded positions of a batch; a longer example is a batch by itself.

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
        order = sorted(
            range(len(examples)), key=lambda i: -len(examples[i])
        )  # longest first: a lack of memory shows at once
        for chosen in token_batches([[example] for example in examples], order, tokens_per_batch):
            batch = collate([Item(examples[i]) for i in chosen], pad_token_id)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits  # [B, T, V]
            logits = logits.flatten(0, 1)
            cuts = batch["cu_completions"][1:-1].long()
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


def gini(values: np.ndarray) -> float:
    """Gini coefficient of values >= 0: Σᵢ (2i - n - 1) x₍ᵢ₎ / (n Σ x), x sorted, i from 1.

    0 if all are equal, (n - 1) / n if one holds everything; NaN without values or if all are 0.

    Raises:
        ValueError: a value is negative or not finite.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if len(x) and not (x[0] >= 0 and np.isfinite(x[-1])):
        raise ValueError("a Gini coefficient needs finite values >= 0")
    if not len(x) or x[-1] == 0:
        return math.nan
    x = x / x[-1]  # the sum of large values stays finite
    n = len(x)
    return float(((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * x.sum()))


def compare(
    policy: TokenValues, reference: TokenValues, labels: np.ndarray, *, bins: int = 60, lengths: Sequence[int] = ()
) -> dict:
    """The report: for each of `SERIES` the shifts by class, and those of whole responses.

    Args:
        labels: [tokens] bool, True for tokens of a thumbs up.
        lengths: tokens of each response, for `responses`.
        bins: of the histograms, between the 0.5 and 99.5 % quantile of all tokens; the outer bins include the values
            beyond.

    Returns:
        {"tokens": {up, down, all}, "shifts": {series: {"up", "down", "all": {"mean", "std", "mean_absolute", "gini",
        "quantiles": {"1" ... "99"}, "histogram": counts}, "edges"}}}. A class without tokens is None, and
        so is the Gini coefficient if nothing shifted. With lengths also {"responses": ...} of `response_shifts`.
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
    return report | ({"responses": response_shifts(policy, reference, lengths)} if len(lengths) else {})


def response_shifts(policy: TokenValues, reference: TokenValues, lengths: Sequence[int]) -> dict[str, float | None]:
    """Means over responses, as BNF's Fig. 3 has them (arXiv 2410.04834).

    Returns:
        response_logp: |sum of the log-likelihood shifts|, nats (Fig. 3a); response_logp_per_token: that over the tokens (3d);
        response_logit_per_token: mean |logit shift| (3e); response_logit_gini: Gini coefficient of |logit shift| (3f), None if
        no logit has shifted.
    """
    cuts = np.cumsum(lengths)[:-1]
    logp, logit = (np.split(getattr(policy, n) - getattr(reference, n), cuts) for n in ("logp", "logit"))
    concentration = [value for value in (gini(np.abs(part)) for part in logit) if not math.isnan(value)]
    return {
        "response_logp": float(np.mean([abs(part.sum()) for part in logp])),
        "response_logp_per_token": float(np.mean([abs(part.mean()) for part in logp])),
        "response_logit_per_token": float(np.mean([np.abs(part).mean() for part in logit])),
        "response_logit_gini": float(np.mean(concentration)) if concentration else None,
    }


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
    """shifts.json and shifts.png in `output_dir`; each appears only when it is complete."""
    with atomic_path(Path(output_dir, "shifts.png")) as partial:
        plot(report, partial)
    with atomic_text(Path(output_dir, "shifts.json")) as file:
        file.write(json.dumps(report, indent=1) + "\n")


def plot(report: dict, path: str | os.PathLike) -> None:
    """Histograms of the shifts by class, as shares of the class's tokens; PNG."""
    from matplotlib.figure import Figure

    from .plots import DOWN, UP

    figure = Figure(figsize=(4.6 * len(SERIES), 3.8), layout="constrained")
    panels = figure.subplots(1, len(SERIES))
    for axes, (series, title) in zip(panels, SERIES.items(), strict=True):
        part = report["shifts"][series]
        edges = np.array(part["edges"])
        for name, label, color in (("up", "thumbs up", UP), ("down", "thumbs down", DOWN)):
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


def describe(report: dict) -> str:
    """The report as a table."""
    lines = [f"{'shift, policy - reference':28}{'tokens':>10}{'mean':>10}{'std':>10}{'mean |.|':>10}{'Gini':>8}"]
    for series, title in SERIES.items():
        for name, label in (("up", "thumbs up"), ("down", "thumbs down")):
            if (part := report["shifts"][series][name]) is not None:
                numbers = "".join(f"{part[value]:>10.4f}" for value in ("mean", "std", "mean_absolute"))
                coefficient = "-" if part["gini"] is None else f"{part['gini']:.3f}"
                lines.append(f"{title + ', ' + label:32}{report['tokens'][name]:>6}{numbers}{coefficient:>8}")
    return "\n".join(lines)
