"""Objectives on log-probabilities: small, pure PyTorch functions of [B] vectors.

logps are sums over the tokens of a completion, in nats; nothing here knows how they were computed. The implicit reward
is r = beta * (logps - ref_logps). Unpaired objectives take `labels` (True for thumbs up) or scores, paired ones the
chosen and the rejected side. `OBJECTIVES` says by name what each of them needs.
"""

from __future__ import annotations

from collections.abc import Callable

from .bnf import bnf_loss, bnf_weights
from .objective import Objective
from .output import LossOutput
from .paired import dpo_loss, ipo_loss, nca_loss, orpo_loss, rdpo_loss, simpo_loss, slic_loss
from .paired import dpo_loss as una_pair_loss
from .preference import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    cpo_loss,
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    robust_loss,
    sigmoid_norm_loss,
    sppo_hard_loss,
)
from .reward_shift import RewardShift
from .sequence import sequence_logps
from .unpaired import (
    apo_zero_unpaired_loss,
    bce_loss,
    bco_loss,
    kto_loss,
    sft_loss,
    una_binary_bce_loss,
    una_binary_mse_loss,
    una_reward_loss,
    una_score_loss,
)

__all__ = [
    "LOSSES",
    "OBJECTIVES",
    "LossOutput",
    "Objective",
    "RewardShift",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bce_loss",
    "bco_loss",
    "bco_pair_loss",
    "bnf_loss",
    "bnf_weights",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_pair_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "nca_loss",
    "orpo_loss",
    "rdpo_loss",
    "robust_loss",
    "sequence_logps",
    "sft_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_hard_loss",
    "una_binary_bce_loss",
    "una_binary_mse_loss",
    "una_pair_loss",
    "una_reward_loss",
    "una_score_loss",
]


_SMOOTHED = {"label_smoothing": "label_smoothing"}
_DIVERGENCE = {"f_divergence_type": "divergence", "f_alpha_divergence_coef": "divergence_alpha"}

OBJECTIVES: dict[str, Objective] = {
    "bco": Objective(bco_loss, "labels", beta=0.1, shift="ema"),
    "bce": Objective(bce_loss, "labels", beta=0.1),
    "kto": Objective(kto_loss, "labels", beta=0.1, mismatched=True),
    "una_binary_mse": Objective(una_binary_mse_loss, "labels", beta=0.01, shift="fixed"),
    "una_binary_bce": Objective(una_binary_bce_loss, "labels", beta=0.01, shift="fixed"),
    "una_score": Objective(una_score_loss, "scores", beta=0.03, shift="fixed"),
    "una_reward": Objective(una_reward_loss, "rewards", beta=0.03, shift="ema"),
    "bnf": Objective(bnf_loss, "labels", per_token=True),
    "sft": Objective(sft_loss, "labels", reference=False, lengths=True, mean_over_tokens=True),
    "una_pair": Objective(una_pair_loss, "pairs", beta=0.03),
    "dpo": Objective(dpo_loss, "pairs", _SMOOTHED | _DIVERGENCE, beta=0.1),
    "ipo": Objective(ipo_loss, "pairs", _DIVERGENCE, beta=0.1, lengths=None),
    "slic": Objective(slic_loss, "pairs", {"slic_delta": "delta", "sft_weight": "sft_weight"}, reference=False),
    "simpo": Objective(simpo_loss, "pairs", {"gamma": "gamma"}, beta=2.0, reference=False, lengths=True),
    "orpo": Objective(orpo_loss, "pairs", {"lam": "lam"}, reference=False, lengths=True),
    "rdpo": Objective(rdpo_loss, "pairs", {"alpha": "alpha"}, beta=0.1, lengths=True),
    "nca": Objective(nca_loss, "pairs", beta=0.1),
    "robust": Objective(robust_loss, "pairs", _SMOOTHED | _DIVERGENCE, beta=0.1),
    "exo_pair": Objective(exo_pair_loss, "pairs", {"exo_epsilon": "epsilon"} | _DIVERGENCE, beta=0.1),
    "hinge": Objective(hinge_loss, "pairs", _DIVERGENCE, beta=0.1),
    "sigmoid_norm": Objective(sigmoid_norm_loss, "pairs", _DIVERGENCE, beta=0.1, lengths=True),
    "aot": Objective(aot_loss, "pairs", _SMOOTHED, beta=0.1, batchwise=True),
    "aot_unpaired": Objective(aot_unpaired_loss, "pairs", _SMOOTHED, beta=0.1, batchwise=True),
    "sppo_hard": Objective(sppo_hard_loss, "pairs", beta=0.1),
    "bco_pair": Objective(bco_pair_loss, "pairs", beta=0.1),
    "apo_zero": Objective(apo_zero_loss, "pairs", beta=0.1),
    "apo_down": Objective(apo_down_loss, "pairs", beta=0.1),
    "discopop": Objective(discopop_loss, "pairs", {"discopop_tau": "tau"} | _DIVERGENCE, beta=0.1),
    "cpo": Objective(cpo_loss, "pairs", {"nll_weight": "nll_weight"}, beta=0.1, reference=False, lengths=True),
    "apo_zero_unpaired": Objective(apo_zero_unpaired_loss, "labels", beta=0.1),
}
"""The objectives by the name that `FeedbackConfig(loss_type=...)` takes."""

LOSSES: dict[str, Callable[..., LossOutput]] = {name: objective.loss for name, objective in OBJECTIVES.items()}
