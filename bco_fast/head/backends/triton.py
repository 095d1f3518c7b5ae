"""The `triton` backend: launches of the kernels in `bco_fast.kernels`, and the matmuls between them.

Two forwards give the same numbers: "fused" (matmul, softmax and gather in one kernel) and "fold" (a matmul tile in the
workspace, then a row kernel). `configs.forward_method` picks one; a frozen head always folds, because the tile that the
row kernel leaves behind is what the second matmul of d logp / d hidden wants.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
from torch import Tensor

from ...kernels import configs
from ...kernels.fold_logits import fold_logits_kernel
from ...kernels.head_backward import dlogits_kernel
from ...kernels.head_logps import head_logps_kernel, merge_splits_kernel
from ..sparse.triton import sparse_backward
from ..types import HeadForward, HeadNeed, HeadSaved, HeadSpec, accumulator_dtype, assemble_direction, tile_shape
from .launching import INTERPRETED, TRITON_DTYPE, constants, here, operands, options

__all__ = ["MASS_TILE", "backward", "check_device", "forward", "sparse_backward", "sparse_worth"]

# Wide enough for two tensor-core tiles; a row of the mass table costs 1/256 of its float32 logits.
MASS_TILE = 256
# Below this many columns a chunk starves the matmuls around it; rows are cut instead.
FEWEST_COLUMNS = 4096


def check_device(device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "backend='triton' needs a GPU: the tensors are on the CPU. Use backend='torch' or 'auto', or set "
            "TRITON_INTERPRET=1 before importing triton to run the kernels in its (slow) interpreter."
        )


def sparse_worth(dtype: torch.dtype) -> float:
    """Share of kept cells from which on the dense backward is the faster one. Not measured yet; derived: gathered bf16 rows
    at half of cuBLAS's rate, float32 without tensor cores at a third. Triton multiplies no float64."""
    return {torch.float64: 1.1 if INTERPRETED else 0.0, torch.float32: 0.35}.get(dtype, 0.5)


