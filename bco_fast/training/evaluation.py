"""Metrics of a whole evaluation set, from numbers that every batch of it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batch import Batch
from ..losses import LossOutput, Objective
from ..losses.metrics import auc, unpaired_metrics, unpaired_sums

COLUMNS = ("rewards", "logps", "threshold", "weight", "ref_logps", "mismatched", "lengths")
FIRST_COST = 2
"""Before this column come the costs, as many as the objective has parts."""


def evaluation_rows(out: LossOutput, batch: Batch, mismatched: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What evaluation keeps of a batch: numbers [items, sides, COLUMNS + P] float64, and labels [items, sides] bool.

    One row for each item of the dataset, so that gathering over ranks can drop what padded the last batch.

    Args:
        mismatched: [B], KTO's log-ratios of mismatched completions.
    """
    sides = 1 + out.paired
    columns = {
        "rewards": out.rewards,
        "logps": out.logps,
        "threshold": torch.zeros_like(out.rewards) + out.threshold,
        "weight": batch["weight"],
        "lengths": batch["cu_completions"].diff(),
        "ref_logps": batch["ref_logps"],
        "mismatched": torch.zeros_like(out.rewards) if mismatched is None else mismatched,
    }
    kept = [columns[name] for name in COLUMNS]
    kept[FIRST_COST:FIRST_COST] = torch.atleast_2d(out.per_example).repeat(1, sides)
    rows = torch.stack([column.detach().double() for column in kept], dim=-1)
    return torch.stack(rows.chunk(sides), dim=1), torch.stack(out.labels.chunk(sides), dim=1)


def evaluation_metrics(
    columns: Tensor,  # [items, sides, COLUMNS + P]
    labels: Tensor,  # [items, sides] bool
    objective: Objective,
    settings: Mapping[str, float],
    **weighting,
) -> dict[str, float | Tensor]:
    """Loss and metrics of all rows together: no mean of means over batches.

    KTO's z_ref is that of the whole set, so its costs are computed here.

    Args:
        settings: of `Objective.run`.
        weighting: `reduction` and `class_weights` of `Objective.weights`.
    """
    rows = list(columns.transpose(0, 1).flatten(0, 1).unbind(-1))
    last_cost = len(rows) - len(COLUMNS) + FIRST_COST
    costs, rows[FIRST_COST:last_cost] = torch.stack(rows[FIRST_COST:last_cost]), []
    found = dict(zip(COLUMNS, rows, strict=True))
    labels, paired = labels.T.flatten(), objective.paired
    if objective.mismatched:
        out = objective.loss(found["logps"], found["ref_logps"], labels, kl=found["mismatched"].mean(), **settings)
        costs, found["threshold"] = out.per_example[None], torch.zeros_like(out.rewards) + out.threshold
    up, down = labels.sum(), (~labels).sum()
    counts = torch.stack([up, 0 * down if paired else down, (found["lengths"] * labels).sum()]).double()
    cu_completions = F.pad(found["lengths"].long().cumsum(0), (1, 0))
    batch = {"label": labels, "weight": found["weight"], "cu_completions": cu_completions}
    weights = torch.atleast_2d(objective.weights(batch, counts, **weighting))
    losses = (costs[:, : weights.shape[1]] * weights).sum(1)
    parts = {f"loss/{name}": loss / w for (name, w), loss in zip(objective.part_weights.items(), losses, strict=False)}
    class_weights = (1.0, 1.0) if paired else weighting.get("class_weights", (1.0, 1.0))
    sums = unpaired_sums(
        found["rewards"], found["logps"], labels, found["threshold"], paired=paired,
        weight=found["weight"] * torch.where(labels, *class_weights),
    )  # fmt: skip
    return {"loss": losses.sum(), **parts, **unpaired_metrics(sums), "rewards/auc": auc(found["rewards"], labels)}
