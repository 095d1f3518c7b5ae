"""Objectives on pairs: a chosen (w) and a rejected (l) completion of one prompt.

Log-probabilities are sums over tokens in nats, [B]; r_y = beta * (logps_y - ref_logps_y). Every function returns a
`LossOutput` whose `per_example` is [B], one number a pair, and whose `rewards` and `logps` are [2B], chosen first. Common
errors: TypeError for what is not floating point; ValueError for shapes that differ, an empty batch, a hyper-parameter out
of range, a reference that requires grad and (on the CPU) a value that is not finite or a completion of no tokens, by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_fraction,
    check_lengths,
    check_not_negative,
    check_positive,
    check_reference,
    check_vectors,
    check_weight,
)
from .divergence import Divergence, divergence_scores
from .output import LossOutput
from .sequence import log1mexp


def check_pairs(chosen_logps, rejected_logps, sample_weight, **references) -> None:
    check_vectors(
        like="chosen_logps", chosen_logps=chosen_logps, rejected_logps=rejected_logps,
        sample_weight=sample_weight, **references,
    )  # fmt: skip
    check_reference(**references)
    check_weight(sample_weight)


def log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight):
    check_pairs(
        chosen_logps, rejected_logps, sample_weight,
        ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps,
    )  # fmt: skip
    return chosen_logps - ref_chosen_logps.detach(), rejected_logps - ref_rejected_logps.detach()


def pair_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, sample_weight):
    """r of both sides, after the checks of every objective with a reference; differentiable."""
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight)
    check_positive(beta=beta)
    return beta * chosen, beta * rejected


def pair_margin(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    divergence,
    divergence_alpha,
    sample_weight,
):
    """x = beta * (f'(u_w) - f'(u_l)), differentiable, and r of both sides, after the checks."""
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight)
    check_positive(beta=beta)
    chosen, rejected = divergence_scores(*ratios, divergence=divergence, alpha=divergence_alpha)
    return beta * (chosen - rejected), (beta * ratios[0], beta * ratios[1])


def pair_output(per_example, rewards: tuple[Tensor, Tensor], logps: tuple[Tensor, Tensor], sample_weight) -> LossOutput:
    weighted = per_example if sample_weight is None else per_example * sample_weight
    count = len(per_example)
    return LossOutput(
        loss=weighted.mean(),
        per_example=per_example,
        rewards=torch.cat(rewards).detach(),
        logps=torch.cat(logps).detach(),
        labels=torch.arange(2 * count, device=per_example.device) < count,
        paired=True,
        weight=None if sample_weight is None else sample_weight.repeat(2),
    )


def dpo_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Direct preference optimization: -log sigmoid(r_w - r_l).

    Rafailov et al., arXiv 2305.18290, Eq. 7; the same function is UNA on pairs (arXiv 2408.15339, Eq. 10).

    Args:
        label_smoothing: e in [0, 0.5), the share of pairs that are the wrong way round, for the conservative DPO of that paper's
            authors: -(1 - e) log sigmoid(r_w - r_l) - e log sigmoid(r_l - r_w).
        divergence, divergence_alpha: of policy and reference, for f-DPO; see `divergence_scores`. The logged `rewards` stay
            beta times the log-ratio, as in TRL.
    """
    margin, rewards = pair_margin(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, divergence, divergence_alpha, sample_weight
    )  # fmt: skip
    check_fraction(0.5, label_smoothing=label_smoothing)
    cost = smoothed(margin, label_smoothing)
    return pair_output(cost, rewards, (chosen_logps, rejected_logps), sample_weight)


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid of a margin that has the wrong sign in a share of the pairs."""
    cost = -F.logsigmoid(margin)
    return (1 - label_smoothing) * cost - label_smoothing * F.logsigmoid(-margin) if label_smoothing else cost


def ipo_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,  # [B] int
    rejected_lengths: Tensor | None = None,  # [B] int
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Identity preference optimization: (h_w - h_l - 1 / (2 beta))², h the log-ratio of a completion.

    Azar et al., arXiv 2310.12036, Eq. 17 (their tau is beta). With both lengths h is the mean over tokens, which is what
    TRL trains; without, the sum, as in the paper. Another divergence puts f' of `divergence_scores` in place of h.
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("ipo_loss needs both lengths, for means over tokens, or none, for sums")
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
    )  # fmt: skip
    check_positive(beta=beta)
    f_chosen, f_rejected = divergence_scores(chosen, rejected, divergence=divergence, alpha=divergence_alpha)
    if chosen_lengths is not None:
        check_lengths(chosen.shape, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
        f_chosen, f_rejected = f_chosen / chosen_lengths, f_rejected / rejected_lengths
    per_example = (f_chosen - f_rejected - 1 / (2 * beta)).square()
    return pair_output(per_example, (beta * chosen, beta * rejected), (chosen_logps, rejected_logps), sample_weight)


def slic_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    *,
    delta: float = 1.0,
    sft_weight: float = 0.0,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Sequence likelihood calibration: max(0, delta - logp_w + logp_l) - sft_weight * logp_w.

    Zhao et al., arXiv 2305.10425, Eq. 1 (SLiC-HF's rank loss and its regulariser on the chosen completion). No reference
    model; `rewards` are the log-probabilities.

    Args:
        delta: the margin, in nats, > 0.
        sft_weight: λ of the regulariser, >= 0.
    """
    check_pairs(chosen_logps, rejected_logps, sample_weight)
    check_positive(delta=delta)
    check_not_negative(sft_weight=sft_weight)
    per_example = F.relu(delta - chosen_logps + rejected_logps) - sft_weight * chosen_logps
    logps = (chosen_logps, rejected_logps)
    return pair_output(per_example, logps, logps, sample_weight)


