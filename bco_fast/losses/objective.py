"""What an objective needs of a row and of the reference, and how it is run on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .output import LossOutput, Reduction, reduction_weights, token_weights
from .reward_shift import RewardShift
from .sequence import sequence_logps


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
    batchwise: bool = False
    """Its costs depend on which pairs share a micro-batch, and belong to none of them."""
    part_weights: Mapping[str, float] = field(default_factory=dict)
    """Of a sum, the weights of its objectives by name (`sums`)."""

    @property
    def paired(self) -> bool:
        return self.data == "pairs"

    def run(
        self,
        token_logps: Tensor,  # [K]
        batch: Mapping[str, Tensor],
        settings: Mapping[str, float | str],
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
