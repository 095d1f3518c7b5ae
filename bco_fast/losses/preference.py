"""Further objectives on pairs, most of them from TRL's DPOTrainer. Arguments and errors are those of `paired`.

x = r_w - r_l stands for the margin, r_y = beta * (logps_y - ref_logps_y) for the reward of a completion. Where there is an
option `divergence`, x is beta * (f'(u_w) - f'(u_l)) of `divergence_scores`; the logged rewards stay r.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_fraction, check_lengths, check_not_negative, check_positive
from .divergence import Divergence, divergence_scores
from .output import LossOutput
from .paired import check_pairs, log_ratios, pair_margin, pair_output, pair_rewards, smoothed


def robust_loss(
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
    """DPO whose expectation does not change when pairs are turned round: (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e).

    Chowdhury et al., arXiv 2403.00409.

    Args:
        label_smoothing: e, the share of pairs that are the wrong way round, in [0, 0.5).
    """
    x, rewards = pair_margin(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, divergence, divergence_alpha, sample_weight
    )  # fmt: skip
    check_fraction(0.5, label_smoothing=label_smoothing)
    cost = -(1 - label_smoothing) * F.logsigmoid(x) + label_smoothing * F.logsigmoid(-x)
    return pair_output(cost / (1 - 2 * label_smoothing), rewards, (chosen_logps, rejected_logps), sample_weight)


def exo_pair_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    epsilon: float = 1e-3,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Efficient exact optimization on pairs: KL(p || q) of p = (sigmoid(x), sigmoid(-x)) and q = (1 - epsilon, epsilon).

    Ji et al., arXiv 2402.00856, Eq. 16.

    Args:
        epsilon: probability that q leaves to the rejected completion, in (0, 0.5).
    """
    x, rewards = pair_margin(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, divergence, divergence_alpha, sample_weight
    )  # fmt: skip
    check_positive(epsilon=epsilon)
    check_fraction(0.5, epsilon=epsilon)
    win = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-epsilon))
    lose = torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(epsilon))
    return pair_output(win + lose, rewards, (chosen_logps, rejected_logps), sample_weight)


