"""The `torch` backend: tiles of logits in plain PyTorch. It runs on the CPU and is the readable form of the kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..types import Grads, HeadForward, HeadInputs, HeadNeed, HeadSaved, HeadSpec, HeadWant
from . import walk
from .walk import Memory, Statistics

# Narrow tiles keep fewer logits (0.38 of them at 256 columns, 0.14 at 64, for the same bound on scattered tokens). Below
# 64 the CPU's matmul loses more than that gains.
MASS_TILE = 64
# Share of a tile's rows that may be copied to find the column of their maximum.
ARGMAX_ROWS = 0.125


def finish_logits(z: Tensor, spec: HeadSpec, memory: Memory) -> Tensor | None:
    """Scale, softcap and temperature, in place -> with a softcap its derivative 1 - tanh^2."""
    if spec.softcap is None:
        if spec.logit_multiplier != 1.0:
            z *= spec.logit_multiplier
        return None
    z.mul_(spec.logit_scale / spec.softcap)
    softcap_grad = torch.cosh(z, out=memory.take("softcap_grad", *z.shape))
    softcap_grad.reciprocal_().square_()  # 1 - tanh^2 would cancel where the cap saturates
    z.tanh_().mul_(spec.softcap / spec.temperature)
    return softcap_grad


def _columns_in(at: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which rows have their column `at` in this chunk [R], and a column that is safe to gather for every row [R, 1]."""
    inside = (at >= columns.start) & (at < columns.stop)
    return inside, torch.where(inside, at - columns.start, 0)[:, None]


def _finite(row_max: Tensor) -> Tensor:
    """exp(-inf - -inf) is NaN; a row that is -inf so far is measured from 0 instead."""
    return torch.where(row_max == float("-inf"), 0.0, row_max)


def _note_argmax(z: Tensor, raised: Tensor, argmax: Tensor, first: int) -> None:
    """The column of the maximum for rows whose running maximum this tile has raised; few after the first tiles.

    On the CPU a maximum with its column takes six times as long as one without, so few rows are copied and searched.
    """
    if z.device.type == "cpu":
        rows = raised.nonzero()[:, 0]
        if len(rows) <= ARGMAX_ROWS * len(z):
            argmax.index_copy_(0, rows, z.index_select(0, rows).max(1).indices + first)
            return
    torch.where(raised, z.max(1).indices + first, argmax, out=argmax)


def _tile_sums(e: Tensor) -> Tensor:  # [R, C] -> [R, C / MASS_TILE]
    whole = e.shape[1] // MASS_TILE * MASS_TILE
    sums = e[:, :whole].unflatten(1, (-1, MASS_TILE)).sum(2)
    return sums if whole == e.shape[1] else torch.cat([sums, e[:, whole:].sum(1, keepdim=True)], 1)


def forward(inputs: HeadInputs, want: HeadWant, workspace_bytes: int) -> HeadForward:
    seen = Statistics(inputs, want, MASS_TILE)
    tiles = 1 + want.entropy + (inputs.spec.softcap is not None) + ARGMAX_ROWS * want.recompute
    fold = functools.partial(_fold, seen)
    return walk.forward(seen, fold, _rescale, tiles=tiles, workspace_bytes=workspace_bytes)


def _rescale(sums: Tensor, shrink: Tensor) -> None:
    sums *= shrink[:, None]


