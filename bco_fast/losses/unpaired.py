"""Objectives on log-probabilities: small, pure PyTorch functions of [B] vectors.

logps are sums over the tokens of a completion, in nats; nothing here knows how they were computed. The implicit reward
is r = beta * (logps - ref_logps). Unpaired objectives take `labels` (True for thumbs up) or scores, paired ones the
chosen and the rejected side. `OBJECTIVES` says by name what each of them needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_labels,
    check_lengths,
    check_not_negative,
    check_positive,
    check_reference,
    check_vectors,
    check_weight,
    readable,
)
from .output import LossOutput, Reduction, reduce, token_weights
from .reward_shift import RewardShift


def _unpaired_rewards(logps, ref_logps, labels, beta, sample_weight) -> Tensor:
    """Check what every unpaired objective checks; -> r, differentiable."""
    check_labels(labels, logps.shape, logps.device)
    check_vectors(like="logps", logps=logps, ref_logps=ref_logps, sample_weight=sample_weight)
    check_positive(beta=beta)
    check_reference(ref_logps=ref_logps)
    check_weight(sample_weight)
    return beta * (logps - ref_logps.detach())


def _shift(delta: float | RewardShift) -> float | Tensor:
    return delta.value if isinstance(delta, RewardShift) else delta  # 0-d: it may be on the CPU, nothing is copied


def _output(per_example, rewards, logps, labels, shift, sample_weight, reduction) -> LossOutput:
    loss = reduce(per_example, labels, sample_weight, reduction)
    delta = {"delta": torch.as_tensor(shift, dtype=torch.float32)}
    return LossOutput(
        loss, per_example, rewards.detach(), logps.detach(), labels, shift, weight=sample_weight, extra=delta
    )


def bco_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    beta: float = 0.1,
    delta: float | RewardShift = 0.0,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
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
        sample_weight: non-negative; multiplies each cost before the mean.
        reduction: "mean" over the batch, or "class_mean", the sum of the means of the two classes, as Eq. 8 is printed.

    Returns:
        `loss` (scalar) and `per_example` [B], both differentiable; `rewards` and `logps`, detached.

    Raises:
        TypeError: labels is not bool, or logps is not floating point.
        ValueError: shapes differ, B is 0, beta <= 0, or a value is not finite (values are looked at on the CPU only);
            names the first such row.
    """
    rewards = _unpaired_rewards(logps, ref_logps, labels, beta, sample_weight)
    shift = _shift(delta)
    sign = torch.where(labels, 1.0, -1.0).to(logps.dtype)
    per_example = -F.logsigmoid(sign * (rewards - shift))
    return _output(per_example, rewards, logps, labels, shift, sample_weight, reduction)


def bce_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """Binary cross-entropy on the implicit reward: `bco_loss` without a shift (arXiv 2404.04656, section 5).

    Arguments, returns and errors are those of `bco_loss`.
    """
    return bco_loss(logps, ref_logps, labels, beta=beta, sample_weight=sample_weight, reduction=reduction)


def kto_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """Kahneman-Tversky optimization: one completion costs, with z = max(0, kl),

        desirable_weight * (1 - sigmoid(r - beta * z))   if labels, else
        undesirable_weight * (1 - sigmoid(beta * z - r))

    Ethayarajh et al., arXiv 2402.01306, Eq. 8; arXiv 2404.04656, Eq. 2 to 4. beta multiplies both terms, as in the
    original paper and in TRL; Eq. 2 of the latter writes z outside of beta.

    Args:
        kl: z_ref before it is clamped at 0, in nats: the mean of logps - ref_logps over mismatched completions (another
            prompt's) of the whole batch, all ranks. Never differentiated.
        desirable_weight, undesirable_weight: λ_D and λ_U; the paper keeps λ_D·n₊ : λ_U·n₋ between 1:1 and 4:3.

    Other arguments, returns and errors are those of `bco_loss`.
    """
    rewards = _unpaired_rewards(logps, ref_logps, labels, beta, sample_weight)
    check_not_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    kl = torch.as_tensor(kl, dtype=logps.dtype).detach()
    if kl.dim() != 0:
        raise ValueError(f"kl must be one number, the mean over the batch, not {list(kl.shape)}")
    z_ref = beta * kl.clamp(min=0)
    sign = torch.where(labels, 1.0, -1.0).to(logps.dtype)
    weight = torch.where(labels, logps.new_full((), desirable_weight), logps.new_full((), undesirable_weight))
    per_example = weight * torch.sigmoid(-sign * (rewards - z_ref))
    loss = reduce(per_example, labels, sample_weight, reduction)
    weight = weight if sample_weight is None else weight * sample_weight
    extra = {"kl": kl.clamp(min=0)}
    return LossOutput(loss, per_example, rewards.detach(), logps.detach(), labels, z_ref, weight=weight, extra=extra)


