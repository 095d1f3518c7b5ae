"""Other divergences than the reverse KL between policy and reference (f-DPO)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_finite

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

DIVERGENCES: tuple[str, ...] = get_args(Divergence)

LARGEST_EXPONENT = 80.0
"""e^80 and its products with a reward are finite in float32. Beyond, a score stays what it is there."""


def divergence_scores(
    *log_ratios: Tensor,  # [B] each
    divergence: Divergence,
    alpha: float,
) -> list[Tensor]:  # [B] each
    """f'(u), up to a constant, where u = exp(log_ratio) is the policy's probability over the reference's.

        reverse_kl          log u
        forward_kl          1 - 1/u
        js_divergence       log(2u / (1 + u))
        alpha_divergence    (u^(alpha - 1) - 1) / (alpha - 1);  alpha 0 is forward_kl, 1 is reverse_kl

    Under another divergence than the reverse KL, the reward of a completion is beta * f'(u) plus a term of its prompt
    alone, so the margin of a pair is beta * (f'(u_w) - f'(u_l)). Wang et al., arXiv 2309.16240, Table 1; their α is
    1 - alpha, which is TRL's `f_alpha_divergence_coef`.

    Raises:
        ValueError: `divergence` is none of these, or alpha is not finite.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    check_finite(divergence_alpha=alpha)
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and alpha == 1):
        return list(log_ratios)
    if divergence == "js_divergence":
        return [math.log(2) + F.logsigmoid(h) for h in log_ratios]
    power = -1.0 if divergence == "forward_kl" else alpha - 1
    return [torch.expm1((power * h).clamp(max=LARGEST_EXPONENT)) / power for h in log_ratios]