def _fold(
    seen: Statistics,
    z: Tensor,  # [R, C]; overwritten
    out: Tensor | None,  # [R, C]
    rows: slice,
    columns: slice,
    memory: Memory,
) -> Tensor | None:
    _, _, targets, bias, spec = seen.inputs
    if bias is not None:
        z += bias[columns]
    softcap_grad = finish_logits(z, spec, memory)
    inside, at = _columns_in(targets[rows], columns)
    seen.logits[rows] = torch.where(inside, z.gather(1, at)[:, 0], seen.logits[rows])
    before, highest = seen.row_max[rows], z.amax(1)
    m = torch.maximum(before, highest)
    if seen.want.recompute:
        _note_argmax(z, highest > before, seen.argmax[rows], columns.start)
    shrink = torch.exp(before - _finite(m))
    z.sub_(_finite(m)[:, None])
    if not seen.want.entropy:
        e = z.exp_()
    else:
        moved = torch.where(shrink == 0, 0.0, before - m)
        e = torch.exp(z, out=memory.take("e", *z.shape))
        terms = z.mul_(e).nan_to_num_(nan=0.0)  # -inf x 0 where the bias masks a token
        seen.u[rows] = shrink * (seen.u[rows] + moved * seen.row_sum[rows]) + terms.sum(1)
    seen.row_max[rows], seen.shrink[rows] = m, shrink
    seen.row_sum[rows] = seen.row_sum[rows] * shrink + e.sum(1)
    if seen.mass is not None:  # never with a frozen head
        tiles = slice(columns.start // MASS_TILE, -(-columns.stop // MASS_TILE))
        sums = _tile_sums(e if softcap_grad is None else e.mul_(softcap_grad))
        seen.mass[rows, tiles] = sums.log_().add_(_finite(m)[:, None])
    if seen.want.frozen:
        e.scatter_(1, at, torch.where(inside[:, None], 0.0, e.gather(1, at)))
        seen.off_target[rows] = seen.off_target[rows] * shrink + e.sum(1)
        if softcap_grad is not None:
            at_target = softcap_grad.gather(1, at)[:, 0]
            seen.softcap_grad[rows] = torch.where(inside, at_target, seen.softcap_grad[rows])
            e *= softcap_grad
        return e if e.dtype == out.dtype else out.copy_(e)
    return None


def backward(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    need: HeadNeed,
    workspace_bytes: int,
) -> Grads:
    tiles = 1 + (grad_entropy is not None) + (saved.inputs.spec.softcap is not None)
    dlogits = functools.partial(_dlogits, grad_logps, grad_entropy, saved)
    return walk.backward(saved, dlogits, need, tiles=tiles, workspace_bytes=workspace_bytes)


def _dlogits(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    z: Tensor,  # [R, C]; overwritten
    out: Tensor,  # [R, C]
    rows: slice,
    columns: slice,
    memory: Memory,
) -> None:
    """Gradient at the matmul's output: (c (1[k = y] - p) - g p (log p + H)) f scale / temperature."""
    _, _, targets, bias, spec = saved.inputs
    if bias is not None:
        z += bias[columns]
    softcap_grad = finish_logits(z, spec, memory)
    c = grad_logps[rows] * spec.logit_multiplier
    row_max, row_sum = saved.row_max[rows], saved.row_sum[rows]
    # This matmul may round differently from the forward's. A nearly certain token would be off by the rounding of its
    # logit, but the forward kept that logit: it is the row's maximum.
    inside, at = _columns_in(saved.row_argmax[rows], columns)
    z.scatter_(1, at, torch.where(inside, row_max, z.gather(1, at)[:, 0])[:, None])
    z.sub_(row_max[:, None])
    if grad_entropy is None:
        z.exp_().mul_((-c / row_sum)[:, None])
    else:
        g = grad_entropy[rows] * spec.logit_multiplier
        e = torch.exp(z, out=memory.take("e", *z.shape))
        z += (saved.entropy[rows] - row_sum.log())[:, None]
        z.mul_(-g[:, None]).sub_(c[:, None]).mul_(e).nan_to_num_(nan=0.0).div_(row_sum[:, None])
    # At the target use the forward's logp: as p_y -> 1 the difference 1 - p_y would be all rounding.
    logp = saved.logps[rows]
    at_target = -torch.expm1(logp) * c
    if grad_entropy is not None:
        at_target -= g * logp.exp() * (logp + saved.entropy[rows])
    inside, at = _columns_in(targets[rows], columns)
    z.scatter_(1, at, torch.where(inside, at_target, z.gather(1, at)[:, 0])[:, None])
    if softcap_grad is not None:
        z *= softcap_grad
    if out is not z:
        out.copy_(z)
