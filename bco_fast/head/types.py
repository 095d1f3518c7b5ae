"""What passes between `fused_linear_logps` and its implementations.

A backend is a module of `backends/` with MASS_TILE, the columns of the vocabulary that share an entry of its mass table, and

    forward(inputs, want, workspace_bytes) -> HeadForward
    backward(grad_logps, grad_entropy, saved, need, workspace_bytes) -> gradients of hidden, weight, bias

The module of the same name in `sparse/` has its backward for a choice of blocks (one row and MASS_TILE columns of the logits):

    break_even(dtype) -> kept fraction at which the dense backward becomes the faster one
    backward(grad_logps, saved, blocks, need, workspace_bytes) -> gradients of hidden, weight, bias
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")
Backend = Literal["auto", "triton", "torch", "reference"]
DENSE = (1.0, 0.0)
"""Kept fraction and error bound of an exact backward."""


class HeadStats:
    """Filled in by the backward of `fused_linear_logps(..., stats=stats)`; None before."""

    def __init__(self) -> None:
        self.report = torch.full((2,), math.nan, dtype=torch.float64)

    @property
    def kept_fraction(self) -> float | None:
        """Blocks (a row and a tile of the vocabulary) that the backward computed, as a share of those of all rows with a
        gradient; 1.0 for the dense, exact backward."""
        return self._read(0)

    @property
    def error_bound(self) -> float | None:
        """Proved bound on the relative L1 error of the logits' gradient; 0.0 for the dense, exact backward."""
        return self._read(1)

    def clear(self) -> None:
        """Forget the last backward."""
        self.report.fill_(math.nan)

    def _read(self, index: int) -> float | None:
        value = float(self.report[index])
        return None if math.isnan(value) else value

    def __repr__(self) -> str:
        return f"HeadStats(kept_fraction={self.kept_fraction}, error_bound={self.error_bound})"


class NotFiniteError(ValueError):
    """A value on the CPU is NaN or infinite where the operator or an objective needs a number."""


@dataclass(frozen=True)
class HeadOptions:
    """How the head is computed; none of it changes what is computed. See `fused_linear_logps`."""

    backend: Backend = "auto"
    workspace_bytes: int = 256 << 20
    sparse_tolerance: float = 0.0
    stats: HeadStats | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        if not 0.0 <= self.sparse_tolerance < 1.0:
            raise ValueError(f"sparse_tolerance must be in [0, 1), not {self.sparse_tolerance}")
        if self.sparse_tolerance > 0.0 and self.backend == "reference":
            raise ValueError("backend='reference' is exact: it takes no sparse_tolerance")


class HeadSpec(NamedTuple):
    """What happens to a logit after the matmul and the bias: x logit_scale, softcap, / temperature."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def logit_multiplier(self) -> float:
        return self.logit_scale / self.temperature

    def check(self) -> None:
        if not 0 < abs(self.logit_scale) < math.inf:
            raise ValueError(f"logit_scale must be finite and not 0, not {self.logit_scale}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be > 0 or None, not {self.softcap}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be > 0, not {self.temperature}")


class HeadInputs(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], the dtype of hidden; under autocast also float32
    targets: Tensor  # [N] int64; a row whose target is outside [0, V) gets NaN
    bias: Tensor | None  # [V]
    spec: HeadSpec


class HeadWant(NamedTuple):
    """What the forward computes beside logps."""

    entropy: bool = False
    frozen: bool = False  # d logp / d hidden, so that the backward is one multiplication
    recompute: bool = True  # what a backward needs that computes the logits again
    mass: bool = False


class HeadForward(NamedTuple):
    logps: Tensor  # [N]
    entropy: Tensor | None  # [N]
    row_max: Tensor  # [N]
    row_sum: Tensor  # [N], of exp(z - row_max)
    row_argmax: Tensor  # [N] int64, the column of row_max; -1 where no backward will read it
    target_logits: Tensor  # [N]; NaN (0 from the fused kernel) where the target is outside [0, V)
    dlogp_dhidden: Tensor | None = None  # [N, D]
    mass: Tensor | None = None
    """[N, T = V / MASS_TILE], sum of p_k f_k over the columns; f is the derivative of the softcap, 1 without one."""


class HeadSaved(NamedTuple):
    """What the backward recomputes from."""

    inputs: HeadInputs
    logps: Tensor  # [N]
    row_max: Tensor  # [N]
    row_sum: Tensor  # [N]
    entropy: Tensor | None  # [N]
    row_argmax: Tensor  # [N] int64; -1 for nowhere
    mass: Tensor | None = None  # [N, T]


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden [N, D], weight [V, D] and bias [V]."""


class HeadNeed(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class KeptBlocks(NamedTuple):
    """The blocks that a sparse backward computes, ordered by tile, then by row."""

    index: Tensor  # [kept] int64, tile * N + row
    rows: Tensor  # [kept] int64
    offsets: list[int]  # [T + 1]: tile t has rows[offsets[t] : offsets[t + 1]]
    width: int  # columns of a tile
