"""What an objective returns, and how costs become one number."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .metrics import unpaired_metrics, unpaired_sums

Reduction = Literal["mean", "class_mean"]


@dataclass(frozen=True)
class LossOutput:
    """What every objective returns. Of a paired one, `rewards`, `logps` and `labels` are [2B]: chosen, then rejected."""

    loss: Tensor
    """Scalar, differentiable."""
    per_example: Tensor
    """[B], differentiable; before `sample_weight`. One number per pair in a paired objective; [P, B] of a sum of P."""
    rewards: Tensor
    """[B], detached: the implicit reward r, before any shift."""
    logps: Tensor
    """[B], detached."""
    labels: Tensor
    """[B] bool, the classes that `metrics` are by."""
    threshold: float | Tensor = 0.0
    """The reward above which a completion counts as thumbs up: δ where there is one."""
    paired: bool = False
    weight: Tensor | None = None
    """Like `rewards`: what multiplies each cost; the means of `metrics` are weighted by it. None for 1."""
    extra: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def sums(self) -> Tensor:  # [9] float64
        """Counts and sums by class, which add up over batches; see `metrics.unpaired_sums`."""
        return unpaired_sums(
            self.rewards, self.logps, self.labels, self.threshold, weight=self.weight, paired=self.paired
        )

    @cached_property
    def metrics(self) -> dict[str, float | Tensor]:
        """0-d tensors under TRL's names; NaN where a class is absent from the batch."""
        return {**unpaired_metrics(self.sums), **self.extra}


def reduction_weights(
    labels: Tensor,  # [B] bool
    sample_weight: Tensor | None,  # [B]
    reduction: Reduction,
    up: float | Tensor,
    down: float | Tensor,
) -> Tensor:  # [B] float64
    """What each example's cost is multiplied by before the sum, in a batch of `up` thumbs up and `down` thumbs down.

    "mean": 1 / (up + down). "class_mean": one over the size of the example's own class, so that the sum is that of the
    two class means, as Eq. 8 of arXiv 2404.04656 is printed. The batch may be larger than these B examples: all
    micro-batches and ranks of an optimizer step.
    """
    up, down = (torch.as_tensor(n, dtype=torch.float64, device=labels.device) for n in (up, down))
    size = torch.where(labels, up, down) if reduction == "class_mean" else (up + down).expand(len(labels))
    weights = 1 / size
    return weights if sample_weight is None else weights * sample_weight


def reduce(per_example: Tensor, labels: Tensor, sample_weight: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "class_mean"):
        raise ValueError(f"reduction must be 'mean' or 'class_mean', not {reduction!r}")
    up = labels.sum()
    weights = reduction_weights(labels, sample_weight, reduction, up, len(labels) - up)
    return (per_example * weights).sum().to(per_example.dtype)


def token_weights(
    labels: Tensor,  # [B] bool
    lengths: Tensor,  # [B] int
    sample_weight: Tensor | None,  # [B]
    tokens_up: float | Tensor,
) -> Tensor:  # [B] float64
    """`reduction_weights` of `sft_loss`: the share of an example's tokens in the thumbs-up tokens of the batch."""
    weights = lengths * labels / torch.as_tensor(tokens_up, dtype=torch.float64, device=labels.device).clamp(min=1)
    return weights if sample_weight is None else weights * sample_weight
