"""What alignment did to the tokens: shifts of log-likelihood and logits between policy and reference, and their Gini
coefficient (BNF, arXiv 2410.04834, Fig. 3 and 4).

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
RESPONSES = {
    "response_logp": "|Δ log-likelihood|, nats (3a)",
    "response_logit": "|Δ logit|, sum over the tokens (3b)",
    "response_logp_per_token": "|Δ log-likelihood| per token, nats (3d)",
    "response_logit_per_token": "|Δ logit| per token (3e)",
    "response_logit_gini": "Gini coefficient of |Δ logit| (3f)",
}
"""Of each response, with its panel in Fig. 3."""
ROWS = 256
"""Positions whose logits are held in float32 at a time."""
POINTS = 2000
"""Responses in the report's scatter (3c); beyond, every nth."""


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
    policy: TokenValues,
    reference: TokenValues,
    labels: np.ndarray,
    *,
    bins: int = 60,
    lengths: Sequence[int] = (),
    deciles: Sequence[float] = (),
) -> dict:
    """The report: for each of `SERIES` the shifts by class, and those of whole responses.

    Args:
        labels: [tokens] bool, True for tokens of a thumbs up.
        lengths: tokens of each response, for `responses`.
        bins: of the tokens' histograms, between the 0.5 and 99.5 % quantile of all tokens; the outer bins include the values
            beyond. Histograms of responses have a third as many, from the smallest to the largest value.
        deciles: the nine of another policy's log-likelihood shifts, which is then the yardstick of BNF's Fig. 4.

    Returns:
        {"tokens": {up, down, all}, "shifts": {series: {"up", "down", "all": {"mean", "std", "mean_absolute", "gini",
        "quantiles": {"1" ... "99"}, "histogram": counts}, "edges"}}}. A class without tokens is None, and
        so is the Gini coefficient if nothing shifted. "deciles" are the nine of all tokens' log-likelihood shifts. With
        lengths also {"responses": ...} of `response_shifts`, "response_histograms" of the same values and "scatter"; with
        deciles "shares", the ten shares of this policy's tokens between them, 0.1 each for the yardstick itself.
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
    shift = policy.logp - reference.logp
    report["deciles"] = np.quantile(shift, np.arange(1, 10) / 10).tolist()
    if len(deciles):
        places = np.searchsorted(deciles, shift, side="right")
        report["shares"] = (np.bincount(places, minlength=len(deciles) + 1) / len(shift)).tolist()
    return report | (_responses(policy, reference, lengths, max(bins // 3, 1)) if len(lengths) else {})


def _responses(policy: TokenValues, reference: TokenValues, lengths: Sequence[int], bins: int) -> dict:
    values = response_values(policy, reference, lengths)
    histograms = {}
    for name, found in values.items():
        found = found[np.isfinite(found)]
        counts, edges = np.histogram(found, bins) if len(found) else (np.zeros(0, int), np.zeros(0))
        histograms[name] = {"edges": edges.tolist(), "histogram": counts.tolist()}
    stride = -(-len(lengths) // POINTS)
    points = {name: values[f"response_{name}"][::stride].tolist() for name in ("logit", "logp")}
    return {"responses": _means(values), "response_histograms": histograms, "scatter": points}


def response_values(policy: TokenValues, reference: TokenValues, lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """[responses] each, as BNF's Fig. 3 has them (arXiv 2410.04834).

    Returns:
        response_logp: |sum of the log-likelihood shifts|, nats (Fig. 3a); response_logit: sum of |logit shift| (3b);
        response_logp_per_token and response_logit_per_token: these over the number of tokens (3d, 3e); response_logit_gini:
        Gini coefficient of |logit shift| (3f), NaN if no logit has shifted.
    """
    cuts = np.cumsum(lengths)[:-1]
    logp, logit = (np.split(getattr(policy, n) - getattr(reference, n), cuts) for n in ("logp", "logit"))
    sums = {
        "response_logp": np.array([abs(part.sum()) for part in logp]),
        "response_logit": np.array([np.abs(part).sum() for part in logit]),
    }
    per_token = {f"{name}_per_token": values / np.asarray(lengths) for name, values in sums.items()}
    return sums | per_token | {"response_logit_gini": np.array([gini(np.abs(part)) for part in logit])}


def response_shifts(policy: TokenValues, reference: TokenValues, lengths: Sequence[int]) -> dict[str, float | None]:
    """Means of `response_values`; of the Gini coefficients that exist, None if no logit has shifted."""
    return _means(response_values(policy, reference, lengths))


def _means(values: dict[str, np.ndarray]) -> dict[str, float | None]:
    found = {name: values[name][np.isfinite(values[name])] for name in RESPONSES}
    return {name: float(some.mean()) if len(some) else None for name, some in found.items()}


def read_deciles(path: str | os.PathLike) -> list[float]:
    """Of the shifts.json of another policy, or its folder.

    Raises:
        ShiftError: it cannot be read, or holds none.
    """
    path = Path(path)
    path = path / "shifts.json" if path.is_dir() else path
    try:
        deciles = json.loads(path.read_text())["deciles"]
        if len(deciles) != 9 or not all(math.isfinite(value) for value in deciles):
            raise ValueError
    except OSError as error:
        raise ShiftError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ShiftError(f"{path} is no shifts.json with deciles: run bco-fast shifts for that policy") from None
    return deciles


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
    """PNG: histograms of the shifts by class, as shares of the class's tokens; whole responses as in BNF's Fig. 3; shares of
    another policy's deciles as in its Fig. 4, where the report has them."""
    from matplotlib.figure import Figure

    whole = "responses" in report
    rows = 1 + 2 * whole + ("shares" in report)
    figure = Figure(figsize=(4.6 * len(SERIES), 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, len(SERIES), squeeze=False)
    for axes, series in zip(panels[0], SERIES, strict=True):
        _draw_tokens(axes, report, series)
    if whole:
        names = iter(RESPONSES)
        for axes in [*panels[1, :2], *panels[2]]:
            name = next(names)
            _draw_responses(axes, report["response_histograms"][name], RESPONSES[name])
        axes, points = panels[1, 2], report["scatter"]
        axes.scatter(points["logp"], points["logit"], s=12, alpha=0.5)
        axes.set(title="Logit shift against log-likelihood shift (3c)", xlabel="|Δ log-likelihood|", ylabel="|Δ logit|")
    if "shares" in report:
        axes, *rest = panels[-1]
        axes.bar(range(1, 11), report["shares"])
        axes.axhline(0.1, color="black", linewidth=0.8)
        axes.set(title="Token shifts in the deciles of another policy", xlabel="its decile", ylabel="share of tokens")
        for empty in rest:
            empty.set_axis_off()
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _draw_tokens(axes, report: dict, series: str) -> None:
    from .plots import DOWN, UP

    part = report["shifts"][series]
    edges = np.array(part["edges"])
    one_class = part["down"] is None
    for name, label, color in (("up", "all tokens" if one_class else "thumbs up", UP), ("down", "thumbs down", DOWN)):
        if part[name] is not None:
            counts = np.array(part[name]["histogram"])
            coefficient = part[name]["gini"]
            note = "" if coefficient is None else f", Gini {coefficient:.2f}"
            axes.stairs(counts / counts.sum(), edges, label=label + note, color=color, fill=True, alpha=0.45)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title=f"Shift of {SERIES[series]}", xlabel="policy minus reference", ylabel="share of tokens")
    axes.margins(y=0.25)
    axes.legend(loc="upper center", ncols=1, fontsize="small")


