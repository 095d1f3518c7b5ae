"""Objectives on log-probabilities: small, pure PyTorch functions of [B] vectors.

logps are sums over the tokens of a completion, in nats; nothing here knows how they were computed. The implicit reward
is r = beta * (logps - ref_logps). Unpaired objectives take `labels` (True for thumbs up) or scores, paired ones the
chosen and the rejected side. `OBJECTIVES` says by name what each of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .bnf import bnf_loss, bnf_weights
from .output import LossOutput, Reduction, reduction_weights, token_weights
from .paired import dpo_loss, ipo_loss, nca_loss, orpo_loss, rdpo_loss, simpo_loss, slic_loss
from .paired import dpo_loss as una_pair_loss
from .preference import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    cpo_loss,
    discopop_loss,
    exo_pair_loss,
    robust_loss,
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
    "ipo_loss",
    "kto_loss",
    "nca_loss",
    "orpo_loss",
    "rdpo_loss",
    "robust_loss",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_hard_loss",
    "una_binary_bce_loss",
    "una_binary_mse_loss",
    "una_pair_loss",
    "una_reward_loss",
    "una_score_loss",
]


@dataclass(frozen=True)
class Objective:
    """What training by one objective needs, and how it is run on a batch. Hyper-parameters are the loss's keywords."""

    loss: Callable[..., LossOutput]
    data: Literal["labels", "scores", "rewards", "pairs"]
    """What it reads of a row: label; score in [0, 1]; score on any scale; chosen and rejected."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Hyper-parameters other than beta: field of `FeedbackConfig` -> keyword of the loss."""
    beta: float | None = None
    """Default reward per nat; None where there is no beta."""
    reference: bool = True
    """Reads reference log-probabilities."""
    shift: Literal["", "fixed", "ema"] = ""
    """Default mode of its `RewardShift`; empty where it has no δ."""
    lengths: bool | None = False
    """Reads the number of tokens of each completion; None: if `length_normalized` asks for it."""
    per_token: bool = False
    """Reads the log-probability of every token, the reference's too, and the entropy."""
    mismatched: bool = False
    """Reads the mean log-ratio of mismatched completions (z_ref of KTO)."""
    mean_over_tokens: bool = False
    """The loss is a mean over the tokens of thumbs up, not over rows."""

    @property
    def paired(self) -> bool:
        return self.data == "pairs"

    def run(
        self,
        token_logps: Tensor,  # [K]
        batch: Mapping[str, Tensor],
        settings: Mapping[str, float],
        *,
        entropy: Tensor | None = None,  # [K]
        z_ref: Tensor | None = None,
        shift: RewardShift | None = None,
        observe: bool = False,
        class_weights: tuple[float, float] = (1.0, 1.0),
    ) -> LossOutput:
        """The objective on a batch of the form of `data.batch`. Its metrics are weighted as `weights` weighs the costs.

        Args:
            token_logps: log-probability of each of the batch's targets, nats; carries the gradient.
            settings: beta and the objective's own hyper-parameters, by keyword of the loss.
            entropy: needed by a `per_token` objective.
            z_ref: needed by a `mismatched` one: the mean log-ratio over all mismatched completions of the step.
            shift: needed by one with a `shift`.
            observe: the shift takes these rewards in.
            class_weights: λ of thumbs up and of thumbs down.
        """
        out = self._out(token_logps, batch, settings, entropy, z_ref, shift, observe, class_weights)
        return replace(out, weight=_row_weights(batch, (1.0, 1.0) if self.paired else class_weights))

    def _out(self, token_logps, batch, settings, entropy, z_ref, shift, observe, class_weights) -> LossOutput:
        cu_completions, labels = batch["cu_completions"], batch["label"]
        if self.per_token:
            references = batch["ref_token_logps"]
            return self.loss(token_logps, references, labels, cu_seqlens=cu_completions, entropy=entropy, **settings)
        logps = sequence_logps(token_logps, cu_seqlens=cu_completions)
        lengths = cu_completions.diff()
        references = (batch["ref_logps"],) if self.reference else ()
        if self.paired:
            by_length = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
            references = [side for reference in references for side in reference.chunk(2)]
            return self.loss(*logps.chunk(2), *references, **settings, **(by_length if self.lengths else {}))
        options = dict(settings)
        if self.mismatched:
            options["kl"] = z_ref
        if self.shift:
            options["delta"] = shift
            if observe:
                rewards = settings["beta"] * (logps.detach() - batch["ref_logps"])
                found = rewards - batch["score"] if self.data == "rewards" else rewards
                shift.observe(found, labels, _row_weights(batch, class_weights))
        facts = labels if self.data == "labels" else batch["score"]
        return self.loss(logps, *references, facts, *((lengths,) if self.lengths else ()), **options)

    def weights(
        self,
        batch: Mapping[str, Tensor],
        counts: Tensor,  # [3]
        *,
        reduction: Reduction = "mean",
        class_weights: tuple[float, float] = (1.0, 1.0),
    ) -> Tensor:  # [B] float64, or one for each pair
        """What each row's cost is multiplied by, so that the sum is the loss of all the rows that `counts` counts.

        Args:
            counts: thumbs up, thumbs down and tokens of thumbs up in the whole optimizer step (`data.batch`).
            class_weights: λ of thumbs up and of thumbs down.
        """
        rows = len(batch["label"]) // (1 + self.paired)
        labels, weight = batch["label"][:rows], batch["weight"][:rows].double()
        if self.mean_over_tokens:
            return token_weights(labels, batch["cu_completions"].diff()[:rows], weight, counts[2])
        return reduction_weights(labels, weight * torch.where(labels, *class_weights), reduction, counts[0], counts[1])


