"""The fused head with its vocabulary sharded over ranks: each rank holds some rows of the weight, all see all tokens.

Each rank treats its shard as the whole vocabulary. One all-gather of 4 numbers a token (max, sum, target logit, entropy sum)
then joins the statistics, exactly as the kernels join their vocabulary ranges. The backward needs one all-reduce of
d hidden; the gradient of a shard stays on its rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .autograd import is_trainable
from .tiling import accumulator_dtype
from .types import HeadInputs, HeadNeed, HeadOptions, HeadSaved, HeadSpec, HeadWant


def _shard(group: dist.ProcessGroup, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(first vocabulary id of this rank, size of the whole vocabulary), 0-d int64 on the device: nothing waits for them.

    Every call asks the other ranks. A result kept from an earlier call would leave out a rank whose shard is as large as
    before, while one whose shard has changed waits for it.
    """
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([rows], device=device), group=group)
    counts = torch.cat(sizes)
    return counts[: dist.get_rank(group)].sum(), counts.sum()


def _join(parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[ranks, 4, N] of (m, s, t, u) per shard -> row_max, row_sum, target logit, u of the whole vocabulary."""
    m, s, t, u = parts.unbind(1)
    row_max = m.amax(0)
    moved = torch.where(m == float("-inf"), 0.0, m - row_max)  # a shard that a bias masks whole has s = 0
    shrink = moved.exp()
    return row_max, (s * shrink).sum(0), t.sum(0), (shrink * (u + moved * s)).sum(0)


class _Call(NamedTuple):
    spec: HeadSpec
    options: HeadOptions
    tolerance: float
    backend: str
    entropy: bool
    group: dist.ProcessGroup


class _VocabParallelLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, keep, call: _Call):
        # hidden [N, D], targets [N] in this rank's own numbering (-1 where foreign), keep [N] bool: not ignored
        entropy, group = call.entropy, call.group
        inputs = HeadInputs(hidden, weight, targets, bias, call.spec)
        want = HeadWant(entropy, mass=call.tolerance > 0.0)
        out = dispatch.forward(call.backend, inputs, keep, want, call.options.workspace_bytes)
        keep_or_all = torch.ones_like(targets, dtype=torch.bool) if keep is None else keep
        logit = torch.where(keep_or_all & (targets >= 0), out.target_logits, 0.0)
        u = torch.zeros_like(logit) if out.entropy is None else out.row_sum * (out.row_sum.log() - out.entropy)
        row_sum = torch.where(keep_or_all, out.row_sum, 1.0)  # ignored rows: any statistics that give 0
        part = torch.stack([out.row_max, row_sum, logit, torch.where(out.row_sum > 0, u, 0.0)])
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        row_max, row_sum, logit, u = _join(torch.stack(parts))
        argmax = torch.where(out.row_max == row_max, out.row_argmax, -1)
        logps = torch.where(keep_or_all, (logit - row_max) - row_sum.log(), 0.0)
        h = torch.where(keep_or_all, row_sum.log() - u / row_sum, 0.0) if entropy else logps.new_zeros(0)
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(h)
        mass = out.mass
        if mass is not None:  # of this shard's sum -> of the whole
            mass *= ((out.row_max - row_max).exp() * out.row_sum / row_sum).nan_to_num(nan=0.0)[:, None]
        ctx.save_for_backward(
            hidden, weight, targets, bias, logps, row_max, row_sum, h if entropy else None, argmax, mass, keep
        )
        ctx.call = call
        return logps, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        *saved, keep = ctx.saved_tensors
        grads: list = [None] * 6
        call = ctx.call
        if grad_logps is None and grad_entropy is None:
            return tuple(grads)
        needs = ctx.needs_input_grad

        def join_hidden(part: Tensor) -> Tensor:
            total = part.to(accumulator_dtype(part.dtype))
            dist.all_reduce(total, group=call.group)
            return total.to(part.dtype)

        found = dispatch.backward(
            call.backend,
            grad_logps,
            grad_entropy,
            HeadSaved(HeadInputs(*saved[:4], call.spec), *saved[4:]),
            keep,
            HeadNeed(needs[0], needs[1], needs[3]),
            call.options.workspace_bytes,
            tolerance=call.tolerance,
            join_hidden=join_hidden,
        )
        if call.options.stats is not None:
            call.options.stats.report.copy_(torch.tensor([found.kept_fraction, found.error_bound]))
        grads[0], grads[1], grads[3] = found[:3]
        return tuple(grads)


def linear_logps(
    inputs: HeadInputs, options: HeadOptions, *, ignore_index: int | None, entropy: bool, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """logps [N] and entropy [N], the same on all ranks.

    weight and bias are this rank's shard; hidden and targets, ids of the whole vocabulary, are the same on all ranks.
    Each rank keeps the sparse bound on its own shard.
    """
    hidden, weight, targets, bias, spec = inputs
    backend = dispatch.resolve_backend(options.backend, hidden.device)
    if backend == "reference":
        raise ValueError("backend='reference' holds the whole vocabulary; it takes no process_group")
    first, total = _shard(group, weight.shape[0], hidden.device)
    dispatch.check_values(inputs, ignore_index, vocabulary=total)
    keep = dispatch.kept(targets, ignore_index)
    own = targets - first
    own = torch.where((own >= 0) & (own < weight.shape[0]), own, -1)
    tolerance = options.sparse_tolerance if is_trainable(weight, bias) else 0.0
    call = _Call(spec, options, tolerance, backend, entropy, group)
    logps, h = _VocabParallelLogps.apply(hidden, weight, own, bias, keep, call)
    outside = (targets < 0) | (targets >= total)
    if keep is not None:
        outside &= keep
    return torch.where(outside, float("nan"), logps), h if entropy else None
