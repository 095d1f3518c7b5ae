"""An optimizer step of an objective on feedback, as a sum over its micro-batches.

The loss of a step is the objective's loss of all its rows together, however they are cut into micro-batches and spread
over ranks. For that, a micro-batch needs to know three things of the whole step before it starts: the sizes of the two
classes, the tokens of thumbs up, and KTO's z_ref.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batch import Batch, mismatched_batch
from ..losses.sequence import sequence_logps
from ..models.patch import completion_logps
from ..reference.ranks import all_reduce


@dataclass
class Step:
    """What a micro-batch must know of the whole optimizer step it belongs to, over all ranks."""

    batches: Sequence[Batch]
    """This rank's micro-batches, on their device."""
    counts: Tensor
    """[3]: thumbs up, thumbs down, tokens of thumbs up (`data.batch`)."""
    micro_batches: Tensor | int = 1
    """Micro-batches of all ranks, without placeholders."""
    z_ref: Tensor | None = None
    """Mean log-ratio of the mismatched completions, before it is clamped; known once the step has begun."""
    begun: bool = False

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Step:
        """Count the rows of these micro-batches and of the other ranks'."""
        counts = torch.stack([batch["counts"] for batch in batches]).sum(0)
        filled = sum("placeholder" not in batch for batch in batches)
        *counts, filled = all_reduce(torch.cat([counts, counts.new_full((1,), filled)]))
        return cls(batches, torch.stack(counts), filled)

    @classmethod
    def alone(cls, batch: Batch) -> Step:
        """A batch that is a step by itself, on this rank."""
        return cls([batch], batch["counts"])


def completion_sums(model: nn.Module, batch: Batch) -> Tensor:  # [B]
    """Summed log-probability of each completion under a patched model, nats."""
    return sequence_logps(completion_logps(model, batch), cu_seqlens=batch["cu_completions"])


@torch.no_grad()
def mean_log_ratio(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean log-ratio of the mismatched completions of these batches, on all ranks: KTO's z_ref before the clamp."""
    ratios = []
    for batch in batches:
        ratios.append(mismatched_log_ratios(model, batch)[: 0 if "placeholder" in batch else None])
    ratios = torch.cat(ratios)
    total, rows = all_reduce(torch.stack([ratios.sum(), torch.ones_like(ratios).sum()]))
    return (total / rows).float()


def mismatched_log_ratios(model: nn.Module, batch: Batch) -> Tensor:  # [B] float64
    """Log-ratio of each mismatched completion of a batch, nats."""
    kl = mismatched_batch(batch)
    return (completion_sums(model, kl) - kl["ref_logps"]).double()
