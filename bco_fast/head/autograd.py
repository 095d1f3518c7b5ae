"""The registered operator: schemas, shapes for tracing, autograd. Backends are loaded when called, never before.

`bco_fast::linear_logps` is one opaque node to torch.compile, FSDP and checkpointing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .tiling import accumulator_dtype
from .types import DENSE, HeadNeed, HeadOptions, HeadSaved, HeadSpec

_LIBRARY = torch.library.Library("bco_fast", "DEF")
_HEAD = "Tensor? bias, float logit_scale, float? softcap, float temperature, int? ignore_index"
_OPTIONS = "str backend, int workspace_bytes, float sparse_tolerance"
_LIBRARY.define(
    f"linear_logps(Tensor hidden, Tensor weight, Tensor targets, {_HEAD}, {_OPTIONS}, "
    "bool entropy, bool frozen, bool recompute, Tensor? stats) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_logps_backward(Tensor? grad_logps, Tensor? grad_entropy, "
    f"Tensor hidden, Tensor weight, Tensor targets, {_HEAD}, {_OPTIONS}, "
    "Tensor logps, Tensor row_max, Tensor row_sum, Tensor? entropy, Tensor row_argmax, Tensor? mass, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)


def is_trainable(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient of the head will be asked for."""
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _linear_logps(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int | None,
    backend: str,
    workspace_bytes: int,
    sparse_tolerance: float,
    entropy: bool,
    frozen: bool,
    recompute: bool,
    stats: Tensor | None,  # [2]; written by the backward
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logps, entropy, row_max, row_sum, row_argmax [N], dlogp_dhidden [N, D], mass [N, T]; [0] where not asked for.

    frozen: compute d logp / d hidden here, so that the backward is one multiplication.
    recompute: a backward that computes the logits again may follow.
    """
    backend = dispatch.resolve_backend(backend, hidden.device)
    dispatch.check_values(hidden, weight, targets, bias, ignore_index, vocabulary=weight.shape[0])
    out = dispatch.forward(
        backend,
        hidden,
        weight,
        targets,
        bias,
        dispatch.kept(targets, ignore_index),
        HeadSpec(logit_scale, softcap, temperature),
        entropy=entropy,
        frozen=frozen,
        recompute=recompute,
        mass=sparse_tolerance > 0.0,
        workspace_bytes=workspace_bytes,
    )
    optional = (out.entropy, out.dlogp_dhidden, out.mass)
    h, dlogp_dhidden, mass = (out.logps.new_zeros(0) if t is None else t for t in optional)
    return out.logps, h, out.row_max, out.row_sum, out.row_argmax, dlogp_dhidden.to(hidden.dtype), mass


def _linear_logps_fake(
    hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index, backend, workspace_bytes,
    sparse_tolerance, entropy, frozen, *_,
):  # fmt: skip
    n = hidden.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    mass = 0
    if sparse_tolerance > 0.0:
        mass = n, dispatch.mass_tiles(weight, dispatch.resolve_backend(backend, hidden.device))
    logps, row_max, row_sum = (hidden.new_empty(n, dtype=dtype) for _ in range(3))
    h = hidden.new_empty(n if entropy else 0, dtype=dtype)
    dlogp_dhidden = hidden.new_empty(hidden.shape if frozen else 0)
    return logps, h, row_max, row_sum, targets.new_empty(n), dlogp_dhidden, hidden.new_empty(mass, dtype=dtype)


def _linear_logps_backward(
    grad_logps: Tensor | None,  # [N]
    grad_entropy: Tensor | None,  # [N]
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int | None,
    backend: str,
    workspace_bytes: int,
    sparse_tolerance: float,
    logps: Tensor,  # [N]
    row_max: Tensor,  # [N]
    row_sum: Tensor,  # [N]
    entropy: Tensor | None,  # [N]
    row_argmax: Tensor,  # [N]
    mass: Tensor | None,  # [N, T]
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> d_hidden [N, D], d_weight [V, D], d_bias [V], [0] where not needed; (kept fraction, error bound) on the CPU."""
    grads = dispatch.backward(
        dispatch.resolve_backend(backend, hidden.device),
        grad_logps,
        grad_entropy,
        HeadSaved(hidden, weight, targets, bias, logps, row_max, row_sum, entropy, row_argmax),
        dispatch.kept(targets, ignore_index),
        HeadSpec(logit_scale, softcap, temperature),
        need=HeadNeed(need_hidden, need_weight, need_bias),
        workspace_bytes=workspace_bytes,
        mass=mass,
        tolerance=sparse_tolerance,
    )
    stats = torch.tensor([grads.kept_fraction, grads.error_bound], dtype=torch.float64)
    return *(hidden.new_zeros(0) if grad is None else grad for grad in grads[:3]), stats


def _linear_logps_backward_fake(grad_logps, grad_entropy, hidden, weight, targets, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape) if need_weight else hidden.new_empty(0),
        bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
        hidden.new_empty(2, dtype=torch.float64, device="cpu"),
    )


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        hidden, weight, targets, bias, *head = args[:11]
        entropy, frozen, recompute, ctx.stats = args[11:]
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.bco_fast.linear_logps(*args)
        logps, h, row_max, row_sum, argmax, dlogp_dhidden, mass = out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[2:], *(() if entropy and recompute else (h,)))
        saved = [None] * 10
        if recompute:
            saved = [hidden, weight, targets, bias, logps, row_max, row_sum, h if entropy else None, argmax]
            saved.append(mass if mass.dim() == 2 else None)
        ctx.save_for_backward(*saved, dlogp_dhidden if frozen else None)
        ctx.head, ctx.dtype = head, hidden.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy, *_):
        *saved, dlogp_dhidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = [None] * len(needs)
        if grad_logps is None and grad_entropy is None:
            return tuple(grads)
        if dlogp_dhidden is not None and grad_entropy is None:
            grads[0] = (dlogp_dhidden * grad_logps[:, None]).to(ctx.dtype)
            if ctx.stats is not None:
                report_dense(ctx.stats)
            return tuple(grads)
        need = (needs[0], needs[1], needs[3])
        *out, stats = torch.ops.bco_fast.linear_logps_backward(
            grad_logps, grad_entropy, *saved[:4], *ctx.head, *saved[4:], *need
        )
        if ctx.stats is not None:
            ctx.stats.copy_(stats)
        for index, wanted, grad in zip((0, 1, 3), need, out, strict=True):
            grads[index] = grad if wanted else None
        return tuple(grads)


