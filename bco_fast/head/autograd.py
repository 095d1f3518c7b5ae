"""The registered operator: schemas, shapes for tracing, autograd. Backends are loaded when called, never before.

`linear_logps` is one opaque node to torch.compile, FSDP and checkpointing. Its arguments are those of
`HeadInputs`, `HeadOptions` and `HeadWant`, spelled out because a schema knows no records.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from ._ops import add_op_namespace_prefix, ops
from .tiling import accumulator_dtype
from .types import DENSE, HeadInputs, HeadNeed, HeadOptions, HeadSaved, HeadSpec, HeadWant

_HEAD = "float logit_scale, float? softcap, float temperature, int? ignore_index"
_OPTIONS = "str backend, int workspace_bytes, float sparse_tolerance"
# A backward that drops rows or chooses blocks has sizes that only the device knows.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
_LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")
_LIBRARY.define(
    f"linear_logps(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, {_HEAD}, {_OPTIONS}, "
    "bool entropy, bool frozen, bool recompute, Tensor? stats) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    f"linear_logps_backward(Tensor? grad_logps, Tensor? grad_entropy, Tensor?[] saved, {_HEAD}, {_OPTIONS}, "
    "bool[] need) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def is_trainable(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient of the head will be asked for."""
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _linear_logps(
    hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index,
    backend, workspace_bytes, sparse_tolerance, entropy, frozen, recompute, stats,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> logps, entropy, row_max, row_sum, row_argmax [N], dlogp_dhidden [N, D], mass [N, T]; [0] where not asked for.

    stats [2] is written by the backward.
    """
    inputs = HeadInputs(hidden, weight, targets, bias, HeadSpec(logit_scale, softcap, temperature))
    backend = dispatch.resolve_backend(backend, hidden.device)
    dispatch.check_values(inputs, ignore_index, vocabulary=len(weight))
    want = HeadWant(entropy, frozen, recompute, mass=sparse_tolerance > 0.0)
    out = dispatch.forward(backend, inputs, dispatch.kept(targets, ignore_index), want, workspace_bytes)
    h, mass = (out.logps.new_zeros(0) if t is None else t for t in (out.entropy, out.mass))
    dlogp_dhidden = hidden.new_zeros(0) if out.dlogp_dhidden is None else out.dlogp_dhidden
    return out.logps, h, out.row_max, out.row_sum, out.row_argmax, dlogp_dhidden, mass


def _linear_logps_fake(hidden, weight, targets, bias, *rest):
    backend, _, sparse_tolerance, entropy, frozen, *_ = rest[4:]
    n, dtype, mass = hidden.shape[0], accumulator_dtype(hidden.dtype), 0
    if sparse_tolerance > 0.0:
        mass = n, dispatch.mass_tiles(weight, dispatch.resolve_backend(backend, hidden.device))
    logps, row_max, row_sum = (hidden.new_empty(n, dtype=dtype) for _ in range(3))
    h = hidden.new_empty(n if entropy else 0, dtype=dtype)
    dlogp_dhidden = hidden.new_empty(hidden.shape if frozen else 0)
    return logps, h, row_max, row_sum, targets.new_empty(n), dlogp_dhidden, hidden.new_empty(mass, dtype=dtype)


def _linear_logps_backward(
    grad_logps, grad_entropy, saved, logit_scale, softcap, temperature, ignore_index,
    backend, workspace_bytes, sparse_tolerance, need,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> d_hidden, d_weight, d_bias, [0] where not needed; (kept fraction, error bound) [2] on the CPU.

    saved: hidden, weight, targets, bias, then the fields of `HeadSaved` after its inputs.
    """
    inputs = HeadInputs(*saved[:4], HeadSpec(logit_scale, softcap, temperature))
    grads = dispatch.backward(
        dispatch.resolve_backend(backend, inputs.hidden.device),
        grad_logps,
        grad_entropy,
        HeadSaved(inputs, *saved[4:]),
        dispatch.kept(inputs.targets, ignore_index),
        HeadNeed(*need),
        workspace_bytes,
        tolerance=sparse_tolerance,
    )
    stats = torch.tensor([grads.kept_fraction, grads.error_bound], dtype=torch.float64)
    return *(inputs.hidden.new_zeros(0) if grad is None else grad for grad in grads[:3]), stats


def _linear_logps_backward_fake(grad_logps, grad_entropy, saved, *rest):
    hidden, weight, _, bias, *_ = saved
    grads = (
        leaf.new_empty(leaf.shape) if n else hidden.new_empty(0)
        for leaf, n in zip((hidden, weight, bias), rest[-1], strict=True)
    )
    return *grads, hidden.new_empty(2, dtype=torch.float64, device="cpu")


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        hidden, weight, targets, bias, *ctx.head = args[:11]
        entropy, frozen, recompute, ctx.stats = args[11:]
        with torch._C._AutoDispatchBelowAutograd():
            out = ops.linear_logps(*args)
        logps, h, row_max, row_sum, argmax, dlogp_dhidden, mass = out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[2:], *(() if entropy and recompute else (h,)))
        saved = []
        if recompute:
            saved = [hidden, weight, targets, bias, logps, row_max, row_sum, h if entropy else None, argmax]
            saved.append(mass if mass.dim() == 2 else None)
        ctx.save_for_backward(dlogp_dhidden if frozen else None, *saved)
        ctx.dtype = hidden.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy, *_):
        dlogp_dhidden, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = [None] * len(needs)
        if grad_logps is None and grad_entropy is None:
            return tuple(grads)
        if dlogp_dhidden is not None and grad_entropy is None:
            grads[0] = (dlogp_dhidden * grad_logps[:, None]).to(ctx.dtype)
            stats = torch.tensor(DENSE)
        else:
            need = [needs[0], needs[1], needs[3]]
            *out, stats = ops.linear_logps_backward(grad_logps, grad_entropy, saved, *ctx.head, need)
            for index, wanted, grad in zip((0, 1, 3), need, out, strict=True):
                grads[index] = grad if wanted else None
        _report(ctx.stats, stats)
        return tuple(grads)