def simpo_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    *,
    chosen_lengths: Tensor,  # [B] int
    rejected_lengths: Tensor,  # [B] int
    beta: float = 2.0,
    gamma: float = 1.0,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Simple preference optimization: -log sigmoid(beta * (logp_w/|y_w| - logp_l/|y_l|) - gamma).

    Meng et al., arXiv 2405.14734, Eq. 6. No reference model; `rewards` are beta * logp / |y|.

    Args:
        gamma: the target margin itself, in reward units, not its ratio to beta; >= 0.
    """
    check_pairs(chosen_logps, rejected_logps, sample_weight)
    check_lengths(chosen_logps.shape, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_positive(beta=beta)
    check_not_negative(gamma=gamma)
    chosen, rejected = beta * chosen_logps / chosen_lengths, beta * rejected_logps / rejected_lengths
    per_example = -F.logsigmoid(chosen - rejected - gamma)
    return pair_output(per_example, (chosen, rejected), (chosen_logps, rejected_logps), sample_weight)


def orpo_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    *,
    chosen_lengths: Tensor,  # [B] int
    rejected_lengths: Tensor,  # [B] int
    lam: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Odds ratio preference optimization: -logp_w/|y_w| - lam * log sigmoid(log odds_w - log odds_l).

    odds = p / (1 - p) of p = exp(logp / |y|). Hong et al., arXiv 2403.07691, Eq. 6 and 7. No reference model; `rewards`
    are the mean log-probabilities. A mean closer to 0 than the dtype's eps counts as -eps: its odds have no digits left.

    Args:
        lam: weight of the odds ratio term, >= 0.
    """
    check_pairs(chosen_logps, rejected_logps, sample_weight)
    check_lengths(chosen_logps.shape, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_not_negative(lam=lam)
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    log_odds = [x - log1mexp(x) for x in (y.clamp(max=-torch.finfo(y.dtype).eps) for y in (chosen, rejected))]
    per_example = -chosen - lam * F.logsigmoid(log_odds[0] - log_odds[1])
    return pair_output(per_example, (chosen, rejected), (chosen_logps, rejected_logps), sample_weight)


def rdpo_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    chosen_lengths: Tensor,  # [B] int
    rejected_lengths: Tensor,  # [B] int
    beta: float = 0.1,
    alpha: float = 0.01,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """DPO that charges for length: -log sigmoid(r_w - r_l + alpha * (|y_w| - |y_l|)).

    Park et al., arXiv 2403.19159, Eq. 9: a longer chosen completion has earned part of its margin by its length.

    Args:
        alpha: reward per token, >= 0.
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
    )  # fmt: skip
    check_lengths(chosen.shape, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_positive(beta=beta)
    check_not_negative(alpha=alpha)
    longer = (chosen_lengths - rejected_lengths).to(chosen.dtype)
    per_example = -F.logsigmoid(beta * (chosen - rejected) + alpha * longer)
    return pair_output(per_example, (beta * chosen, beta * rejected), (chosen_logps, rejected_logps), sample_weight)


def nca_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Noise contrastive alignment on pairs: -log sigmoid(r_w) - ½ (log sigmoid(-r_w) + log sigmoid(-r_l)).

    Chen et al., arXiv 2402.05369, as its authors' code has it; arXiv 2404.04656 prints it without the inner minus signs.
    """
    r_w, r_l = pair_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, sample_weight)
    per_example = -F.logsigmoid(r_w) - 0.5 * (F.logsigmoid(-r_w) + F.logsigmoid(-r_l))
    return pair_output(per_example, (r_w, r_l), (chosen_logps, rejected_logps), sample_weight)
