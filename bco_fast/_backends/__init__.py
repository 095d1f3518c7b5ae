"""Implementations of the fused head behind `fused_linear_logps`. They share this page and never import one another.

A backend is a module with two functions on N rows whose targets are already known to be wanted:

    forward(hidden, weight, targets, bias, spec, *, entropy, direction, workspace_bytes) -> HeadForward
    backward(grad_logps, grad_entropy, saved, spec, *, need, workspace_bytes) -> (d_hidden, d_weight, d_bias)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