_LIBRARY.impl("linear_logps", _linear_logps, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_logps", lambda *args: _LinearLogps.apply(*args), "Autograd")
_LIBRARY.impl("linear_logps_backward", _linear_logps_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bco_fast::linear_logps", _linear_logps_fake, lib=_LIBRARY)
torch.library.register_fake("bco_fast::linear_logps_backward", _linear_logps_backward_fake, lib=_LIBRARY)


def report_dense(stats: Tensor) -> None:
    stats.copy_(torch.tensor(DENSE))


def linear_logps(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    spec: HeadSpec,
    options: HeadOptions,
    *,
    ignore_index: int | None,
    entropy: bool,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """logps [N] and entropy [N] from the named backend."""
    stats = None if options.stats is None else options.stats.report
    if options.backend == "reference":
        from .backends import reference

        dispatch.check_values(hidden, weight, targets, bias, ignore_index, vocabulary=weight.shape[0])
        logps, h = reference.linear_logps(
            hidden, weight, targets, bias, spec, keep=dispatch.kept(targets, ignore_index)
        )
        if stats is not None and logps.requires_grad:
            logps.register_hook(lambda _: report_dense(stats))
        return logps, h if entropy else None
    trainable = is_trainable(weight, bias)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not trainable
    tolerance = options.sparse_tolerance if trainable else 0.0  # a frozen head has nothing to leave out
    logps, h, *_ = torch.ops.bco_fast.linear_logps(
        hidden, weight, targets, bias, *spec, ignore_index, options.backend, options.workspace_bytes, float(tolerance),
        entropy, frozen, trainable or (frozen and entropy and entropy_grad), stats,
    )  # fmt: skip
    return logps, h if entropy else None
