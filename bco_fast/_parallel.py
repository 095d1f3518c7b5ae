"""The fused head with its vocabulary sharded over ranks: each rank holds some rows of the weight, all see all tokens.

A rank walks its own shard as if it were the vocabulary. The statistics of the ranges (max, sum, target logit, entropy
sum) are then joined exactly as the kernels join theirs, after one all-gather of 4 numbers a token; the backward needs
one all-reduce of d hidden, while each rank's d weight is its own.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _ops
from ._backends import HeadNeed, HeadSaved, HeadSpec


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


class _VocabParallelLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, spec, keep, entropy, backend, workspace_bytes, group):
        # hidden [N, D], targets [N] in this rank's own numbering (-1 where foreign), keep [N] bool: not ignored
        module = _ops.load_backend(backend)
        rows = _ops.kept_rows(keep)
        n = len(targets)
        head = HeadSpec(*spec)
        part = hidden.new_zeros((4, n), dtype=_ops.accumulator_dtype(hidden.dtype))
        part[1] = 1.0  # ignored rows: any statistics that give 0
        if n and (rows is None or len(rows)):
            out = module.forward(
                _ops.unit_stride(_ops.take(hidden, rows)),
                _ops.unit_stride(weight),
                _ops.take(targets, rows).contiguous(),
                bias,
                head,
                entropy=entropy,
                direction=False,
                workspace_bytes=workspace_bytes,
            )
            logit = torch.where(_ops.take(targets, rows) >= 0, out.target_logits, 0.0)
            u = torch.zeros_like(logit) if out.entropy is None else out.row_sum * (out.row_sum.log() - out.entropy)
            u = torch.where(out.row_sum > 0, u, 0.0)
            stats = torch.stack([out.row_max, out.row_sum, logit, u])
            part = stats if rows is None else part.index_copy(1, rows, stats)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        row_max, row_sum, logit, u = _join(torch.stack(parts))
        logps = torch.where(keep, (logit - row_max) - row_sum.log(), 0.0)
        h = torch.where(keep, row_sum.log() - u / row_sum, 0.0) if entropy else hidden.new_zeros(0, dtype=logps.dtype)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(h)
        ctx.save_for_backward(hidden, weight, targets, bias, keep, logps, row_max, row_sum, h)
        ctx.head, ctx.backend, ctx.workspace_bytes, ctx.group = head, backend, workspace_bytes, group
        return logps, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, targets, bias, keep, logps, row_max, row_sum, h = ctx.saved_tensors
        grads: list = [None] * 10
        if grad_logps is None and grad_entropy is None:
            return tuple(grads)
        if grad_logps is None:
            grad_logps = torch.zeros_like(logps)
        needs = ctx.needs_input_grad
        need = HeadNeed(needs[0], needs[1], bias is not None and needs[3])
        moves = grad_logps != 0
        if grad_entropy is not None:
            moves |= grad_entropy != 0
        rows = _ops.kept_rows(keep & moves)
        if len(targets) == 0 or (rows is not None and len(rows) == 0):
            empty = (hidden, weight, bias)
            for index, tensor, wanted in zip((0, 1, 3), empty, need, strict=True):
                grads[index] = torch.zeros_like(tensor) if wanted else None
            return tuple(grads)
        saved = HeadSaved(
            _ops.unit_stride(_ops.take(hidden, rows)),
            _ops.unit_stride(weight),
            _ops.take(targets, rows).contiguous(),
            bias,
            *(_ops.take(t, rows) for t in (logps, row_max, row_sum)),
            _ops.take(h, rows) if grad_entropy is not None else None,
        )
        d_hidden, grads[1], grads[3] = _ops.load_backend(ctx.backend).backward(
            _ops.take(grad_logps, rows).contiguous(),
            None if grad_entropy is None else _ops.take(grad_entropy, rows).contiguous(),
            saved,
            ctx.head,
            need=need,
            workspace_bytes=ctx.workspace_bytes,
        )
        if need.hidden:
            total = d_hidden.to(row_max.dtype)
            dist.all_reduce(total, group=ctx.group)
            grads[0] = _ops.spread(total.to(hidden.dtype), rows, len(targets))
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
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:
    """logps [N] and entropy [N], the same on all ranks."""
    backend = _ops.resolve_backend(backend, hidden.device)
    if backend == "reference":
        raise ValueError("backend='reference' holds the whole vocabulary; it takes no process_group")
    first, total = _shard(group, weight.shape[0], hidden.device)
    _ops.check_values(hidden, weight, targets, bias, ignore_index, vocabulary=total)
    keep = targets != ignore_index
    own = targets - first
    own = torch.where((own >= 0) & (own < weight.shape[0]), own, -1)
    logps, h = _VocabParallelLogps.apply(
        hidden, weight, own, bias, tuple(spec), keep, entropy, backend, workspace_bytes, group
    )
    foreign = keep & ((targets < 0) | (targets >= total))
    return torch.where(foreign, float("nan"), logps), h if entropy else None