def apo_zero_unpaired_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """Anchored preference optimization without pairs: sigmoid(-r) for thumbs up, sigmoid(r) for thumbs down.

    The terms of D'Oosterlinck et al., arXiv 2408.06266, Eq. 7, each on its own row, as in TRL's KTOTrainer: `kto_loss` with
    z_ref = 0. The rest is as in `bco_loss`.
    """
    rewards = _unpaired_rewards(logps, ref_logps, labels, beta, sample_weight)
    per_example = torch.sigmoid(torch.where(labels, -rewards, rewards))
    return _output(per_example, rewards, logps, labels, 0.0, sample_weight, reduction)


def una_binary_mse_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    beta: float = 0.01,
    delta: float | RewardShift = 0.0,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """UNA on thumbs, squared error: (sigmoid(r - delta) - labels)².

    Wang et al., arXiv 2408.15339, Eq. 11 (printed with a minus in front; the square is minimised); -delta is its
    constant c. Arguments, returns and errors are those of `bco_loss`.
    """
    rewards = _unpaired_rewards(logps, ref_logps, labels, beta, sample_weight)
    shift = _shift(delta)
    per_example = (torch.sigmoid(rewards - shift) - labels.to(logps.dtype)).square()
    return _output(per_example, rewards, logps, labels, shift, sample_weight, reduction)


def una_binary_bce_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    *,
    beta: float = 0.01,
    delta: float | RewardShift = 0.0,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """UNA on thumbs, binary cross-entropy of sigmoid(r - delta) against the label.

    Wang et al., arXiv 2408.15339, Eq. 12: the formula of `bco_loss`, with UNA's beta and, by default, no shift.
    Arguments, returns and errors are those of `bco_loss`.
    """
    return bco_loss(
        logps, ref_logps, labels, beta=beta, delta=delta, sample_weight=sample_weight, reduction=reduction
    )  # fmt: skip


def una_score_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    scores: Tensor,  # [B] floating point, in [0, 1]
    *,
    beta: float = 0.03,
    delta: float | RewardShift = 0.0,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """UNA on scores: (sigmoid(r - delta) - score)².

    Wang et al., arXiv 2408.15339, Eq. 13 (its leading minus is a slip). Classes, in `metrics`, in a `RewardShift` and
    in "class_mean", are score > 0.5. Other arguments, returns and errors are those of `bco_loss`.

    Raises:
        ValueError: a score lies outside [0, 1]; names the row.
    """
    check_vectors(like="logps", logps=logps, scores=scores)
    if readable(scores) and ((scores < 0) | (scores > 1)).any():
        row = int(((scores < 0) | (scores > 1)).nonzero()[0])
        raise ValueError(f"scores[{row}] is {float(scores[row])}: outside [0, 1]")
    labels = scores > 0.5
    rewards = _unpaired_rewards(logps, ref_logps, labels, beta, sample_weight)
    shift = _shift(delta)
    per_example = (torch.sigmoid(rewards - shift) - scores.to(logps.dtype)).square()
    return _output(per_example, rewards, logps, labels, shift, sample_weight, reduction)


def una_reward_loss(
    logps: Tensor,  # [B]
    ref_logps: Tensor,  # [B]
    scores: Tensor,  # [B] floating point, any scale
    *,
    beta: float = 0.03,
    delta: float | RewardShift = 0.0,
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """UNA on rewards: (r - delta - reward)², the implicit reward drawn to an explicit one of any scale.

    Wang et al., arXiv 2408.15339, Eq. 7 and 9. delta, its constant -c, is best the running mean of r - reward: observe
    that in a `RewardShift(balanced=False)`. Classes in `metrics` are reward > 0.5, the middle of rewards squashed to
    [0, 1]. Other arguments, returns and errors are those of `bco_loss`.
    """
    check_vectors(like="logps", logps=logps, scores=scores)
    labels = scores > 0.5
    rewards = _unpaired_rewards(logps, ref_logps, labels, beta, sample_weight)
    shift = _shift(delta)
    per_example = (rewards - shift - scores.to(logps.dtype)).square()
    return _output(per_example, rewards, logps, labels, shift, sample_weight, reduction)


def sft_loss(
    logps: Tensor,  # [B]
    labels: Tensor,  # [B] bool
    lengths: Tensor,  # [B] int
    *,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Fine-tuning on what got a thumbs up: minus the mean log-probability of those completions' tokens.

    arXiv 2404.04656, App. C. A batch with no thumbs up costs 0.

    Args:
        lengths: tokens of each completion, >= 1.

    Returns:
        `per_example` is the mean negative log-probability per token, 0 for thumbs down; `loss` weighs it by tokens;
        `rewards` are the mean log-probabilities.

    Raises:
        TypeError, ValueError: as `bco_loss`; and a length of 0, by row.
    """
    check_labels(labels, logps.shape, logps.device)
    check_vectors(like="logps", logps=logps, sample_weight=sample_weight)
    check_lengths(logps.shape, lengths=lengths)
    check_weight(sample_weight)
    means = logps / lengths
    per_example = torch.where(labels, -means, 0.0)
    tokens = token_weights(labels, lengths, sample_weight, (lengths * labels).sum())
    loss = (per_example * tokens).sum().to(logps.dtype)
    return LossOutput(loss, per_example, means.detach(), logps.detach(), labels, weight=sample_weight)
