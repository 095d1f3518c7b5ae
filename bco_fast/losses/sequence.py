"""From tokens to sequences, and numbers that survive at the ends."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import readable

_INDEX_DTYPES = (torch.int64, torch.int32)


def sequence_logps(
    token_logps: Tensor,  # [B, T], or [total] with cu_seqlens
    *,
    cu_seqlens: Tensor | None = None,  # [B + 1]
    mask: Tensor | None = None,  # the shape of token_logps
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:  # [B]
    """Sum or mean of token log-probabilities per sequence.

    `fused_linear_logps` gives 0 to ignored tokens, so a sum needs no mask; a mean does, or it would divide by them too.
    Accumulates in float64: the log-ratios made of these sums are small differences of large numbers.

    Args:
        token_logps: [B, T], or the packed [total] of B sequences with `cu_seqlens`; nats.
        cu_seqlens: cumulative sequence lengths of a packed batch, int32 or int64, from 0 to total.
        mask: True for the tokens that count.
        reduction: "sum", or "mean" over the tokens that count.

    Returns:
        [B], the dtype of token_logps; differentiable.

    Raises:
        TypeError: mask is not bool, or cu_seqlens not integer.
        ValueError: shapes do not match, or (CPU only) cu_seqlens is not an increasing cover of token_logps, or a
            sequence has no token to take the mean of; names the row.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
    if token_logps.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(
            f"token_logps must be [B, T], or [total] with cu_seqlens; it is {list(token_logps.shape)} "
            f"{'without' if cu_seqlens is None else 'with'} cu_seqlens"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, not {mask.dtype}")
    if mask is not None and mask.shape != token_logps.shape:
        raise ValueError(f"mask {list(mask.shape)} and token_logps {list(token_logps.shape)} must have one shape")
    values = token_logps.double() if mask is None else torch.where(mask, token_logps, 0.0).double()
    counts = torch.ones_like(values) if mask is None else mask.double()
    if cu_seqlens is None:
        sums, counts = values.sum(1), counts.sum(1)
    else:
        sums, counts = _segment_sums(values, cu_seqlens), _segment_sums(counts, cu_seqlens)
    if reduction == "sum":
        return sums.to(token_logps.dtype)
    if readable(counts) and (counts == 0).any():
        raise ValueError(f"sequence {int((counts == 0).nonzero()[0])} has no token to take the mean of")
    return (sums / counts).to(token_logps.dtype)


def _segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    if cu_seqlens.dtype not in _INDEX_DTYPES:
        raise TypeError(f"cu_seqlens must be int64 or int32, not {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [B + 1], not {list(cu_seqlens.shape)}")
    lengths = cu_seqlens.long().diff()
    if readable(cu_seqlens) and (cu_seqlens[0] != 0 or cu_seqlens[-1] != values.shape[0] or (lengths < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to {values.shape[0]}, not {cu_seqlens.tolist()}")
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact at both ends; -inf at 0."""
    near = x > -0.6931471805599453
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
