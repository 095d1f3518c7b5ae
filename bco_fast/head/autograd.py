"""The registered operator: schemas, shapes for tracing, autograd. Loads a backend when called, never before.

`bco_fast::linear_logps` is one opaque node to torch.compile, FSDP and checkpointing. Inside it, rows whose target is
ignored are dropped before the head (prompt tokens are most of a batch) and rows without upstream gradient before the
backward; each costs one scalar read back from the device.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sparse.choose import choose_cells
from .types import HeadForward, HeadNeed, HeadSaved, HeadSpec, accumulator_dtype

logger = logging.getLogger("bco_fast")

DENSE = (1.0, 0.0)  # rho and certified of an exact backward
BACKENDS = ("auto", "triton", "torch", "reference")

_LIBRARY = torch.library.Library("bco_fast", "DEF")
_HEAD = "Tensor? bias, float logit_scale, float? softcap, float temperature, int ignore_index"
_LIBRARY.define(
    f"linear_logps(Tensor hidden, Tensor weight, Tensor targets, {_HEAD}, bool entropy, bool frozen, "
    "str backend, int workspace_bytes, float sparse_tolerance, Tensor? vocab_order, Tensor? stats) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"linear_logps_backward(Tensor? grad_logps, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
    f"{_HEAD}, Tensor logps, Tensor row_max, Tensor row_sum, Tensor entropy, Tensor row_peak, Tensor mass, bool need_hidden, bool need_weight, bool need_bias, "
    "str backend, int workspace_bytes, float sparse_tolerance, Tensor? vocab_order) -> (Tensor, Tensor, Tensor, Tensor)"
)


@functools.cache
def load_backend(name: str):
    return importlib.import_module(f".backends.{name}", __package__)


@functools.cache
def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that `name` means on this device; `auto` says once what it chose."""
    if name == "triton":
        try:
            load_backend("triton").check_device(device)
        except ModuleNotFoundError as error:
            raise RuntimeError("backend='triton' needs the triton package: pip install triton") from error
    if name != "auto":
        return name
    chosen = "triton" if _triton_supports(device) else "torch"
    logger.info("bco_fast: backend %r on %s", chosen, device)
    return chosen


def _triton_supports(device: torch.device) -> bool:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def check_values(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, *, vocabulary: int
) -> None:
    """Value checks, on CPU tensors only: on a GPU each would stall the stream, so there NaN propagates instead."""
    if hidden.device.type != "cpu":
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"targets[{row}] is {int(targets[row])}: outside the vocabulary [0, {vocabulary}) and not "
            f"ignore_index ({ignore_index})"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.numel() or torch.stack(torch.aminmax(tensor)).isfinite().all():
            continue
        wrong = ~tensor.isfinite().all(dim=1)
        if name == "hidden":
            wrong &= targets != ignore_index  # padding may hold anything: it is dropped before the head
        if wrong.any():
            raise ValueError(f"{name} has a value that is not finite, first in row {int(wrong.nonzero()[0])}")
    if bias is not None and not (bias < float("inf")).all():  # -inf masks a token; NaN and +inf mean nothing
        raise ValueError(f"bias has NaN or +inf at token {int((~(bias < float('inf'))).nonzero()[0])}")


def _kept_rows(wanted: Tensor) -> Tensor | None:
    """Indices of the wanted rows, or None when all are."""
    rows = wanted.nonzero()[:, 0]
    return None if len(rows) == len(wanted) else rows


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _spread(values: Tensor, rows: Tensor | None, n: int) -> Tensor:
    return values if rows is None else values.new_zeros((n, *values.shape[1:])).index_copy_(0, rows, values)


