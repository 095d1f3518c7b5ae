"""The fused head with its vocabulary sharded over ranks: each rank holds some rows of the weight, all see all tokens.

A rank walks its own shard as if it were the vocabulary. The statistics of the ranges (max, sum, target logit, entropy
sum) are then joined exactly as the kernels join theirs, after one all-gather of 4 numbers a token; the backward needs
one all-reduce of d hidden, while each rank's d weight is its own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import autograd as _ops
from .types import HeadNeed, HeadSaved, HeadSpec


@functools.cache
def _shard(group: dist.ProcessGroup, rows: int, device: torch.device) -> tuple[int, int]:
    """(first vocabulary id of this rank, size of the whole vocabulary). Asked once for a group and a shard size."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([rows], device=device), group=group)
    counts = [int(size) for size in sizes]
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def _join(parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[ranks, 4, N] of (m, s, t, u) per shard -> row_max, row_sum, target logit, u of the whole vocabulary."""
    m, s, t, u = parts.unbind(1)
    row_max = m.amax(0)
    moved = torch.where(m == float("-inf"), 0.0, m - row_max)  # a shard that a bias masks whole has s = 0
    shrink = moved.exp()
    return row_max, (s * shrink).sum(0), t.sum(0), (shrink * (u + moved * s)).sum(0)


class _Call(NamedTuple):
    spec: HeadSpec
    entropy: bool
    backend: str
    workspace_bytes: int
    tolerance: float
    order: Tensor | None
    stats: Tensor | None
    group: dist.ProcessGroup


class _VocabParallelLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, keep, call: _Call):
        # hidden [N, D], targets [N] in this rank's own numbering (-1 where foreign), keep [N] bool: not ignored
        entropy, group = call.entropy, call.group
        targets, bias = _ops.positions(call.order, targets, bias)
        out = _ops.forward(
            call.backend, hidden, weight, targets, bias, keep, call.spec,
            entropy=entropy, direction=False, mass=call.tolerance > 0.0, order=call.order,
            workspace_bytes=call.workspace_bytes,
        )  # fmt: skip
        logit = torch.where(keep & (targets >= 0), out.target_logits, 0.0)
        u = torch.zeros_like(logit) if out.entropy is None else out.row_sum * (out.row_sum.log() - out.entropy)
        row_sum = torch.where(keep, out.row_sum, 1.0)  # ignored rows: any statistics that give 0
        part = torch.stack([out.row_max, row_sum, logit, torch.where(out.row_sum > 0, u, 0.0)])
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        row_max, row_sum, logit, u = _join(torch.stack(parts))
        peak = torch.where(out.row_max == row_max, out.row_peak, -1)
        logps = torch.where(keep, (logit - row_max) - row_sum.log(), 0.0)
        h = torch.where(keep, row_sum.log() - u / row_sum, 0.0) if entropy else hidden.new_zeros(0, dtype=logps.dtype)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(h)
        mass = out.mass
        if mass is not None:  # of this shard's sum -> of the whole
            mass *= ((out.row_max - row_max).exp() * out.row_sum / row_sum).nan_to_num(nan=0.0)[:, None]
        ctx.save_for_backward(hidden, weight, targets, bias, keep, logps, row_max, row_sum, h, peak, mass)
        ctx.call = call
        return logps, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, targets, bias, keep, logps, row_max, row_sum, h, peak, mass = ctx.saved_tensors
        grads: list = [None] * 6
        call = ctx.call
        if grad_logps is None and grad_entropy is None:
            return tuple(grads)
        needs = ctx.needs_input_grad

        def join_hidden(part: Tensor) -> Tensor:
            total = part.to(row_max.dtype)
            dist.all_reduce(total, group=call.group)
            return total.to(part.dtype)

        found = _ops.backward(
            call.backend,
            grad_logps,
            grad_entropy,
            HeadSaved(hidden, weight, targets, bias, logps, row_max, row_sum, h, peak),
            keep,
            call.spec,
            need=HeadNeed(needs[0], needs[1], bias is not None and needs[3]),
            workspace_bytes=call.workspace_bytes,
            mass=mass,
            tolerance=call.tolerance,
            order=call.order,
            join_hidden=join_hidden,
        )
        if call.stats is not None:
            call.stats.copy_(torch.tensor([found.rho, found.certified]))
        grads[0], grads[1], grads[3] = found.hidden, found.weight, _ops.token_order(call.order, found.bias)
        return tuple(grads)


def linear_logps(
    hidden: Tensor,  # [N, D], the same on all ranks
    weight: Tensor,  # [V of this rank, D]
    targets: Tensor,  # [N], ids of the whole vocabulary, the same on all ranks
    bias: Tensor | None,  # [V of this rank]
    spec: HeadSpec,
    *,
    ignore_index: int,
    entropy: bool,
    backend: str,
    workspace_bytes: int,
    sparse_tolerance: float,
    vocab_order: Tensor | None,  # [V of this rank]
    stats: Tensor | None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:
    """logps [N] and entropy [N], the same on all ranks. Each rank keeps the sparse bound on its own shard."""
    backend = _ops.resolve_backend(backend, hidden.device)
    if backend == "reference":
        raise ValueError("backend='reference' holds the whole vocabulary; it takes no process_group")
    first, total = _shard(group, weight.shape[0], hidden.device)
    _ops.check_values(hidden, weight, targets, bias, ignore_index, vocabulary=total)
    keep = targets != ignore_index
    own = targets - first
    own = torch.where((own >= 0) & (own < weight.shape[0]), own, -1)
    if not _ops.is_trainable(weight, bias) or sparse_tolerance == 0.0:
        sparse_tolerance, vocab_order = 0.0, None
    call = _Call(spec, entropy, backend, workspace_bytes, sparse_tolerance, vocab_order, stats, group)
    logps, h = _VocabParallelLogps.apply(hidden, weight, own, bias, keep, call)
    foreign = keep & ((targets < 0) | (targets >= total))
    return torch.where(foreign, float("nan"), logps), h if entropy else None
