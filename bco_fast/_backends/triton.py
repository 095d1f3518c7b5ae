"""The `triton` backend: launches of the kernels in `bco_fast.kernels`, and the matmuls between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import configs
from ..kernels.head_backward import dlogits_kernel
from ..kernels.head_logps import head_logps_kernel, merge_splits_kernel
from . import HeadForward, HeadNeed, HeadSaved, HeadSpec, accumulator_dtype

INTERPRETED = not isinstance(head_logps_kernel, triton.runtime.JITFunction)
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
# Below this many columns a chunk starves the matmuls around it; rows are cut instead.
FEWEST_COLUMNS = 4096


def check_device(device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "backend='triton' needs a GPU: the tensors are on the CPU. Use backend='torch' or 'auto', or set "
            "TRITON_INTERPRET=1 before importing triton to run the kernels in its (slow) interpreter."
        )


def _constants(spec: HeadSpec, bias: Tensor | None) -> dict:
    return {
        "LOGIT_SCALE": spec.logit_scale,
        "SOFTCAP": spec.softcap or 1.0,
        "TEMPERATURE": spec.temperature,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": spec.softcap is not None,
    }


def _splits(row_blocks: int, column_blocks: int, device: torch.device) -> int:
    """Enough vocabulary ranges that every multiprocessor has about four programs to take turns at."""
    if device.type == "cpu":
        return min(2, column_blocks)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(column_blocks, triton.cdiv(4 * processors, row_blocks), 65535))


def forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]; a row whose target is outside [0, V) gets NaN
    bias: Tensor | None,  # [V]
    spec: HeadSpec,
    *,
    entropy: bool,
    direction: bool,
    workspace_bytes: int,
) -> HeadForward:
    n, d = hidden.shape
    v = weight.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    extras = entropy or bias is not None or spec.softcap is not None
    config = configs.INTERPRETED if INTERPRETED else configs.head_logps(hidden.dtype.itemsize, extras=extras)
    row_blocks, column_blocks = triton.cdiv(n, config.block_n), triton.cdiv(v, config.block_v)
    splits = _splits(row_blocks, column_blocks, hidden.device)
    split = triton.cdiv(column_blocks, splits) * config.block_v
    splits = triton.cdiv(v, split)
    part = hidden.new_empty((splits, 4, n), dtype=dtype)
    head_logps_kernel[(row_blocks, splits)](
        hidden_ptr=hidden,
        weight_ptr=weight,
        bias_ptr=bias,
        target_ptr=targets,
        part_ptr=part,
        N=n,
        V=v,
        D=d,
        SPLIT=split,
        stride_hn=hidden.stride(0),
        stride_wv=weight.stride(0),
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        HAS_ENTROPY=entropy,
        ACC=TRITON_DTYPE[dtype],
        UPCAST=INTERPRETED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **_constants(spec, bias),
    )
    logps, row_max, row_sum, h = hidden.new_empty((4, n), dtype=dtype).unbind(0)
    merge = configs.MERGE_SPLITS
    merge_splits_kernel[(triton.cdiv(n, merge.block_n),)](
        part_ptr=part,
        target_ptr=targets,
        logp_ptr=logps,
        row_max_ptr=row_max,
        row_sum_ptr=row_sum,
        entropy_ptr=h,
        N=n,
        V=v,
        S=splits,
        BLOCK_N=merge.block_n,
        HAS_ENTROPY=entropy,
        ACC=TRITON_DTYPE[dtype],
        num_warps=merge.num_warps,
    )
    return HeadForward(logps, h if entropy else None, row_max, row_sum, None)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32 out of bf16 and fp16."""
    if a.dtype.itemsize >= 4:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def _tile_shape(hidden: Tensor, v: int, workspace_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile: a float32 logit and its dlogit in the matmul's dtype are held per cell."""
    n = hidden.shape[0]
    cells = workspace_bytes // (accumulator_dtype(hidden.dtype).itemsize + hidden.dtype.itemsize)
    columns = min(v, max(cells // n, min(FEWEST_COLUMNS, int(cells**0.5)), 64))
    rows = min(n, max(cells // columns, 64))
    return rows, columns


def backward(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    spec: HeadSpec,
    *,
    need: HeadNeed,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, weight, bias = saved.hidden, saved.weight, saved.bias
    if INTERPRETED and hidden.dtype.itemsize < 4:  # the interpreter truncates bf16 stores, the CPU has no out_dtype
        hidden, weight = hidden.float(), weight.float()
    n, v = hidden.shape[0], weight.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    d_weight = torch.empty_like(saved.weight, memory_format=torch.contiguous_format) if need.weight else None
    d_bias = torch.empty_like(bias) if need.bias else None
    rows, columns = _tile_shape(hidden, v, workspace_bytes)
    for first in range(0, v, columns):
        chunk = weight[first : first + columns]
        d_chunk, d_chunk_bias = None, None
        for top in range(0, n, rows):
            block = slice(top, min(top + rows, n))
            dz = _dlogits(hidden[block], chunk, first, grad_logps, grad_entropy, saved, spec, block)
            if need.hidden:
                d_hidden[block] += _matmul(dz, chunk)
            if need.weight:
                part = _matmul(dz.T, hidden[block])
                d_chunk = part if d_chunk is None else d_chunk.add_(part)
            if need.bias:
                part = dz.sum(0, dtype=dtype)
                d_chunk_bias = part if d_chunk_bias is None else d_chunk_bias.add_(part)
        if need.weight:
            d_weight[first : first + columns] = d_chunk
        if need.bias:
            d_bias[first : first + columns] = d_chunk_bias
    return None if d_hidden is None else d_hidden.to(saved.hidden.dtype), d_weight, d_bias


def _dlogits(
    hidden: Tensor,  # [R, D]
    chunk: Tensor,  # [C, D]
    first: int,
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    spec: HeadSpec,
    block: slice,
) -> Tensor:
    """One tile: the matmul, then the row kernel. [R, C] in the dtype of hidden."""
    tile = _matmul(hidden, chunk.T)
    dz = tile if tile.dtype == hidden.dtype else torch.empty_like(tile, dtype=hidden.dtype)
    config = configs.INTERPRETED if INTERPRETED else configs.DLOGITS
    r, c = tile.shape
    dlogits_kernel[(triton.cdiv(r, config.block_n), triton.cdiv(c, config.block_v))](
        tile_ptr=tile,
        bias_ptr=saved.bias,
        target_ptr=saved.targets[block],
        logp_ptr=saved.logps[block],
        row_max_ptr=saved.row_max[block],
        row_sum_ptr=saved.row_sum[block],
        entropy_ptr=None if grad_entropy is None else saved.entropy[block],
        grad_logp_ptr=grad_logps[block],
        grad_entropy_ptr=None if grad_entropy is None else grad_entropy[block],
        out_ptr=dz,
        N=r,
        V=saved.weight.shape[0],
        FIRST=first,
        C=c,
        stride_tn=tile.stride(0),
        stride_on=dz.stride(0),
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        HAS_GRAD_ENTROPY=grad_entropy is not None,
        num_warps=config.num_warps,
        **_constants(spec, saved.bias),
    )
    return dz
