"""Matrix products in the accumulator's precision; on the CPU by MKL or oneDNN."""

from __future__ import annotations

import functools
import os
import platform

import torch
from torch import Tensor

from ..tiling import accumulator_dtype

# Below this MKL is faster, and its dot products are more accurate. The number of rows must not decide: the backward may
# see fewer than the forward, and must round the same way.
ONEDNN_FEWEST_COLUMNS = 16
KEPT_PRODUCTS = 16
"""Compiled products that oneDNN and PyTorch's binding of it keep, unless ONEDNN_PRIMITIVE_CACHE_CAPACITY or
LRU_CACHE_CAPACITY is set. Both keep 1024 by default. A compiled product is for one shape and holds 0.5 MB and more, so
batches whose numbers of tokens differ would collect hundreds of MB; compiling one again takes less than a millisecond."""


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which `a @ b` calls, on this processor.

    MKL is slow on AMD processors: oneDNN was 2.2x as fast on an EPYC with AVX-512. On an Intel Xeon with AVX-512 MKL was
    faster throughout, by 1.1x for hidden @ weight.T and by 1.35x for dz.T @ hidden. The processor's maker decides, not a
    measurement: the two libraries round differently, so a close race would make two runs of one program differ.
    BCO_FAST_CPU_MATMUL=mkl or onednn makes the choice instead.
    """
    forced = os.environ.get("BCO_FAST_CPU_MATMUL")
    if forced is not None:
        if forced not in ("mkl", "onednn"):
            raise ValueError(f"BCO_FAST_CPU_MATMUL must be 'mkl' or 'onednn', not {forced!r}")
        return forced == "onednn"
    if not torch.backends.mkldnn.is_available():
        return False
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor += file.read(1 << 14)
    return not (torch.backends.mkl.is_available() and "GenuineIntel" in processor)


@functools.cache
def _chooses_onednn() -> bool:
    chosen = _onednn_is_faster()
    if chosen:
        # Read at oneDNN's first product. A body in bf16 multiplies by oneDNN before the head does, so it keeps the
        # default: its many shapes come back in every layer.
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, str(KEPT_PRODUCTS))
    return chosen


def uses_onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.enabled and _chooses_onednn()


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, rounded to dtype, as the matmuls of its device read it: a CPU has no product of bf16 with a float32 result."""
    x = x.to(dtype)
    return x.to(accumulator_dtype(dtype)) if x.device.type == "cpu" else x


def writes_into(a: Tensor, b: Tensor) -> bool:
    """Whether `matmul` can write into existing memory; oneDNN allocates its product."""
    return not (uses_onednn(a) and b.shape[1] >= ONEDNN_FEWEST_COLUMNS)


@functools.cache
def adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm adds products of this dtype to a float32 matrix; the first PyTorch with out_dtype refuses."""
    if dtype.itemsize >= 4:
        return True
    square = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(square.float(), square, square, out_dtype=torch.float32, out=square.float())
    except RuntimeError:
        return False
    return True


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, L], into `out` if given; float32 out of bf16 and fp16, never rounded in between.

    b is an `operand`, a an operand too or a tile in the accumulator's dtype, which is rounded to b's.
    """
    a = a.to(b.dtype)
    if not writes_into(a, b):
        product = torch.ops.mkldnn._linear_pointwise(_packed(a), _packed(b).T, None, "none", [], "")
        return product if out is None else out.copy_(product)
    if a.dtype.itemsize >= 4 or (out is not None and out.dtype == a.dtype):
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, L] += a [M, K] @ b [K, L], without a second [M, L] where that is possible."""
    a = a.to(b.dtype)
    if not writes_into(a, b) or not adds_in_place(a.device, a.dtype):
        return total.add_(matmul(a, b))
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _packed(x: Tensor) -> Tensor:
    # Rows with a gap between them send oneDNN to its reference loop, a thousand times slower.
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()
