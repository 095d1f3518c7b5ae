"""A weighted sum of objectives on the same rows, such as mixed preference optimization (MPO)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import OBJECTIVES
from .objective import Objective
from .output import LossOutput


@dataclass(frozen=True)
class Sum(Objective):
    """Several objectives as one; with weights 0.8, 0.2 and 1, dpo, bco and sft are MPO (Wang et al., arXiv 2411.10442).

    On pairs, an objective for thumbs costs the sum of a pair's two sides: `bco` without δ is then `bco_pair`, and `sft` is
    that of the chosen completions. `per_example` and `weights` are [P, B], a row for each objective.
    """

    parts: Mapping[str, Objective] = field(default_factory=dict)

    def run(self, token_logps, batch, settings, **state) -> LossOutput:
        """As `Objective.run`; `settings` are those of each objective, by its name. Rewards and δ are those of the objective
        with a δ, else of the first with a reference, else of the first."""
        outs = {name: part.run(token_logps, batch, settings[name], **state) for name, part in self.parts.items()}
        costs, means = [], []
        for name, part in self.parts.items():
            out = outs[name]
            folded = self.paired and not part.paired
            costs.append(sum(out.per_example.chunk(2)) if folded else out.per_example)
            means.append(costs[-1].mean() if folded and not part.mean_over_tokens else out.loss)
        lead = max(self.parts, key=lambda name: (bool(self.parts[name].shift), self.parts[name].reference))
        total = sum(weight * mean for weight, mean in zip(self.part_weights.values(), means, strict=True))
        return replace(outs[lead], loss=total, per_example=torch.stack(costs), paired=self.paired)

    def weights(self, batch, counts, **weighting) -> Tensor:  # [P, B] float64
        rows = (replace(part, data=self.data).weights(batch, counts, **weighting) for part in self.parts.values())
        return torch.stack([weight * row for weight, row in zip(self.part_weights.values(), rows, strict=True)])


def find_objective(loss_type: str, weights: Sequence[float] | None = None) -> Objective:
    """The objective of a name, or the sum of those whose names are joined by "+".

    Args:
        weights: of each part of a sum; None for 1.

    Raises:
        ValueError: a name is unknown or given twice; the weights are not one positive number a part; the parts do not go
            together.
    """
    names = loss_type.split("+")
    for name in names:
        if name not in OBJECTIVES:
            raise ValueError(f"loss_type must be one or several of {', '.join(OBJECTIVES)}, not {name!r}")
    if weights is None:
        weights = [1.0] * len(names)
    elif len(names) == 1 or len(weights) != len(names):
        raise ValueError(
            f"loss_weights needs several loss_types and one number for each, not {len(weights)} for {len(names)}"
        )
    if len(names) == 1:
        return OBJECTIVES[loss_type]
    if len(set(names)) < len(names):
        raise ValueError(f"loss_type names an objective twice: {', '.join(names)}")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"loss_weights must be > 0, not {', '.join(f'{weight:g}' for weight in weights)}")
    parts = {name: OBJECTIVES[name] for name in names}
    return _sum_of(parts, dict(zip(names, map(float, weights), strict=True)))


def _sum_of(parts: dict[str, Objective], weights: dict[str, float]) -> Sum:
    kinds = {part.data for part in parts.values()}
    if len(kinds) > 1 and kinds != {"labels", "pairs"}:
        read = ", ".join(f"{name} reads {part.data}" for name, part in parts.items())
        raise ValueError(f"loss_type: a sum reads one kind of data, and {read}")
    for name, part in parts.items():
        if part.mismatched:
            raise ValueError(
                f"loss_type: {name} cannot be part of a sum, because its costs need a second forward pass; take bco"
            )
    if len(shifted := [name for name, part in parts.items() if part.shift]) > 1:
        raise ValueError(f"loss_type: a run has one δ, and {' and '.join(shifted)} have one each")
    return Sum(
        loss=_run_on_batches,
        data="pairs" if "pairs" in kinds else kinds.pop(),
        options={field: keyword for part in parts.values() for field, keyword in part.options.items()},
        beta=next((part.beta for part in parts.values() if part.beta is not None), None),
        reference=any(part.reference for part in parts.values()),
        shift=next((part.shift for part in parts.values() if part.shift), ""),
        lengths=None if any(part.lengths is None for part in parts.values()) else False,
        per_token=any(part.per_token for part in parts.values()),
        mean_over_tokens=all(part.mean_over_tokens for part in parts.values()),
        batchwise=any(part.batchwise for part in parts.values()),
        part_weights=weights,
        parts=parts,
    )


def _run_on_batches(*args, **options) -> LossOutput:
    raise TypeError("a sum of objectives is run on batches; as functions, add the objectives' losses")
