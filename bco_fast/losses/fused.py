"""Drop-ins for existing training loops: hidden states in, loss out, no logits in between."""

from __future__ import annotations

import torch
from torch import Tensor

from ..head.linear_logps import head_logps
from ..head.types import Backend, HeadOptions, HeadSpec, HeadStats
from .bnf import bnf_loss
from .output import LossOutput, Reduction
from .reward_shift import RewardShift
from .sequence import sequence_logps
from .unpaired import bco_loss


def fused_bco_loss(
    hidden: Tensor,  # [B, T, D], or [total, D] with cu_seqlens
    lm_head_weight: Tensor,  # [V, D]
    targets: Tensor,  # [B, T] or [total]
    labels: Tensor,  # [B] bool
    ref_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    delta: float | RewardShift = 0.0,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
    cu_seqlens: Tensor | None = None,  # [B + 1]
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    backend: Backend = "auto",
    workspace_bytes: int = 256 << 20,
    sparse_tolerance: float = 0.0,
    stats: HeadStats | None = None,
) -> LossOutput:
    """`bco_loss` of a batch, from last hidden states and the lm-head weight.

    Replaces `logits = lm_head(hidden)`, log-softmax, gather, sum and loss in an existing trainer. Composed of
    `fused_linear_logps`, `sequence_logps` and `bco_loss`, which document shapes, dtypes and errors.

    Args:
        hidden: last hidden states, already shifted: position t predicts `targets[..., t]`.
        targets: token ids; `ignore_index` for prompt and padding; without one every target counts.
        labels: True for thumbs up.
        ref_logps: summed completion log-probabilities under the reference, float32.
        delta: a float, or a `RewardShift`. The shift observes this batch if hidden or weight carries a gradient, so
            evaluation never moves it; call its `step()` after the optimizer's.
        cu_seqlens: cumulative sequence lengths of a batch packed without padding.

    Returns:
        `LossOutput`; `rewards` and `logps` are [B].
    """
    spec, options = (
        HeadSpec(logit_scale, softcap, temperature),
        HeadOptions(backend, workspace_bytes, sparse_tolerance, stats),
    )
    token_logps = head_logps(hidden, lm_head_weight, targets, bias, spec, options, ignore_index=ignore_index)
    logps = sequence_logps(token_logps, cu_seqlens=cu_seqlens)
    if isinstance(delta, RewardShift) and logps.requires_grad:
        delta.observe(beta * (logps.detach() - ref_logps), labels, sample_weight)
    return bco_loss(logps, ref_logps, labels, beta=beta, delta=delta, sample_weight=sample_weight, reduction=reduction)


def fused_bnf_loss(
    hidden: Tensor,  # [B, T, D], or [total, D] with cu_seqlens
    lm_head_weight: Tensor,  # [V, D]
    targets: Tensor,  # [B, T] or [total]
    labels: Tensor,  # [B] bool
    ref_token_logps: Tensor,  # the shape of targets
    *,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
    cu_seqlens: Tensor | None = None,  # [B + 1]
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    backend: Backend = "auto",
    workspace_bytes: int = 256 << 20,
    sparse_tolerance: float = 0.0,
    stats: HeadStats | None = None,
) -> LossOutput:
    """`bnf_loss` of a batch, from last hidden states and the lm-head weight; no [N, V] tensor anywhere.

    The dynamic target distribution of arXiv 2410.04834 is a weight per token. The entropy that its value needs comes from
    the same pass (`fused_linear_logps(return_entropy=True)`).

    Args:
        ref_token_logps: per-token log-probabilities of the targets under the reference, nats, float32; anything where
            the target is ignored.
        cu_seqlens: cumulative sequence lengths of a batch packed without padding. Ignored targets inside a packed
            sequence (its prompt) do not count towards |y|.

    Other arguments, returns and errors are those of `fused_bco_loss` and `bnf_loss`.
    """
    spec, options = (
        HeadSpec(logit_scale, softcap, temperature),
        HeadOptions(backend, workspace_bytes, sparse_tolerance, stats),
    )
    token_logps, entropy = head_logps(
        hidden, lm_head_weight, targets, bias, spec, options,
        ignore_index=ignore_index, return_entropy=True, entropy_grad=False,
    )  # fmt: skip
    return bnf_loss(
        token_logps,
        ref_token_logps,
        labels,
        mask=torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index,
        cu_seqlens=cu_seqlens,
        entropy=entropy,
        sample_weight=sample_weight,
        reduction=reduction,
    )
