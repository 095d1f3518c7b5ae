"""Objectives on sequence log-probabilities: small, pure PyTorch functions of [B] vectors.

r = beta * (logps - ref_logps) is the implicit reward, `labels` is True for thumbs up, logps are sums over the tokens
of a completion, in nats. Nothing here knows how the log-probabilities were computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import unpaired_metrics, unpaired_sums
from .reward_shift import RewardShift


@dataclass(frozen=True)
class LossOutput:
    """What every objective returns."""

    loss: Tensor
    """Scalar, differentiable."""
    per_example: Tensor
    """[B], differentiable; before `sample_weight`."""
    rewards: Tensor
    """[B], detached: r, before the shift."""
    logps: Tensor
    """[B], detached."""
    metrics: dict[str, float | Tensor]
    """Floats or 0-d tensors under TRL's names; NaN where a class is absent from the batch."""


def bco_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    beta: float = 0.1,
    delta: float | RewardShift = 0.0,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Binary classifier optimization: would this completion get a thumbs up?

    With the implicit reward r = beta * (logps - ref_logps), one completion costs

        -log sigmoid(r - delta)   if labels, else   -log sigmoid(delta - r)

    Jung et al., arXiv 2404.04656, Eq. 8; delta is Eq. 7, see `RewardShift`.

    Args:
        logps: summed completion log-probabilities of the policy, in nats, float32; carries the gradient.
        ref_logps: the same sums under the reference model; constant.
        labels: True for thumbs up.
        beta: reward per nat, > 0.
        delta: the shift, in reward units, or the running estimate of it; never differentiated.
        sample_weight: non-negative; multiplies each cost before the mean over B.

    Returns:
        `loss` (scalar mean over B) and `per_example` [B], both differentiable; `rewards` and `logps`, detached.

    Raises:
        TypeError: labels is not bool, or logps is not floating point.
        ValueError: shapes differ, B is 0, beta <= 0, or a value is not finite (values are looked at on the CPU only);
            names the first such row.
    """
    check_unpaired(logps, ref_logps, labels, beta, sample_weight)
    shift = delta.value.to(logps.device) if isinstance(delta, RewardShift) else delta
    sign = torch.where(labels, 1.0, -1.0).to(logps.dtype)
    rewards = beta * (logps - ref_logps.detach())
    per_example = -F.logsigmoid(sign * (rewards - shift))
    weighted = per_example if sample_weight is None else per_example * sample_weight
    return LossOutput(
        loss=weighted.mean(),
        per_example=per_example,
        rewards=rewards.detach(),
        logps=logps.detach(),
        metrics={
            **unpaired_metrics(unpaired_sums(rewards, logps, labels, shift)),
            "delta": torch.as_tensor(shift, dtype=torch.float32),
        },
    )


def bce_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Binary cross-entropy on the implicit reward: `bco_loss` without a shift (arXiv 2404.04656, section 5).

    Arguments, returns and errors are those of `bco_loss`.
    """
    return bco_loss(logps, ref_logps, labels, beta=beta, sample_weight=sample_weight)


LOSSES: dict[str, Callable[..., LossOutput]] = {"bco": bco_loss, "bce": bce_loss}
"""The objectives by the name that `FeedbackConfig(loss_type=...)` takes."""

SHIFTED = frozenset({"bco"})
"""Those that read a `RewardShift`."""


def check_unpaired(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    beta: float,
    sample_weight: Tensor | None,  # [B]
) -> None:
    """Raise what `bco_loss` documents. Values are looked at on the CPU only: on a GPU that would stall the stream."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a bool tensor (True for thumbs up), not {kind}")
    for name, tensor in (("logps", logps), ("ref_logps", ref_logps), ("sample_weight", sample_weight)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape != labels.shape:
            raise ValueError(f"{name} {list(tensor.shape)} and labels {list(labels.shape)} must both be [B]")
        if tensor.device != labels.device:
            raise ValueError(f"{name} is on {tensor.device} and labels on {labels.device}")
        if tensor.device.type == "cpu" and not tensor.isfinite().all():
            row = int((~tensor.isfinite()).nonzero()[0])
            raise ValueError(f"{name}[{row}] is {float(tensor[row])}: not finite")
    if len(labels) == 0:
        raise ValueError("the batch is empty")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be > 0, not {beta}")
    if ref_logps.requires_grad:
        raise ValueError("ref_logps requires grad: the reference is constant, detach it")
    if sample_weight is not None and sample_weight.device.type == "cpu" and (sample_weight < 0).any():
        row = int((sample_weight < 0).nonzero()[0])
        raise ValueError(f"sample_weight[{row}] is {float(sample_weight[row])}: negative")