def _tiles(weight: Tensor, backend: str) -> int:
    return -(-weight.shape[0] // load_backend(backend).MASS_TILE)


def positions(
    order: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
) -> tuple[Tensor, Tensor | None]:
    """Targets and bias of the vocabulary in that order; targets outside it stay as they are."""
    if order is None:
        return targets, bias
    v = len(order)
    position = torch.zeros_like(order).index_copy_(0, order, torch.arange(v, device=order.device))
    inside = (targets >= 0) & (targets < v)
    return torch.where(inside, position[targets.clamp(0, v - 1)], targets), None if bias is None else bias[order]


def token_order(
    order: Tensor | None,  # [V]
    d_bias: Tensor | None,  # [V], in the positions of `order`
) -> Tensor | None:
    """Undoes what `positions` did to the bias, for its gradient."""
    return d_bias if d_bias is None or order is None else torch.empty_like(d_bias).index_copy_(0, order, d_bias)


def is_trainable(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient of the head will be asked for."""
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _unit_stride(tensor: Tensor) -> Tensor:
    # An expanded row has stride 0 and a transposed one stride N; kernels and oneDNN want rows that lie in memory.
    return tensor if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def _full_precision(tensor: Tensor):
    # Autocast would round the float32 operands of the backends' matmuls.
    return torch.autocast(tensor.device.type, enabled=False)


def forward(
    backend: str,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    keep: Tensor,  # [N] bool
    spec: HeadSpec,
    **options,
) -> HeadForward:
    """The backend's forward on the rows to keep; every statistic of the others is 0. Options are the backend's."""
    n = len(targets)
    rows = _kept_rows(keep)
    if n == 0 or (rows is not None and len(rows) == 0):
        dtype = accumulator_dtype(hidden.dtype)
        logps, row_max, row_sum, logits = (hidden.new_zeros(n, dtype=dtype) for _ in range(4))
        entropy = torch.zeros_like(logps) if options["entropy"] else None
        direction = torch.zeros_like(hidden) if options["direction"] else None
        mass = logps.new_zeros(n, _tiles(weight, backend)) if options["mass"] else None
        return HeadForward(logps, entropy, row_max, row_sum, direction, logits, torch.zeros_like(targets), mass)
    with _full_precision(hidden):
        out = load_backend(backend).forward(
            _unit_stride(_take(hidden, rows)),
            _unit_stride(weight),
            _take(targets, rows).contiguous(),
            None if bias is None else bias.contiguous(),
            spec,
            **options,
        )
    return HeadForward(*(None if t is None else _spread(t, rows, n) for t in out))


class Gradients(NamedTuple):
    """What `backward` returns: the gradients that are needed, and how sparse the way to them was."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    rho: float = 1.0
    certified: float = 0.0


def backward(
    backend: str,
    grad_logps: Tensor | None,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,  # of all N rows
    keep: Tensor,  # [N] bool
    spec: HeadSpec,
    *,
    need: HeadNeed,
    workspace_bytes: int,
    mass: Tensor | None = None,  # [N, T]
    tolerance: float = 0.0,
    order: Tensor | None = None,  # [V]; targets, bias and peaks of `saved` are in its positions
    join_hidden: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """The backend's backward on the kept rows into which a gradient comes.

    With the mass table of the forward it computes the cells that `tolerance` asks for, unless so many that all are
    cheaper. `join_hidden` is applied to d hidden: of those rows, or of all where ranks may have chosen differently.
    """
    n = len(saved.targets)
    if grad_logps is None:
        grad_logps = torch.zeros_like(saved.row_max)
    options = {"need": need, "order": order, "workspace_bytes": workspace_bytes}
    module = load_backend(backend)
    if mass is not None and grad_entropy is None and n:
        upstream = torch.where(keep, grad_logps, 0.0)
        choice = choose_cells(
            upstream,
            saved,
            mass,
            spec,
            tolerance,
            width=module.MASS_TILE,
            sharded=join_hidden is not None,
            worth=module.sparse_worth(saved.hidden.dtype),
            workspace_bytes=workspace_bytes,
        )
        if choice.cells is not None:
            whole = saved._replace(hidden=_unit_stride(saved.hidden), weight=_unit_stride(saved.weight))
            with _full_precision(saved.hidden):
                d_hidden, *others = module.sparse_backward(upstream, whole, spec, choice.cells, **options)
            if d_hidden is not None and join_hidden is not None:
                d_hidden = join_hidden(d_hidden)
            return Gradients(d_hidden, *others, choice.rho, choice.certified)
    moves = grad_logps != 0
    if grad_entropy is not None:
        moves |= grad_entropy != 0
    rows = _kept_rows(keep & moves)
    if n == 0 or (rows is not None and len(rows) == 0):
        leaves = (saved.hidden, saved.weight, saved.bias)
        zeros = (torch.zeros_like(t) if wanted else None for t, wanted in zip(leaves, need, strict=True))
        return Gradients(*zeros)
    part = HeadSaved(
        _unit_stride(_take(saved.hidden, rows)),
        _unit_stride(saved.weight),
        _take(saved.targets, rows).contiguous(),
        None if saved.bias is None else saved.bias.contiguous(),
        _take(saved.logps, rows),
        _take(saved.row_max, rows),
        _take(saved.row_sum, rows),
        None if grad_entropy is None else _take(saved.entropy, rows),
        _take(saved.row_peak, rows),
    )
    with _full_precision(saved.hidden):
        d_hidden, d_weight, d_bias = module.backward(
            _take(grad_logps, rows).contiguous(),
            None if grad_entropy is None else _take(grad_entropy, rows).contiguous(),
            part,
            spec,
            **options,
        )
    if d_hidden is not None:
        join = join_hidden or (lambda part: part)
        d_hidden = _spread(join(d_hidden), rows, n) if mass is None else join(_spread(d_hidden, rows, n))
    return Gradients(d_hidden, d_weight, d_bias)


def _linear_logps(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    frozen: bool,
    backend: str,
    workspace_bytes: int,
    sparse_tolerance: float,
    vocab_order: Tensor | None,  # [V]
    stats: Tensor | None,  # [2]; written by the backward
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logps [N], entropy [N] or [0], row_max [N], row_sum [N], direction [N, D] or [0], row_peak [N], mass [N, T] or [0].

    With a frozen head d logp / d hidden can be had in the forward, and the backward is one multiplication.
    """
    backend = resolve_backend(backend, hidden.device)
    check_values(hidden, weight, targets, bias, ignore_index, vocabulary=weight.shape[0])
    places, bias = positions(vocab_order, targets, bias)
    out = forward(
        backend,
        hidden,
        weight,
        places,
        bias,
        targets != ignore_index,
        HeadSpec(logit_scale, softcap, temperature),
        entropy=entropy,
        direction=frozen,
        mass=sparse_tolerance > 0.0,
        order=vocab_order,
        workspace_bytes=workspace_bytes,
    )
    return (
        out.logps,
        out.logps.new_zeros(0) if out.entropy is None else out.entropy,
        out.row_max,
        out.row_sum,
        hidden.new_zeros(0) if out.direction is None else out.direction,
        out.row_peak,
        out.logps.new_zeros(0) if out.mass is None else out.mass,
    )


def _linear_logps_fake(
    hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index, entropy, frozen, backend,
    workspace_bytes, sparse_tolerance, *_,
):  # fmt: skip
    n = hidden.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    tiles = _tiles(weight, resolve_backend(backend, hidden.device)) if sparse_tolerance > 0.0 else 0
    vector = [hidden.new_empty(n, dtype=dtype) for _ in range(3)]
    return (
        vector[0],
        hidden.new_empty(n if entropy else 0, dtype=dtype),
        vector[1],
        vector[2],
        hidden.new_empty(hidden.shape) if frozen else hidden.new_empty(0),
        targets.new_empty(n),
        hidden.new_empty((n, tiles) if sparse_tolerance > 0.0 else (0,), dtype=dtype),
    )


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
    ignore_index: int,
    logps: Tensor,  # [N]
    row_max: Tensor,  # [N]
    row_sum: Tensor,  # [N]
    entropy: Tensor,  # [N] or [0]
    row_peak: Tensor,  # [N]
    mass: Tensor,  # [N, T] or [0]
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    workspace_bytes: int,
    sparse_tolerance: float,
    vocab_order: Tensor | None,  # [V]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> d_hidden [N, D], d_weight [V, D], d_bias [V], [0] where not needed; (rho, certified) on the CPU."""
    places, ordered_bias = positions(vocab_order, targets, bias)
    grads = backward(
        resolve_backend(backend, hidden.device),
        grad_logps,
        grad_entropy,
        HeadSaved(hidden, weight, places, ordered_bias, logps, row_max, row_sum, entropy, row_peak),
        targets != ignore_index,
        HeadSpec(logit_scale, softcap, temperature),
        need=HeadNeed(need_hidden, need_weight, need_bias),
        workspace_bytes=workspace_bytes,
        mass=mass if mass.dim() == 2 else None,
        tolerance=sparse_tolerance,
        order=vocab_order,
    )
    found = (grads.hidden, grads.weight, token_order(vocab_order, grads.bias))
    stats = torch.tensor([grads.rho, grads.certified], dtype=torch.float64)
    return *(hidden.new_zeros(0) if grad is None else grad for grad in found), stats


def _linear_logps_backward_fake(grad_logps, grad_entropy, hidden, weight, targets, bias, *rest):
    need_hidden, need_weight, need_bias = rest[10:13]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        hidden.new_empty(0) if not need_bias else bias.new_empty(bias.shape),
        hidden.new_empty(2, dtype=torch.float64, device="cpu"),
    )


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        hidden, weight, targets, bias = args[:4]
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.bco_fast.linear_logps(*args)
        logps, entropy, row_max, row_sum, direction, peak, mass = out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[2:], *(() if args[8] else (entropy,)))
        ctx.save_for_backward(
            hidden, weight, targets, bias, logps, row_max, row_sum, entropy, peak, mass, direction, args[13]
        )
        ctx.head, ctx.how, ctx.stats = args[4:8], args[10:13], args[14]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy, *_):
        *saved, direction, order = ctx.saved_tensors
        hidden, weight, targets, bias = saved[:4]
        needs = ctx.needs_input_grad
        grads = [None] * len(needs)
        if grad_logps is None and grad_entropy is None:
            return tuple(grads)
        if direction.dim() == 2 and grad_entropy is None:
            grads[0] = (direction * grad_logps[:, None]).to(hidden.dtype)
            if ctx.stats is not None:
                _report_dense(ctx.stats)
            return tuple(grads)
        need = (needs[0], needs[1], bias is not None and needs[3])
        *out, stats = torch.ops.bco_fast.linear_logps_backward(
            grad_logps, grad_entropy, hidden, weight, targets, bias, *ctx.head, *saved[4:], *need, *ctx.how, order
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


def _report_dense(stats: Tensor) -> None:
    stats.copy_(torch.tensor(DENSE))


def linear_logps(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    spec: HeadSpec,
    *,
    ignore_index: int,
    entropy: bool,
    backend: str,
    workspace_bytes: int,
    sparse_tolerance: float,
    vocab_order: Tensor | None,  # [V]
    stats: Tensor | None,  # [2] float64, CPU
) -> tuple[Tensor, Tensor | None]:
    """logps [N] and entropy [N] from the named backend."""
    if backend == "reference":
        from .backends import reference

        check_values(hidden, weight, targets, bias, ignore_index, vocabulary=weight.shape[0])
        logps, h = reference.linear_logps(hidden, weight, targets, bias, spec, ignore_index=ignore_index)
        if stats is not None and logps.requires_grad:
            logps.register_hook(lambda _: _report_dense(stats))
        return logps, h if entropy else None
    trainable = is_trainable(weight, bias)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not trainable
    if not trainable or sparse_tolerance == 0.0:  # nothing to be sparse about
        sparse_tolerance, vocab_order = 0.0, None
    logps, h, *_ = torch.ops.bco_fast.linear_logps(
        hidden, weight, targets, bias, *spec, ignore_index, entropy, frozen, backend, workspace_bytes,
        sparse_tolerance, vocab_order, stats,
    )  # fmt: skip
    return logps, h if entropy else None
