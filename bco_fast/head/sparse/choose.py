"""Which blocks of the logits' gradient a backward may leave out, under a guarantee.

A block is one row and MASS_TILE columns of the logits. The forward knows the mass of each, a = sum of p_k f_k over its
columns (f is the derivative of the softcap, 1 without one), and with c the upstream gradient of a row

    |dZ|_1 = scale / temperature * sum over rows of |c| ((1 - p_y) f_y + sum over k != y of p_k f_k)

Blocks are dropped from the smallest |c| a upwards, but never the target's, while they cost at most `tolerance` of it:

    |dZ - dZ~|_1 <= tolerance * |dZ|_1         up to the float32 rounding of the masses

The threshold comes from two histograms over the bits of |c| a, which are ordered like the numbers: 12 bits, then the
next 12 within one bin. Bins hold integers (units of 2^-34 of the budget, rounded up), so sums are exact in any order and
the same inputs drop the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import DENSE, HeadSaved, KeptBlocks

_BITS = 12
_BINS = 1 << _BITS
_SHIFTS = (31 - _BITS, 31 - 2 * _BITS)  # of the bits of a non-negative float32
_UNITS = 1 << 34
# Relative error of the masses' logarithms; taken off the budget.
_ROUNDING = 1e-4
# On a GPU the additions to one bin wait for each other, and most costs lie in a few bins: neighbours get copies of their own.
GPU_REPLICAS = 256


class Choice(NamedTuple):
    """What `choose_blocks` found."""

    blocks: KeptBlocks | None  # None: so many that the dense backward costs less
    kept_fraction: float = DENSE[0]  # of the blocks of rows with a gradient
    error_bound: float = DENSE[1]  # on the relative L1 error


def choose_blocks(
    grad_logps: Tensor,  # [N], 0 for rows that are ignored
    saved: HeadSaved,
    tolerance: float,
    *,
    width: int,
    sharded: bool,
    break_even: float,
    workspace_bytes: int,
) -> Choice:
    """The smallest set of blocks that keeps the bound; one transfer from the device, of T + 3 numbers.

    Args:
        width: columns of a tile.
        sharded: the masses cover a part of the vocabulary; the bound then holds for this part.
        break_even: kept fraction from which on the dense backward is cheaper.
        workspace_bytes: limit for the temporaries of the histograms.
    """
    mass, targets, v = saved.mass, saved.inputs.targets, len(saved.inputs.weight)
    n, tiles = mass.shape
    upstream = grad_logps.abs().to(mass.dtype)
    has_target = (targets >= 0) & (targets < v)
    target_tile = torch.where(has_target, torch.div(targets, width, rounding_mode="floor"), 0)[:, None]
    total = (upstream.double() * _row_norms(saved, has_target, sharded)).sum()
    budget = total * (tolerance * (1 - _ROUNDING))

    keep = torch.empty((tiles, n), dtype=torch.bool, device=mass.device)
    replicas = max(min(GPU_REPLICAS, workspace_bytes // 4 // (8 * _BINS)), 1) if mass.is_cuda else 1
    # Costs, their bits and what the histogram makes of them: about 48 bytes a block. On the CPU they stay in the cache.
    most = (workspace_bytes - 8 * _BINS * replicas) // 48 if mass.is_cuda else min(workspace_bytes // 40, 1 << 15)
    step = max(most // tiles, 1)

    def costs() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            cost = (upstream[rows, None] * mass[rows]).float()
            at = target_tile[rows]  # never dropped, so not counted
            yield rows, cost.scatter_(1, at, torch.where(has_target[rows, None], 0.0, cost.gather(1, at)))

    threshold, spent = _threshold(costs, budget, replicas)
    for rows, cost in costs():
        kept = (cost.view(torch.int32) >= threshold) & (cost != 0.0)
        at_target = kept.gather(1, target_tile[rows]) | (has_target & (upstream != 0))[rows, None]
        keep[:, rows] = kept.scatter_(1, target_tile[rows], at_target).T
    moving = (upstream != 0).sum()
    numbers = torch.cat([keep.sum(1).double(), torch.stack([moving.double(), spent, total])]).tolist()
    counts, (moving, spent, total) = numbers[:tiles], numbers[tiles:]
    kept = int(sum(counts))
    kept_fraction = kept / (moving * tiles) if moving else 0.0
    if kept_fraction >= break_even:
        return Choice(None)
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + int(count))
    index = torch.nonzero_static(keep.flatten(), size=kept)[:, 0]
    return Choice(KeptBlocks(index, index % n, offsets, width), kept_fraction, spent / total if total else 0.0)


def _row_norms(saved: HeadSaved, has_target: Tensor, sharded: bool) -> Tensor:  # [N]
    """Lower bound of (1 - p_y) f_y + sum over k != y of p_k f_k, float64; of the sum alone for a foreign target."""
    spec, off_target = saved.inputs.spec, -torch.expm1(saved.logps.double())
    if spec.softcap is None and not sharded:
        return 2.0 * off_target
    others = saved.mass.sum(1, dtype=torch.float64)
    p_y = saved.logps.double().exp()
    softcap_grad = 1.0
    if spec.softcap is not None:
        logit = (saved.logps + saved.row_max + saved.row_sum.log()).double()
        softcap_grad = 1.0 - (logit * (spec.temperature / spec.softcap)).square()
    # Differences of numbers rounded to float32, so less the rounding they may carry.
    at_target = off_target * torch.as_tensor(softcap_grad - 1e-5).clamp_min(0.0)
    off = (others * (1 - 1e-5) - p_y * (softcap_grad + 1e-5)).clamp_min(0.0)
    return torch.where(has_target, at_target + off, others)


def _threshold(
    costs: Callable[[], Iterator[tuple[slice, Tensor]]], budget: Tensor, replicas: int
) -> tuple[Tensor, Tensor]:
    """Bits of the smallest cost that is kept, and an upper bound of the sum of those below; both on the device."""
    scale = _UNITS / budget.clamp_min(1e-290)  # finite without a budget: 0 x inf is NaN
    spent = torch.zeros((), dtype=torch.int64, device=budget.device)
    low = torch.zeros((), dtype=torch.int32, device=budget.device)
    for shift in _SHIFTS:
        histogram = torch.zeros(_BINS * replicas, dtype=torch.int64, device=budget.device)
        for _, cost in costs():
            bits = cost.view(torch.int32).flatten()
            # A cost above the budget is kept in any case; capped, sums stay below 2^63.
            units = (cost.flatten().double() * scale).clamp_max_(2 * _UNITS).long() + 1
            if shift != _SHIFTS[0]:  # only the bin in which the budget ends
                inside = (bits >> _SHIFTS[0]) == (low >> _SHIFTS[0])
                units, bits = torch.where(inside, units, 0), torch.where(inside, bits, 0)
            bins = (bits >> shift) & (_BINS - 1)
            if replicas > 1:
                bins = bins * replicas + torch.arange(len(bins), device=bins.device, dtype=bins.dtype) % replicas
            histogram.index_add_(0, bins, units)
        sums = spent + histogram.view(_BINS, replicas).sum(1).cumsum(0)
        dropped = (sums <= _UNITS).sum().clamp_max(_BINS - 1)
        spent = torch.where(dropped > 0, sums[dropped - 1], spent)
        low = low + (dropped.to(torch.int32) << shift)
    # NaN: nothing is known, so everything is kept.
    return torch.where(budget.isfinite(), low, 0), spent.double() / scale