def sppo_hard_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Self-play preference optimization with certain winners: (h_w - 1/(2 beta))² + (h_l + 1/(2 beta))², h the log-ratio.

    Wu et al., arXiv 2405.00675, Eq. 4.7 with P = 1 for the winner and 0 for the loser; their eta is 1 / beta.
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
    )  # fmt: skip
    check_positive(beta=beta)
    cost = (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    return pair_output(cost, (beta * chosen, beta * rejected), (chosen_logps, rejected_logps), sample_weight)


def bco_pair_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Both sides by the binary cross-entropy of their label: -log sigmoid(r_w) - log sigmoid(-r_l).

    Jung et al., arXiv 2404.04656, §5 (`bce_loss`), on pairs; TRL's name for it. It has no shift.
    """
    chosen, rejected = pair_rewards(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, sample_weight
    )
    cost = -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
    return pair_output(cost, (chosen, rejected), (chosen_logps, rejected_logps), sample_weight)


def apo_zero_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Anchored preference optimization, up and down: sigmoid(-r_w) + sigmoid(r_l).

    D'Oosterlinck et al., arXiv 2408.06266, Eq. 7 up to a constant: for chosen completions better than the model's own.
    """
    chosen, rejected = pair_rewards(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, sample_weight
    )
    cost = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    return pair_output(cost, (chosen, rejected), (chosen_logps, rejected_logps), sample_weight)


def apo_down_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Anchored preference optimization, both down: sigmoid(r_w) + sigmoid(-x).

    D'Oosterlinck et al., arXiv 2408.06266, Eq. 8 up to a constant: for chosen completions worse than the model's own.
    """
    chosen, rejected = pair_rewards(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, sample_weight
    )
    cost = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
    return pair_output(cost, (chosen, rejected), (chosen_logps, rejected_logps), sample_weight)


def discopop_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """The log-ratio modulated loss: -(1 - m) log sigmoid(x) + m exp(-x), with m = sigmoid(x / tau).

    Lu et al., arXiv 2406.08414, Eq. 5, found by a language model. For x << 0 the product m exp(-x) is one exponential,
    because its factors would be 0 and infinity.

    Args:
        tau: temperature of the modulation, in (0, 1).
    """
    x, rewards = pair_margin(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, divergence, divergence_alpha, sample_weight
    )  # fmt: skip
    check_positive(tau=tau)
    check_fraction(1.0, tau=tau)
    cost = -torch.sigmoid(-x / tau) * F.logsigmoid(x) + torch.exp(F.logsigmoid(x / tau) - x)
    return pair_output(cost, rewards, (chosen_logps, rejected_logps), sample_weight)


def hinge_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """The margin loss of SLiC on log-ratios to a reference: max(0, 1 - x).

    Liu et al., arXiv 2309.06657 (RSO), the hinge on normalized likelihoods. `slic_loss` is the one without a reference.
    """
    x, rewards = pair_margin(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, divergence, divergence_alpha, sample_weight
    )  # fmt: skip
    return pair_output(F.relu(1 - x), rewards, (chosen_logps, rejected_logps), sample_weight)


def sigmoid_norm_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    chosen_lengths: Tensor,  # [B] int
    rejected_lengths: Tensor,  # [B] int
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """DPO normalized by length: -log sigmoid(r_w / |y_w| - r_l / |y_l|).

    Lambert et al., arXiv 2411.15124 (Tülu 3); TRL's name for it. `rewards` are r, not divided by lengths. A beta of 5, as in
    that paper, does for means over tokens what 0.1 does for sums.
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
    )  # fmt: skip
    check_lengths(chosen.shape, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_positive(beta=beta)
    f_chosen, f_rejected = divergence_scores(chosen, rejected, divergence=divergence, alpha=divergence_alpha)
    cost = -F.logsigmoid(beta * (f_chosen / chosen_lengths - f_rejected / rejected_lengths))
    return pair_output(cost, (beta * chosen, beta * rejected), (chosen_logps, rejected_logps), sample_weight)


def aot_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Alignment by optimal transport on pairs: DPO on sorted margins, -log sigmoid(beta * (m_(i) - m_ref(i))).

    m_(i) is the i-th smallest logp_w - logp_l of these B pairs, m_ref(i) that of the reference. Melnyk et al., arXiv
    2406.05882, paired. `per_example` is in that order, so costs belong to no pair and take no weights; the loss depends on
    which pairs are in one call.

    Args:
        label_smoothing: see `dpo_loss`.
    """
    rewards = pair_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, None)
    margins, ref_margins = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
    cost = _sorted_costs(beta * margins, beta * ref_margins, label_smoothing)
    return pair_output(cost, rewards, (chosen_logps, rejected_logps), None)


def aot_unpaired_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor,  # [B]
    ref_rejected_logps: Tensor,  # [B]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Alignment by optimal transport of all chosen against all rejected: -log sigmoid(r_w(i) - r_l(i)), each side sorted.

    Melnyk et al., arXiv 2406.05882, unpaired. What is said of `aot_loss` holds here.
    """
    rewards = pair_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, None)
    cost = _sorted_costs(*rewards, label_smoothing)
    return pair_output(cost, rewards, (chosen_logps, rejected_logps), None)


def _sorted_costs(high: Tensor, low: Tensor, label_smoothing: float) -> Tensor:
    check_fraction(0.5, label_smoothing=label_smoothing)
    return smoothed(high.sort().values - low.sort().values, label_smoothing)


def cpo_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    *,
    chosen_lengths: Tensor,  # [B] int
    rejected_lengths: Tensor,  # [B] int
    beta: float = 0.1,
    nll_weight: float = 1.0,
    sample_weight: Tensor | None = None,  # [B]
) -> LossOutput:
    """Contrastive preference optimization: -log sigmoid(beta * (logp_w - logp_l)) - nll_weight * logp_w / |y_w|.

    Xu et al., arXiv 2401.08417, Eq. 3 and its likelihood term; no reference model. Their second term is a sum over tokens; like TRL's it is a mean
    here, which keeps its weight the same for long completions. `rewards` are beta * logp.

    Args:
        nll_weight: of the chosen completion's likelihood, >= 0.
    """
    check_pairs(chosen_logps, rejected_logps, sample_weight)
    check_lengths(chosen_logps.shape, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    check_positive(beta=beta)
    check_not_negative(nll_weight=nll_weight)
    chosen, rejected = beta * chosen_logps, beta * rejected_logps
    cost = -F.logsigmoid(chosen - rejected) - nll_weight * chosen_logps / chosen_lengths
    return pair_output(cost, (chosen, rejected), (chosen_logps, rejected_logps), sample_weight)