@functools.cache
def _capability(device: torch.device) -> int:
    """90 for sm_90; 0 where there is none (the interpreter, other vendors)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]; a row whose target is outside [0, V) gets NaN
    bias: Tensor | None,  # [V]
    spec: HeadSpec,
    *,
    entropy: bool,
    direction: bool,
    mass: bool = False,
    order: Tensor | None = None,
    workspace_bytes: int,
    method: Literal["fused", "fold"] | None = None,
) -> HeadForward:
    if method is None:
        method = configs.forward_method(_capability(hidden.device), hidden.dtype.itemsize, hidden.shape[1])
    if method == "fold" or direction or order is not None:  # the fused kernel reads the weight in its own order
        return _forward_fold(hidden, weight, targets, bias, spec, entropy, direction, mass, order, workspace_bytes)
    return _forward_fused(hidden, weight, targets, bias, spec, entropy, workspace_bytes, mass)


def _splits(row_blocks: int, column_blocks: int, device: torch.device, most: int) -> int:
    """Enough vocabulary ranges that every multiprocessor has about four programs to take turns at, but `most` of them."""
    if device.type == "cpu":
        return max(1, min(2, column_blocks, most))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(column_blocks, triton.cdiv(4 * processors, row_blocks), 65535, most))


def _forward_fused(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    spec: HeadSpec,
    entropy: bool,
    workspace_bytes: int,
    mass: bool,
) -> HeadForward:
    n, d = hidden.shape
    v = weight.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    extras = entropy or mass or bias is not None or spec.softcap is not None
    config = here(configs.head_logps(hidden.dtype.itemsize, extras=extras))
    row_blocks, column_blocks = triton.cdiv(n, config.block_n), triton.cdiv(v, config.block_v)
    splits = _splits(row_blocks, column_blocks, hidden.device, most=workspace_bytes // (n * (4 * dtype.itemsize + 4)))
    split = triton.cdiv(column_blocks, splits) * config.block_v
    splits = triton.cdiv(v, split)
    part = hidden.new_empty((splits, 4, n), dtype=dtype)
    part_peak = targets.new_empty((splits, n), dtype=torch.int32)
    masses = hidden.new_empty((n, column_blocks), dtype=dtype) if mass else None
    head_logps_kernel[(row_blocks, splits)](
        hidden_ptr=hidden,
        weight_ptr=weight,
        bias_ptr=bias,
        target_ptr=targets,
        part_ptr=part,
        part_peak_ptr=part_peak,
        mass_ptr=masses,
        N=n,
        V=v,
        D=d,
        SPLIT=split,
        stride_hn=hidden.stride(0),
        stride_wv=weight.stride(0),
        stride_mn=column_blocks,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        HAS_ENTROPY=entropy,
        HAS_MASS=mass,
        ACC=TRITON_DTYPE[dtype],
        UPCAST=INTERPRETED,
        **options(config),
        **constants(spec, bias),
    )
    logps, row_max, row_sum, logits, h = hidden.new_empty((5, n), dtype=dtype).unbind(0)
    peak = torch.empty_like(targets)
    merge = configs.MERGE_SPLITS
    merge_splits_kernel[(triton.cdiv(n, merge.block_n),)](
        part_ptr=part,
        part_peak_ptr=part_peak,
        target_ptr=targets,
        logp_ptr=logps,
        row_max_ptr=row_max,
        row_sum_ptr=row_sum,
        logit_ptr=logits,
        entropy_ptr=h,
        peak_ptr=peak,
        N=n,
        V=v,
        S=splits,
        BLOCK_N=merge.block_n,
        HAS_ENTROPY=entropy,
        ACC=TRITON_DTYPE[dtype],
        **options(merge),
    )
    masses = _wide_masses(masses, config.block_v, row_max, row_sum) if mass else None
    return HeadForward(logps, h if entropy else None, row_max, row_sum, None, logits, peak, masses)


def _forward_fold(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    spec: HeadSpec,
    entropy: bool,
    direction: bool,
    mass: bool,
    order: Tensor | None,
    workspace_bytes: int,
) -> HeadForward:
    dtype = accumulator_dtype(hidden.dtype)
    given = hidden.dtype
    hidden, weight = operands(hidden, weight)
    n, v = hidden.shape[0], weight.shape[0]
    config = here(configs.FOLD_LOGITS)
    state = hidden.new_zeros((5, n), dtype=dtype)
    state[0] = float("-inf")
    peak = torch.full_like(targets, -1)
    shrink, slope = hidden.new_ones((2, n), dtype=dtype).unbind(0) if direction else (None, None)
    pull = hidden.new_zeros(hidden.shape, dtype=dtype) if direction else None
    masses = hidden.new_empty((n, triton.cdiv(v, config.block_v)), dtype=dtype) if mass else None
    rows, columns = _tile(
        hidden,
        v,
        workspace_bytes,
        products=direction,
        sums=False,
        ordered=order is not None,
        step=config.block_v if mass else 1,  # a mass is written by one tile
    )
    buffers = _Buffers(hidden, rows * columns, low=direction)
    for first in range(0, v, columns):
        chunk = _rows(weight, order, first, columns)
        for top in range(0, n, rows):
            block = slice(top, min(top + rows, n))
            tile, out = buffers.product(hidden[block], chunk.T)
            r, c = tile.shape
            fold_logits_kernel[(triton.cdiv(r, config.block_n),)](
                tile_ptr=tile,
                bias_ptr=bias,
                target_ptr=targets[block],
                state_ptr=state[:, block],
                peak_ptr=peak[block],
                shrink_ptr=shrink[block] if direction else None,
                slope_ptr=slope[block] if direction else None,
                mass_ptr=masses[block] if mass else None,
                out_ptr=out if direction else None,
                N=r,
                V=v,
                FIRST=first,
                C=c,
                STATE=n,
                stride_tn=tile.stride(0),
                stride_on=out.stride(0) if direction else 0,
                stride_mn=masses.stride(0) if mass else 0,
                BLOCK_N=config.block_n,
                BLOCK_V=config.block_v,
                HAS_ENTROPY=entropy,
                HAS_MASS=mass,
                HAS_OUT=direction,
                **options(config),
                **constants(spec, bias),
            )
            if direction:
                pull[block] *= shrink[block, None]
                _accumulate(pull[block], out, chunk)
    row_max, row_sum, logits, u, off_target = state.unbind(0)
    outside = (targets < 0) | (targets >= v)
    logits = torch.where(outside, float("nan"), logits)
    grad = None
    if direction:
        grad = assemble_direction(pull, weight, targets, slope, off_target, row_sum, spec, workspace_bytes).to(given)
    return HeadForward(
        (logits - row_max) - row_sum.log(),
        row_sum.log() - u / row_sum if entropy else None,
        row_max,
        row_sum,
        grad,
        logits,
        peak,
        _wide_masses(masses, config.block_v, row_max, row_sum) if mass else None,
    )


def _wide_masses(logs: Tensor, width: int, row_max: Tensor, row_sum: Tensor) -> Tensor:  # [N, V / 256]
    """Log masses of `width` columns to the share of each MASS_TILE columns in its row."""
    group = MASS_TILE // width
    padded = torch.nn.functional.pad(logs, (0, -logs.shape[1] % group), value=float("-inf"))
    shares = torch.exp(padded - (row_max + row_sum.log())[:, None])
    return shares.view(len(logs), -1, group).sum(-1)


class _Buffers:
    """The workspace's tile: float32 logits and, in the matmul's dtype, what a kernel makes of them. Taken once."""

    def __init__(self, hidden: Tensor, cells: int, *, low: bool):
        self.wide = hidden.new_empty(cells, dtype=accumulator_dtype(hidden.dtype))
        self.low = hidden.new_empty(cells) if low and self.wide.dtype != hidden.dtype else self.wide

    def product(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """a @ b [R, C] in float32, and where its successor goes (the same memory where the dtypes agree)."""
        shape = (a.shape[0], b.shape[1])
        wide, low = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self.wide, self.low))
        if a.dtype == wide.dtype:
            return torch.mm(a, b, out=wide), low
        return torch.mm(a, b, out_dtype=wide.dtype, out=wide), low


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32 out of bf16 and fp16."""
    if a.dtype.itemsize >= 4:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _adds_in_float32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _matmul(a, b)


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch's addmm adds low-precision products to a float32 matrix; early ones with out_dtype refuse."""
    square = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(square.float(), square, square, out_dtype=torch.float32, out=square.float())
    except RuntimeError:
        return False
    return True


