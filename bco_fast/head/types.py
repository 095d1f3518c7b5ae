"""Implementations of the fused head behind `fused_linear_logps`. They share this page and never import one another.

A backend is a module with MASS_TILE, the columns of the vocabulary that share one entry of its mass table, and these
functions on N rows whose targets are already known to be wanted:

    sparse_worth(dtype) -> share of kept cells from which on its dense backward is the faster one

    forward(hidden, weight, targets, bias, spec, *, entropy, direction, mass, order, workspace_bytes) -> HeadForward
    backward(grad_logps, grad_entropy, saved, spec, *, need, order, workspace_bytes) -> (d_hidden, d_weight, d_bias)
    sparse_backward(grad_logps, saved, spec, cells, *, need, order, workspace_bytes) -> (d_hidden, d_weight, d_bias)

With an `order` [V] the vocabulary is walked in that order: targets, bias, peaks, masses and d_bias are in positions
of it, and position i is row order[i] of weight and d_weight.
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
    target_logits: Tensor  # [N]; NaN (or 0, "fused") where the target is outside [0, V)
    row_peak: Tensor  # [N] int64, a column whose logit is row_max; -1 where no backward will ask
    mass: Tensor | None = None
    """[N, T = V / MASS_TILE], sum of p_k f_k over the columns; f is the softcap's slope."""


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
    row_peak: Tensor  # [N] int64: there the logit is row_max; -1 for nowhere


class HeadNeed(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class KeptCells(NamedTuple):
    """The (row, vocabulary tile) cells that a sparse backward computes, tile after tile, rows ascending within one."""

    index: Tensor  # [kept] int64, tile * N + row
    rows: Tensor  # [kept] int64
    offsets: list[int]  # [T + 1]: tile t has rows[offsets[t] : offsets[t + 1]]
    width: int  # columns of a tile


class ExactEntries(NamedTuple):
    """Entries of dlogits known from the forward, ascending by cell, see `exact_entries`."""

    cell: Tensor  # [E] int64, position in KeptCells
    column: Tensor  # [E] int64, in the cell's tile
    value: Tensor  # [E], the gradient without the softcap's slope


def exact_entries(
    grad_logps: Tensor,  # [N]
    saved: HeadSaved,
    spec: HeadSpec,
    cells: KeptCells,
) -> ExactEntries:
    """dlogits of the targets, from the forward's own logp, and of the rows' maxima in the cells that were kept.

    A recomputed logit may be rounded by another matmul than the forward's. Where a token is nearly certain 1 - p would be
    all rounding, but there the forward's numbers are at hand.
    """
    c = grad_logps * spec.slope
    n = len(c)
    row = torch.arange(n, device=c.device)
    at = torch.cat([saved.row_peak, saved.targets])
    own = torch.cat([(saved.row_peak >= 0) & (saved.row_peak != saved.targets), torch.ones_like(row, dtype=torch.bool)])
    own &= (at >= 0) & (at < saved.weight.shape[0])
    key = torch.div(at, cells.width, rounding_mode="floor") * n + row.repeat(2)
    cell = torch.searchsorted(cells.index, key).clamp_max(max(len(cells.index) - 1, 0))
    if len(cells.index):
        own &= cells.index[cell] == key
    value = torch.cat([-c / saved.row_sum, -torch.expm1(saved.logps) * c])
    cell = torch.where(own, cell, len(cells.index)).sort(stable=True)
    return ExactEntries(cell.values, at[cell.indices] % cells.width, value[cell.indices])


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def smallest_workspace(width: int, *, sparse: bool = False) -> int:
    """Bytes: one tile of 64 x 64 logits and their gradients, or eight float64 rows of a hidden size `width`.

    A sparse backward adds up 256 rows of the gradient of the weight at a time: four matrices of that size.
    """
    return max(64 * 64 * 8, 64 * width) + sparse * 4 * 8 * 256 * width


def tile_shape(
    n: int,
    rows: int,
    columns: int,
    workspace_bytes: int,
    *,
    cell: float,
    row: int,
    column: int,
    cut: int,
    step: int = 1,
) -> tuple[int, int]:
    """Halve a wanted tile until all that goes with it fits into the workspace; from `smallest_workspace` on one does.

    Bytes: `cell` for each logit, `row` and `column` beside each row and column of the tile, and `cut` more for each
    column once the tile holds fewer than all `n` rows, when the sums of a column outlive its tile. Columns stay a
    multiple of `step`.
    """
    columns = -(-columns // step) * step

    def used() -> float:
        return cell * rows * columns + row * rows + (column + (cut if rows < n else 0)) * columns

    while used() > workspace_bytes and (rows > 1 or columns > step):
        if rows > columns or columns == step:
            rows = (rows + 1) // 2
        else:
            columns = -(-columns // (2 * step)) * step
    return rows, columns


def assemble_direction(
    pull: Tensor,  # [N, D], sum over k != y of e_k f_k W_k; overwritten
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    slope: Tensor,  # [N], f at the target
    off_target: Tensor,  # [N], sum over k != y of e_k
    row_sum: Tensor,  # [N]
    spec: HeadSpec,
    workspace_bytes: int,
) -> Tensor:  # [N, D]
    """d logp / d hidden = scale / temperature * ((1 - p_y) f_y W_y - sum over k != y of p_k f_k W_k).

    1 - p_y is off_target / row_sum: without the target's own term it stays accurate as p_y -> 1, where W_y - sum p W
    cancels. NaN where the target is outside [0, V).
    """
    wanted = targets.clamp(0, weight.shape[0] - 1)
    pull *= (-spec.slope / row_sum)[:, None]
    factor = (spec.slope * slope * off_target / row_sum)[:, None]
    row = weight.shape[1] * (pull.itemsize + (weight.itemsize if weight.dtype != pull.dtype else 0))
    for part, at, by in zip(*(t.split(max(workspace_bytes // row, 1)) for t in (pull, wanted, factor)), strict=True):
        part.addcmul_(weight[at].to(pull.dtype), by)
    return pull.masked_fill_((targets != wanted)[:, None], float("nan"))
