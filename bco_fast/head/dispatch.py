"""From all rows to a backend's rows: the choice of the backend, checks of values, rows that need no work.

Rows whose target is ignored are dropped before the head, rows without upstream gradient before the backward. Each costs
a scalar read back from the device, so without an `ignore_index` nothing is dropped on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse.choose import choose_blocks
from .tiling import accumulator_dtype
from .types import DENSE, HeadForward, HeadInputs, HeadNeed, HeadSaved, HeadWant, NotFiniteError

logger = logging.getLogger("bco_fast")


@functools.cache
def load_backend(name: str):
    return importlib.import_module(f".backends.{name}", __package__)


@functools.cache
def load_sparse(name: str):
    return importlib.import_module(f".sparse.{name}", __package__)


@functools.cache
def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that `name` means on this device; `auto` logs once what it chose."""
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


def mass_tiles(weight: Tensor, backend: str) -> int:
    """Entries of a row of the backend's mass table."""
    return -(-len(weight) // load_backend(backend).MASS_TILE)


def kept(targets: Tensor, ignore_index: int | None) -> Tensor | None:  # [N] bool
    """Rows whose target counts; None when all do."""
    return None if ignore_index is None else targets != ignore_index


def check_values(inputs: HeadInputs, ignore_index: int | None, *, vocabulary: int) -> None:
    """Value checks, on CPU tensors only: on a GPU each would stall the stream, so there NaN propagates instead."""
    hidden, weight, targets, bias, _ = inputs
    if hidden.device.type != "cpu":
        return
    keep = kept(targets, ignore_index)
    bad = (targets < 0) | (targets >= vocabulary)
    if keep is not None:
        bad &= keep
    if bad.any():
        row = int(bad.nonzero()[0])
        unless = "" if keep is None else f" and not ignore_index ({ignore_index})"
        raise IndexError(f"targets[{row}] is {int(targets[row])}: outside the vocabulary [0, {vocabulary}){unless}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.numel() or torch.stack(torch.aminmax(tensor)).isfinite().all():
            continue
        wrong = ~tensor.isfinite().all(dim=1)
        if name == "hidden" and keep is not None:
            wrong &= keep  # padding may hold anything: it is dropped before the head
        if wrong.any():
            raise NotFiniteError(f"{name} has a value that is not finite, first in row {int(wrong.nonzero()[0])}")
    if bias is not None and not (bias < float("inf")).all():  # -inf masks a token; NaN and +inf mean nothing
        raise ValueError(f"bias has NaN or +inf at token {int((~(bias < float('inf'))).nonzero()[0])}")


def _indices(wanted: Tensor | None) -> Tensor | None:
    """Indices of the wanted rows, or None when all are."""
    if wanted is None:
        return None
    rows = wanted.nonzero()[:, 0]
    return None if len(rows) == len(wanted) else rows


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _spread(values: Tensor, rows: Tensor | None, n: int) -> Tensor:
    return values if rows is None else values.new_zeros((n, *values.shape[1:])).index_copy_(0, rows, values)


def _unit_stride(tensor: Tensor) -> Tensor:
    # An expanded row has stride 0 and a transposed one stride N; kernels and oneDNN want contiguous rows.
    return tensor if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def _at(inputs: HeadInputs, rows: Tensor | None) -> HeadInputs:
    """The inputs of these rows, as a backend reads them."""
    hidden, weight, targets, bias, spec = inputs
    targets, bias = _take(targets, rows).contiguous(), None if bias is None else bias.contiguous()
    return HeadInputs(_unit_stride(_take(hidden, rows)), _unit_stride(weight), targets, bias, spec)


def _full_precision(tensor: Tensor):
    # Autocast would round the float32 operands of the backends' matmuls. The meta device has none.
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def forward(backend: str, inputs: HeadInputs, keep: Tensor | None, want: HeadWant, workspace_bytes: int) -> HeadForward:
    """The backend's forward on the kept rows [N] bool; every statistic of the others is 0."""
    hidden, n, rows = inputs.hidden, len(inputs.targets), _indices(keep)
    if n == 0 or (rows is not None and len(rows) == 0):
        logps, entropy, row_max, row_sum, logits = (
            hidden.new_zeros((5, n), dtype=accumulator_dtype(hidden.dtype)).clone().unbind(0)
        )
        mass = logps.new_zeros(n, mass_tiles(inputs.weight, backend)) if want.mass else None
        dlogp_dhidden = torch.zeros_like(hidden) if want.frozen else None
        argmax = torch.zeros_like(inputs.targets)
        return HeadForward(
            logps, entropy if want.entropy else None, row_max, row_sum, argmax, logits, dlogp_dhidden, mass
        )
    with _full_precision(hidden):
        out = load_backend(backend).forward(_at(inputs, rows), want, workspace_bytes)
    return HeadForward(*(None if t is None else _spread(t, rows, n) for t in out))


class Gradients(NamedTuple):
    """The gradients that are needed, and how sparse the backward was."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    kept_fraction: float = DENSE[0]
    error_bound: float = DENSE[1]


def backward(
    backend: str,
    grad_logps: Tensor | None,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,  # of all N rows
    keep: Tensor | None,  # [N] bool
    need: HeadNeed,
    workspace_bytes: int,
    *,
    tolerance: float = 0.0,
    join_hidden: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """The backend's backward on the kept rows with an upstream gradient.

    With the mass table of the forward it computes the blocks that `tolerance` asks for, or all of them where that is
    cheaper. `join_hidden` sums d hidden over ranks: of those rows, or of all where ranks may have chosen differently.
    """
    inputs, n = saved.inputs, len(saved.inputs.targets)
    if grad_logps is None:
        grad_logps = torch.zeros_like(saved.row_max)
    join = join_hidden or (lambda part: part)
    if saved.mass is not None and grad_entropy is None and n:
        upstream = grad_logps if keep is None else torch.where(keep, grad_logps, 0.0)
        sparse = load_sparse(backend)
        choice = choose_blocks(
            upstream,
            saved,
            tolerance,
            width=load_backend(backend).MASS_TILE,
            sharded=join_hidden is not None,
            break_even=sparse.break_even(inputs.hidden.dtype),
            workspace_bytes=workspace_bytes,
        )
        if choice.blocks is not None:
            with _full_precision(inputs.hidden):
                whole = saved._replace(inputs=_at(inputs, None))
                d_hidden, *others = sparse.backward(upstream, whole, choice.blocks, need, workspace_bytes)
            d_hidden = None if d_hidden is None else join(d_hidden)
            return Gradients(d_hidden, *others, choice.kept_fraction, choice.error_bound)
    rows = _indices(_moving(grad_logps, grad_entropy, keep))
    if n == 0 or (rows is not None and len(rows) == 0):
        leaves = (inputs.hidden, inputs.weight, inputs.bias)
        return Gradients(*(torch.zeros_like(t) if wanted else None for t, wanted in zip(leaves, need, strict=True)))
    vectors = (grad_logps, grad_entropy, saved.logps, saved.row_max, saved.row_sum, saved.entropy, saved.row_argmax)
    with _full_precision(inputs.hidden):
        c, g, *statistics = (None if t is None else _take(t, rows).contiguous() for t in vectors)
        part = HeadSaved(_at(inputs, rows), *statistics)
        d_hidden, d_weight, d_bias = load_backend(backend).backward(c, g, part, need, workspace_bytes)
    if d_hidden is not None:
        d_hidden = join(_spread(d_hidden, rows, n)) if saved.mass is not None else _spread(join(d_hidden), rows, n)
    return Gradients(d_hidden, d_weight, d_bias)


def _moving(grad_logps: Tensor, grad_entropy: Tensor | None, keep: Tensor | None) -> Tensor | None:  # [N] bool
    """Rows with an upstream gradient; None, which is all, where nobody asked to drop rows and finding them would wait
    for the GPU."""
    if keep is None and grad_logps.device.type != "cpu":
        return None
    moving = grad_logps != 0
    if grad_entropy is not None:
        moving |= grad_entropy != 0
    return moving if keep is None else moving & keep
