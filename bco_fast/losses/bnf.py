"""Objectives on log-probabilities: small, pure PyTorch functions of [B] vectors.

logps are sums over the tokens of a completion, in nats; nothing here knows how they were computed. The implicit reward
is r = beta * (logps - ref_logps). Unpaired objectives take `labels` (True for thumbs up) or scores, paired ones the
chosen and the rejected side. `OBJECTIVES` says by name what each of them needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    check_labels,
    check_reference,
    check_vectors,
    check_weight,
)
from .output import LossOutput, Reduction, reduce
from .sequence import log1mexp, sequence_logps


def bnf_weights(
    token_logps: Tensor,  # any shape
    ref_token_logps: Tensor,
) -> Tensor:
    """w = min(1, odds / odds_ref) of each token, odds = p / (1 - p); never differentiated, float64.

    With f = min(p/p_ref, 1), Eq. 6 of arXiv 2410.04834 gives every other token the factor (f - p) / (1 - p) = w in the
    gradient, and the given token w (1 - p): one weight on the log-probability's own gradient. In log space, because
    p -> 1 is the common case.
    """
    with torch.no_grad():
        logp, ref = (x.detach().double().clamp(max=0) for x in (token_logps, ref_token_logps))
        inside = logp < ref  # elsewhere w = 1; 0 - 0 of two certain tokens would be NaN
        log_odds = [x - log1mexp(x) for x in (torch.where(inside, logp, -1.0), torch.where(inside, ref, -1.0))]
        return torch.where(inside, torch.exp(log_odds[0] - log_odds[1]), 1.0)


def bnf_loss(
    token_logps: Tensor,  # [B, T], or [total] with cu_seqlens
    ref_token_logps: Tensor,  # the shape of token_logps
    labels: Tensor,  # [B] bool
    *,
    mask: Tensor | None = None,  # [B, T] bool
    cu_seqlens: Tensor | None = None,  # [B + 1]
    entropy: Tensor | None = None,  # the shape of token_logps
    sample_weight: Tensor | None = None,  # [B]
    reduction: Reduction = "mean",
) -> LossOutput:
    """Bidirectional negative feedback: one completion costs, with label = ±1,

        -label/|y| Σ_t Σ_k target_t(k) log π_t(k)    =    -label/|y| Σ_t [ w_t logp_t - (1 - w_t) H_t ]

    The dynamic target distribution (Eq. 6) gives the token y_t the probability min(π/π_ref, 1) and spreads the rest as
    the policy does; it is constant under the gradient, which is then that of w_t logp_t (`bnf_weights`).

    Mao et al., arXiv 2410.04834, Eq. 4 to 9. (The listing in its Appendix B omits the minus of Eq. 4.)

    Args:
        token_logps: per-token log-probabilities of the policy, nats; carries the gradient.
        ref_token_logps: the same under the reference; constant.
        mask: True for completion tokens; needed for a padded batch.
        cu_seqlens: cumulative lengths of a batch packed without padding; with a mask, |y| counts its tokens only.
        entropy: H of the policy at each position, nats, as `fused_linear_logps(return_entropy=True)` gives it. Without
            it the loss value lacks the term (1 - w) H; the gradient is the same.

    Returns:
        `rewards` are the summed log-ratios in nats (BNF has no beta); the rest as in `bco_loss`.

    Raises:
        TypeError, ValueError: as `bco_loss`; and a completion with no token, by row.
    """
    for name, other in (("ref_token_logps", ref_token_logps), ("entropy", entropy)):
        if other is not None and other.shape != token_logps.shape:
            raise ValueError(
                f"{name} {list(other.shape)} and token_logps {list(token_logps.shape)} must have one shape"
            )
    if mask is None and cu_seqlens is None:
        raise ValueError("bnf_loss needs mask (padded), cu_seqlens (packed) or both: |y| is the number of tokens")
    check_reference(ref_token_logps=ref_token_logps)
    where = {"mask": mask, "cu_seqlens": cu_seqlens}
    weights = bnf_weights(token_logps, ref_token_logps)
    terms = weights * token_logps
    if entropy is not None:
        terms = terms - (1 - weights) * entropy.detach()
    means = sequence_logps(terms, **where, reduction="mean").to(token_logps.dtype)
    logps, ref_logps = (sequence_logps(x.detach(), **where) for x in (token_logps, ref_token_logps))
    check_labels(labels, means.shape, means.device)
    check_vectors(like="logps", logps=logps, ref_logps=ref_logps, means=means.detach(), sample_weight=sample_weight)
    check_weight(sample_weight)
    per_example = torch.where(labels, -means, means)
    loss = reduce(per_example, labels, sample_weight, reduction)
    return LossOutput(loss, per_example, logps - ref_logps, logps, labels, weight=sample_weight)
