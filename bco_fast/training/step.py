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

from ..data.batch import Batch, continued, mismatched_batch
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
    """Mean log-ratio of the mismatched completions, before it is clamped; known once `reference_point` has run."""
    begun: bool = False

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Step:
        """Count the rows of these micro-batches and of the other ranks'."""
        counts = torch.stack([batch["counts"] for batch in batches]).sum(0)
        filled = sum("placeholder" not in batch for batch in batches)
        *counts, filled = all_reduce(torch.cat([counts, counts.new_full((1,), filled)]))
        return cls(batches, torch.stack(counts), filled)

    def begin(self, model: nn.Module, *, mismatched: bool) -> bool:
        """Before the forward pass of a micro-batch; -> whether it is the first one."""
        begins, self.begun = not self.begun, True
        if begins and mismatched and not any(map(continued, self.batches)):
            self.reference_point(model)
        return begins

    def reference_point(self, model: nn.Module) -> Tensor:
        """`z_ref`, computed by the first call. Where mismatched completions continue the prompts of the step's only
        micro-batch, that call comes after its forward pass."""
        if self.z_ref is None:
            self.z_ref = mean_log_ratio(model, self.batches)
        return self.z_ref

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
    if continued(batch):  # a second pass through DDP would write into buffers that the backward of the first one reads
        model = getattr(model, "module", model)
    sums = completion_sums(model, kl)
    if continued(batch):
        batch["segments"].kept = None  # a checkpointed layer, run again in the backward, has nobody to keep them for
    return (sums - kl["ref_logps"]).double()