_LIBRARY.impl("linear_logps", _linear_logps, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_logps", lambda *args: _LinearLogps.apply(*args), "Autograd")
_LIBRARY.impl("linear_logps_backward", _linear_logps_backward, "CompositeExplicitAutograd")
for _name, _fake in (("linear_logps", _linear_logps_fake), ("linear_logps_backward", _linear_logps_backward_fake)):
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_LIBRARY)


def _report(stats: Tensor | None, found: Tensor) -> None:
    if stats is not None:
        stats.copy_(found)


def linear_logps(
    inputs: HeadInputs, options: HeadOptions, *, ignore_index: int | None, entropy: bool, entropy_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logps [N], entropy [N] and the sum of e^(z - max z) [N], from the named backend; the reference has no such sum."""
    hidden, weight, targets, bias, spec = inputs
    stats = None if options.stats is None else options.stats.report
    if options.backend == "reference":
        from .backends import reference

        dispatch.check_values(inputs, ignore_index, vocabulary=len(weight))
        logps, h = reference.linear_logps(inputs, dispatch.kept(targets, ignore_index))
        if logps.requires_grad:
            logps.register_hook(lambda _: _report(stats, torch.tensor(DENSE)))
        return logps, h if entropy else None, None
    trainable = is_trainable(weight, bias)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not trainable
    tolerance = float(options.sparse_tolerance) if trainable else 0.0  # a frozen head has nothing to leave out
    logps, h, _, row_sum, *_ = ops.linear_logps(
        hidden, weight, targets, bias, *spec, ignore_index, options.backend, options.workspace_bytes, tolerance,
        entropy, frozen, trainable or (frozen and entropy and entropy_grad), stats,
    )  # fmt: skip
    return logps, h if entropy else None, row_sum