def _tile(
    hidden: Tensor, v: int, workspace_bytes: int, *, products: bool, sums: bool, ordered: bool, step: int = 1
) -> tuple[int, int]:
    """Rows and columns of a tile. A cell holds a float32 logit and a value in the matmul's dtype.

    Beside them stands a float32 slice of dW with `sums`, once rows are cut; and where this PyTorch cannot add a
    product to a float32 matrix, the product itself, [rows, D] with `products` or a slice of dW. In another `ordered`
    vocabulary the weights are gathered, and a slice of dW always stands beside them.
    """
    n, d = hidden.shape
    item = accumulator_dtype(hidden.dtype).itemsize
    low = hidden.dtype.itemsize < item
    apart = low and not _adds_in_float32(hidden.device, hidden.dtype)
    cell = item + hidden.dtype.itemsize * low
    columns = min(v, max(workspace_bytes // (cell * n), FEWEST_COLUMNS))
    row, cut = item * d * (products and apart), item * d * sums * (2 if apart else 1)
    column = (hidden.dtype.itemsize * d + 2 * cut) * ordered
    return tile_shape(n, n, columns, workspace_bytes, cell=cell, row=row, column=column, cut=cut, step=step)


def _rows(weight: Tensor, order: Tensor | None, first: int, columns: int) -> Tensor:  # [C, D]
    chosen = slice(first, first + columns)
    return weight[chosen] if order is None else weight.index_select(0, order[chosen])


def backward(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    spec: HeadSpec,
    *,
    need: HeadNeed,
    order: Tensor | None = None,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, weight = operands(saved.hidden, saved.weight)
    bias = saved.bias
    n, v = hidden.shape[0], weight.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    d_weight = torch.empty_like(saved.weight, memory_format=torch.contiguous_format) if need.weight else None
    d_bias = torch.empty_like(bias) if need.bias else None
    rows, columns = _tile(hidden, v, workspace_bytes, products=need.hidden, sums=need.weight, ordered=order is not None)
    buffers = _Buffers(hidden, rows * columns, low=True)
    for first in range(0, v, columns):
        chunk = _rows(weight, order, first, columns)
        d_chunk = d_weight[first : first + columns] if need.weight else None
        # One tile of all rows writes its slice of dW in place; cut rows are added up in float32 first.
        total = None
        if need.weight and not (rows == n and d_chunk.dtype == hidden.dtype and order is None):
            total = hidden.new_zeros(chunk.shape, dtype=dtype)
        total_bias = hidden.new_zeros(chunk.shape[0], dtype=dtype) if need.bias else None
        for top in range(0, n, rows):
            block = slice(top, min(top + rows, n))
            tile, dz = buffers.product(hidden[block], chunk.T)
            _dlogits(tile, dz, first, grad_logps, grad_entropy, saved, spec, block)
            if need.hidden:
                _accumulate(d_hidden[block], dz, chunk)
            if total is not None:
                _accumulate(total, dz.T, hidden[block])
            elif need.weight:
                torch.mm(dz.T, hidden, out=d_chunk)
            if need.bias:
                total_bias += dz.sum(0, dtype=dtype)
        if total is not None and order is not None:
            d_weight.index_copy_(0, order[first : first + columns], total.to(d_weight.dtype))
        elif total is not None:
            d_chunk.copy_(total)
        total = None
        if need.bias:
            d_bias[first : first + columns] = total_bias
    return None if d_hidden is None else d_hidden.to(saved.hidden.dtype), d_weight, d_bias


def _dlogits(
    tile: Tensor,  # [R, C] float32
    dz: Tensor,  # [R, C], may be the tile
    first: int,
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    spec: HeadSpec,
    block: slice,
) -> None:
    config = here(configs.DLOGITS)
    r, c = tile.shape
    dlogits_kernel[(triton.cdiv(r, config.block_n), triton.cdiv(c, config.block_v))](
        tile_ptr=tile,
        bias_ptr=saved.bias,
        target_ptr=saved.targets[block],
        logp_ptr=saved.logps[block],
        row_max_ptr=saved.row_max[block],
        row_sum_ptr=saved.row_sum[block],
        peak_ptr=saved.row_peak[block],
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
        **options(config),
        **constants(spec, saved.bias),
    )
