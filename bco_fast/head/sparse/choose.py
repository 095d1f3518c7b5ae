"""Which cells of the logits' gradient a backward may leave out, under a guarantee.

A cell is one row and one tile of the vocabulary, MASS_TILE columns of the backend. The forward knows the mass of each, a = sum
of p_k f_k over its columns (f is the softcap's slope, 1 without one), and with c the upstream gradient of a row

    |dZ|_1 = scale / temperature * sum over rows of |c| ((1 - p_y) f_y + sum over k != y of p_k f_k)

so the cells that are dropped, taken from the smallest |c| a upwards and never the target's own, cost at most `tolerance`
of it:

    |dZ - dZ~|_1 <= tolerance * |dZ|_1         up to the float32 rounding of the masses

The threshold comes from two histograms over the bits of |c| a, whose order is that of the numbers: 12 bits, then the next
12 within one bin. Bins hold whole numbers (units of 2^-34 of the budget, rounded up), so that sums are exact in any order
and the same inputs drop the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import HeadSaved, HeadSpec, KeptCells

_BITS = 12
_BINS = 1 << _BITS
_SHIFTS = (31 - _BITS, 31 - 2 * _BITS)  # of the bits of a float32 that is not negative
_UNITS = 1 << 34
# What the masses' logarithms may be off by, relatively; taken off the budget.
_ROUNDING = 1e-4


class Choice(NamedTuple):
    """What `choose_cells` found."""

    cells: KeptCells | None  # None: so many that the dense backward costs less
    rho: float  # share of kept cells among those of rows with a gradient; 1.0 without `cells`
    certified: float  # proved bound on the relative L1 error; 0.0 without `cells`


def choose_cells(
    grad_logps: Tensor,  # [N], 0 for rows that are ignored
    saved: HeadSaved,
    mass: Tensor,  # [N, T]
    spec: HeadSpec,
    tolerance: float,
    *,
    width: int,
    sharded: bool,
    worth: float,
    workspace_bytes: int,
) -> Choice:
    """The smallest set of cells that keeps the bound; one transfer from the device, of T + 3 numbers.

    Args:
        width: columns of a tile.
        sharded: `mass` is that of a part of the vocabulary; the bound is then kept on this part.
        worth: share of cells from which on the dense backward is the cheaper one.
        workspace_bytes: what the temporaries of the histograms may take.
    """
    n, tiles = mass.shape
    upstream = grad_logps.abs().to(mass.dtype)
    tile = torch.div(saved.targets, width, rounding_mode="floor")
    own = (saved.targets >= 0) & (saved.targets < saved.weight.shape[0])
    tile = torch.where(own, tile, 0)[:, None]
    total = (upstream.double() * _row_norms(saved, mass, own, spec, sharded)).sum()
    budget = total * (tolerance * (1 - _ROUNDING))

    keep = torch.empty((tiles, n), dtype=torch.bool, device=mass.device)
    # Weights, their bits and what the histogram makes of them: about 40 bytes a cell. On the CPU they stay in the cache.
    most = workspace_bytes // 40 if mass.is_cuda else min(workspace_bytes // 40, 1 << 15)
    block = max(most // tiles, 1)

    def weights() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, n, block):
            rows = slice(start, min(start + block, n))
            weight = (upstream[rows, None] * mass[rows]).float()
            at = tile[rows]  # never dropped, so no part of what may be
            yield rows, weight.scatter_(1, at, torch.where(own[rows, None], 0.0, weight.gather(1, at)))

    threshold, spent = _threshold(weights, budget)
    for rows, weight in weights():
        kept = (weight.view(torch.int32) >= threshold) & (weight != 0.0)
        mine = kept.gather(1, tile[rows]) | (own & (upstream != 0))[rows, None]
        keep[:, rows] = kept.scatter_(1, tile[rows], mine).T
    moving = (upstream != 0).sum()
    numbers = torch.cat([keep.sum(1).double(), torch.stack([moving.double(), spent, total])]).tolist()
    counts, (moving, spent, total) = numbers[:tiles], numbers[tiles:]
    kept = int(sum(counts))
    rho = kept / (moving * tiles) if moving else 0.0
    if rho >= worth:
        return Choice(None, 1.0, 0.0)
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + int(count))
    index = torch.nonzero_static(keep.flatten(), size=kept)[:, 0]
    return Choice(KeptCells(index, index % n, offsets, width), rho, spent / total if total else 0.0)


def _row_norms(saved: HeadSaved, mass: Tensor, own: Tensor, spec: HeadSpec, sharded: bool) -> Tensor:  # [N] float64
    """(1 - p_y) f_y + sum over k != y of p_k f_k, never more than it is; only the second where the target is not `own`."""
    off_target = -torch.expm1(saved.logps.double())
    if spec.softcap is None and not sharded:
        return 2.0 * off_target
    others = mass.sum(1, dtype=torch.float64)
    p_y = saved.logps.double().exp()
    slope = 1.0
    if spec.softcap is not None:
        logit = (saved.logps + saved.row_max + saved.row_sum.log()).double()
        slope = 1.0 - (logit * (spec.temperature / spec.softcap)).square()
    # Differences of numbers rounded to float32, so less what they may be off by.
    at_target = off_target * torch.as_tensor(slope - 1e-5).clamp_min(0.0)
    others_now = (others * (1 - 1e-5) - p_y * (slope + 1e-5)).clamp_min(0.0)
    return torch.where(own, at_target + others_now, others)


def _threshold(weights: Callable[[], Iterator[tuple[slice, Tensor]]], budget: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of the first weight that stays, and an upper bound of the sum of those below; both on the device."""
    scale = _UNITS / budget.clamp_min(1e-290)  # of no budget: finite, or 0 would become not a number
    spent = torch.zeros((), dtype=torch.int64, device=budget.device)
    low = torch.zeros((), dtype=torch.int32, device=budget.device)
    for shift in _SHIFTS:
        histogram = torch.zeros(_BINS, dtype=torch.int64, device=budget.device)
        for _, weight in weights():
            bits = weight.view(torch.int32).flatten()
            # A weight above the budget stays whatever the others are, and sums stay below 2^63.
            units = (weight.flatten().double() * scale).clamp_max_(2 * _UNITS).long() + 1
            if shift != _SHIFTS[0]:  # only the bin in which the budget ends
                inside = (bits >> _SHIFTS[0]) == (low >> _SHIFTS[0])
                units, bits = torch.where(inside, units, 0), torch.where(inside, bits, 0)
            histogram.index_add_(0, (bits >> shift) & (_BINS - 1), units)
        sums = spent + histogram.cumsum(0)
        dropped = (sums <= _UNITS).sum().clamp_max(_BINS - 1)
        spent = torch.where(dropped > 0, sums[dropped - 1], spent)
        low = low + (dropped.to(torch.int32) << shift)
    # Not a number means nothing is known: all stay.
    return torch.where(budget.isfinite(), low, 0), spent.double() / scale