def _draw_responses(axes, part: dict, title: str) -> None:
    if part["histogram"]:
        axes.stairs(part["histogram"], part["edges"], fill=True, alpha=0.6)
    axes.set(title=f"Responses: {title}", ylabel="responses")


def describe(report: dict) -> str:
    """The report as a table."""
    lines = [f"{'shift, policy - reference':28}{'tokens':>10}{'mean':>10}{'std':>10}{'mean |.|':>10}{'Gini':>8}"]
    for series, title in SERIES.items():
        for name, label in (("up", "thumbs up"), ("down", "thumbs down")):
            if (part := report["shifts"][series][name]) is not None:
                numbers = "".join(f"{part[value]:>10.4f}" for value in ("mean", "std", "mean_absolute"))
                coefficient = "-" if part["gini"] is None else f"{part['gini']:.3f}"
                lines.append(f"{title + ', ' + label:32}{report['tokens'][name]:>6}{numbers}{coefficient:>8}")
    for name, title in RESPONSES.items():
        value = report.get("responses", {}).get(name)
        lines.append(f"{'response, ' + title:52}{'-' if value is None else format(value, '.4f'):>10}")
    if "shares" in report:
        shares = " ".join(f"{share:.3f}" for share in report["shares"])
        lines.append(f"shares of the tokens in the other policy's deciles: {shares}")
    return "\n".join(lines)
