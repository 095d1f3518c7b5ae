"""What is logged about a batch of thumbs up and down: sums that add up over micro-batches and ranks, then means.

One rule for weights: a completion counts in every mean over its class - of δ (`RewardShift`), of the error term, of the logged
rewards - as much as in the loss, by its weight and its class's λ. The two expectations that Theorem 4 of arXiv 2404.04656
bounds are then those of the loss. `auc` ranks rows and takes no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIELDS = ("up", "down", "r_up", "r_down", "logp_up", "logp_down", "correct", "error_up", "error_down")


@torch.no_grad()
def unpaired_sums(
    rewards: Tensor,  # [B]
    logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    shift: float | Tensor,
    *,
    weight: Tensor | None = None,  # [B]
    paired: bool = False,
) -> Tensor:  # [9] float64
    """Counts and sums by class; add them over batches and ranks, then call `unpaired_metrics`.

    A completion counts as correct when r - shift has the sign of its label; with `paired` (the chosen half, then the
    rejected) when its pair is ranked right.

    Args:
        weight: what multiplies each completion's cost, which it then counts for here too; None for 1.
    """
    r, logps = rewards.detach().double(), logps.detach().double()
    shifted = r - shift
    weight = torch.ones_like(r) if weight is None else weight.detach().double()

    def total(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where & (weight > 0), weight * values, 0.0).sum()

    up, down, one = labels, ~labels, torch.ones_like(r)
    correct = torch.gt(*r.chunk(2)).repeat(2) if paired else (shifted > 0) == labels
    return torch.stack(
        [
            total(one, up),
            total(one, down),
            total(r, up),
            total(r, down),
            total(logps, up),
            total(logps, down),
            total(one, correct),
            total(torch.exp(-shifted), up),
            total(torch.exp(shifted), down),
        ]
    )


def unpaired_metrics(sums: Tensor) -> dict[str, Tensor]:
    """Means under TRL's names, as 0-d tensors; NaN where a class is absent.

    `error_term` is E₊[e^-(r-δ)] + E₋[e^(r-δ)], the gap between BCE and DPO (arXiv 2404.04656, Fig. 3).
    """
    s = dict(zip(FIELDS, sums, strict=True))
    chosen, rejected = s["r_up"] / s["up"], s["r_down"] / s["down"]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": s["correct"] / (s["up"] + s["down"]),
        "logps/chosen": s["logp_up"] / s["up"],
        "logps/rejected": s["logp_down"] / s["down"],
        "error_term": s["error_up"] / s["up"] + s["error_down"] / s["down"],
    }


def auc_interval(auc: float, up: int, down: int) -> tuple[float, float]:
    """95 % interval of an AUC by its normal approximation (Hanley and McNeil, Radiology 143, 1982), within [0, 1].

    Args:
        auc: in [0, 1].
        up, down: number of completions of each class, > 0.
    """
    q_up, q_down = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (up - 1) * (q_up - auc**2) + (down - 1) * (q_down - auc**2)
    half = 1.96 * (spread / (up * down)) ** 0.5
    return max(0.0, auc - half), min(1.0, auc + half)


def auc(rewards: Tensor, labels: Tensor) -> float:
    """Probability that a thumbs up has the higher reward than a thumbs down, ties counted half; NaN with one class.

    Exact, by ranks: (R₊ - n₊(n₊ + 1) / 2) / (n₊ n₋), R₊ the sum of the ranks of the thumbs up.
    """
    rewards, labels = rewards.double(), labels.bool()
    up = int(labels.sum())
    down = len(labels) - up
    if not up or not down:
        return float("nan")
    _, group, sizes = torch.unique(rewards, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    mean_rank = last - (sizes.double() - 1) / 2  # of a group of ties, counted from 1
    return float((mean_rank[group][labels].sum() - up * (up + 1) / 2) / (up * down))