def _row_weights(batch: Mapping[str, Tensor], class_weights: tuple[float, float]) -> Tensor:  # [B] float64
    """What multiplies each row's cost: its weight and its class's λ."""
    return batch["weight"].double() * torch.where(batch["label"], *class_weights)


_SMOOTHED = {"label_smoothing": "label_smoothing"}

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
    "dpo": Objective(dpo_loss, "pairs", _SMOOTHED, beta=0.1),
    "ipo": Objective(ipo_loss, "pairs", beta=0.1, lengths=None),
    "slic": Objective(slic_loss, "pairs", {"slic_delta": "delta", "sft_weight": "sft_weight"}, reference=False),
    "simpo": Objective(simpo_loss, "pairs", {"gamma": "gamma"}, beta=2.0, reference=False, lengths=True),
    "orpo": Objective(orpo_loss, "pairs", {"lam": "lam"}, reference=False, lengths=True),
    "rdpo": Objective(rdpo_loss, "pairs", {"alpha": "alpha"}, beta=0.1, lengths=True),
    "nca": Objective(nca_loss, "pairs", beta=0.1),
    "robust": Objective(robust_loss, "pairs", _SMOOTHED, beta=0.1),
    "exo_pair": Objective(exo_pair_loss, "pairs", {"exo_epsilon": "epsilon"}, beta=0.1),
    "sppo_hard": Objective(sppo_hard_loss, "pairs", beta=0.1),
    "bco_pair": Objective(bco_pair_loss, "pairs", beta=0.1),
    "apo_zero": Objective(apo_zero_loss, "pairs", beta=0.1),
    "apo_down": Objective(apo_down_loss, "pairs", beta=0.1),
    "discopop": Objective(discopop_loss, "pairs", {"discopop_tau": "tau"}, beta=0.1),
    "cpo": Objective(cpo_loss, "pairs", {"nll_weight": "nll_weight"}, beta=0.1, reference=False, lengths=True),
    "apo_zero_unpaired": Objective(apo_zero_unpaired_loss, "labels", beta=0.1),
}


"""The objectives by the name that `FeedbackConfig(loss_type=...)` takes."""


LOSSES: dict[str, Callable[..., LossOutput]] = {name: objective.loss for name, objective in OBJECTIVES.items()}
