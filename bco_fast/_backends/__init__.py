"""Implementations of the fused head behind `fused_linear_logps`. They share this page and never import one another.

A backend is a module with two functions on N rows whose targets are already known to be wanted:

    forward(hidden, weight, targets, bias, spec, *, entropy, direction, workspace_bytes) -> HeadForward
    backward(grad_logps, grad_entropy, saved, spec, *, need, workspace_bytes) -> (d_hidden, d_weight, d_bias)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MASS_TILE = 256
"""Columns of the vocabulary that share one entry of the mass table."""

SMALLEST = 64
"""No tile is cut below 64 x 64."""


class HeadSpec(NamedTuple):
    """What happens to a logit after the matmul and the bias: x logit_scale, softcap, / temperature."""

    logit_scale: float
    softcap: float | None
    temperature: float

    @property
    def slope(self) -> float:
        return self.logit_scale / self.temperature


class HeadForward(NamedTuple):
    logps: Tensor  # [N]
    entropy: Tensor | None  # [N]
    row_max: Tensor  # [N]
    row_sum: Tensor  # [N], of exp(z - row_max)
    direction: Tensor | None  # [N, D], d logp / d hidden
    target_logits: Tensor  # [N]; NaN (or 0, "fused") where the target is outside [0, V)
    mass: Tensor | None = None  # [N, V / MASS_TILE], share of sum e^(z - row_max) f; f is the softcap's slope


class HeadSaved(NamedTuple):
    """What the backward recomputes from."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    bias: Tensor | None  # [V]
    logps: Tensor  # [N]
    row_max: Tensor  # [N]
    row_sum: Tensor  # [N]
    entropy: Tensor | None  # [N]


class HeadNeed(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_shape(
    rows: int, columns: int, workspace_bytes: int, *, cell: int, row: int = 0, column: int = 0, whole_rows: int = 0
) -> tuple[int, int]:
    """Halve a wanted tile until it fits: `cell` bytes a logit, `row` and `column` bytes beside each row and column.

    With `whole_rows`, columns cost nothing extra while the tile holds all rows.
    """

    def used() -> int:
        return cell * rows * columns + row * rows + (column * columns if rows != whole_rows else 0)

    while used() > workspace_bytes and max(rows, columns) > SMALLEST:
        if rows > columns:
            rows = max(SMALLEST, rows // 2)
        else:
            columns = max(SMALLEST, columns // 2)
    return max(rows, 1), max(columns, 1)


def assemble_direction(
    pull: Tensor,  # [N, D], sum over k != y of e_k f_k W_k; overwritten
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    slope: Tensor,  # [N], f at the target
    off_target: Tensor,  # [N], sum over k != y of e_k
    row_sum: Tensor,  # [N]
    spec: HeadSpec,
) -> Tensor:  # [N, D]
    """d logp / d hidden = scale / temperature * ((1 - p_y) f_y W_y - sum over k != y of p_k f_k W_k).

    1 - p_y is off_target / row_sum: without the target's own term it stays accurate as p_y -> 1, where W_y - sum p W
    cancels. NaN where the target is outside [0, V).
    """
    wanted = targets.clamp(0, weight.shape[0] - 1)
    pull *= (-spec.slope / row_sum)[:, None]
    pull.addcmul_(weight[wanted].to(pull.dtype), (spec.slope * slope * off_target / row_sum)[:, None])
    pull[targets != wanted] = float("nan")
    return pull
