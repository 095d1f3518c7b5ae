"""Objectives on log-probabilities: small, pure PyTorch functions of [B] vectors.

logps are sums over the tokens of a completion, in nats; nothing here knows how they were computed. The implicit reward
is r = beta * (logps - ref_logps). Unpaired objectives take `labels` (True for thumbs up) or scores, paired ones the
chosen and the rejected side. `OBJECTIVES` says by name what each of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .bnf import bnf_loss, bnf_weights
from .output import LossOutput
from .paired import dpo_loss, ipo_loss, nca_loss, orpo_loss, rdpo_loss, simpo_loss, slic_loss
from .paired import dpo_loss as una_pair_loss
from .reward_shift import RewardShift
from .unpaired import (
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
    "bce_loss",
    "bco_loss",
    "bnf_loss",
    "bnf_weights",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "nca_loss",
    "orpo_loss",
    "rdpo_loss",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
    "una_binary_bce_loss",
    "una_binary_mse_loss",
    "una_pair_loss",
    "una_reward_loss",
    "una_score_loss",
]


@dataclass(frozen=True)
class Objective:
    """What training by one objective needs; the hyper-parameters are the function's keywords and their defaults."""

    loss: Callable[..., LossOutput]
    data: Literal["labels", "scores", "rewards", "pairs"]
    """What it reads of a row: label; score in [0, 1]; score of any scale; chosen and rejected."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Hyper-parameters beside beta: field of `FeedbackConfig` -> keyword of the function."""
    beta: float | None = None
    """Default reward per nat; None where there is no beta."""
    reference: bool = True
    """Reads reference log-probabilities."""
    shift: Literal["", "fixed", "ema"] = ""
    """Default mode of its `RewardShift`; empty where δ has no place."""
    lengths: bool = False
    """Reads the number of tokens of each completion."""


OBJECTIVES: dict[str, Objective] = {
    "bco": Objective(bco_loss, "labels", beta=0.1, shift="ema"),
    "bce": Objective(bce_loss, "labels", beta=0.1),
    "kto": Objective(kto_loss, "labels", beta=0.1),
    "una_binary_mse": Objective(una_binary_mse_loss, "labels", beta=0.01, shift="fixed"),
    "una_binary_bce": Objective(una_binary_bce_loss, "labels", beta=0.01, shift="fixed"),
    "una_score": Objective(una_score_loss, "scores", beta=0.03, shift="fixed"),
    "una_reward": Objective(una_reward_loss, "rewards", beta=0.03, shift="ema"),
    "bnf": Objective(bnf_loss, "labels"),
    "sft": Objective(sft_loss, "labels", reference=False, lengths=True),
    "una_pair": Objective(una_pair_loss, "pairs", beta=0.1),
    "dpo": Objective(dpo_loss, "pairs", beta=0.1),
    "ipo": Objective(ipo_loss, "pairs", beta=0.1),
    "slic": Objective(slic_loss, "pairs", {"slic_delta": "delta", "sft_weight": "sft_weight"}, reference=False),
    "simpo": Objective(simpo_loss, "pairs", {"gamma": "gamma"}, beta=2.0, reference=False, lengths=True),
    "orpo": Objective(orpo_loss, "pairs", {"lam": "lam"}, reference=False, lengths=True),
    "rdpo": Objective(rdpo_loss, "pairs", {"alpha": "alpha"}, beta=0.1, lengths=True),
    "nca": Objective(nca_loss, "pairs", beta=0.1),
}


"""The objectives by the name that `FeedbackConfig(loss_type=...)` takes."""


LOSSES: dict[str, Callable[..., LossOutput]] = {name: objective.loss for name, objective in OBJECTIVES.items()}
