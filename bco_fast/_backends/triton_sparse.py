"""The sparse backward of the `triton` backend: launches over as many cells at a time as the workspace holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..kernels import configs
from ..kernels.sparse_backward import (
    add_products_kernel,
    gathered_dlogits_kernel,
    gathered_dweight_kernel,
    gathered_product_kernel,
)
from . import HeadNeed, HeadSaved, HeadSpec, KeptCells, accumulator_dtype
from .launching import INTERPRETED, TRITON_DTYPE, constants, operands, options


class _Group(NamedTuple):
    """Cells first to last and the tiles they, or nothing, belong to: tile to end."""

    tile: int
    end: int
    first: int
    last: int
    most: int
    """The most cells of one tile."""


def sparse_backward(
    grad_logps: Tensor,  # [N]
    saved: HeadSaved,
    spec: HeadSpec,
    cells: KeptCells,
    *,
    need: HeadNeed,
    order: Tensor | None = None,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, weight = operands(saved.hidden, saved.weight)
    n, d = hidden.shape
    v = weight.shape[0]
    dtype = accumulator_dtype(hidden.dtype)
    low = hidden.itemsize <= 2
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need.weight else None
    d_bias = hidden.new_zeros(v, dtype=dtype) if need.bias else None
    left = workspace_bytes - 2 * cells.width * d * dtype.itemsize  # two carries
    # dlogits and their product with the weights; and the lists by row: two of int64, sorted.
    capacity = max(left // (cells.width * hidden.itemsize + d * dtype.itemsize + 32), 1)
    capacity = min(capacity, max(len(cells.rows), 1))
    dz = hidden.new_empty((capacity, cells.width))
    products = hidden.new_empty((capacity, d), dtype=dtype) if need.hidden else None
    carries = hidden.new_empty((2, cells.width, d), dtype=dtype)
    offsets = torch.tensor(cells.offsets, device=hidden.device)
    for turn, group in enumerate(_groups(cells.offsets, capacity)):
        common = {
            "order_ptr": order,
            "offset_ptr": offsets,
            "FIRST_TILE": group.tile,
            "FIRST": group.first,
            "LAST": group.last,
            "V": v,
            "D": d,
            "TILE": cells.width,
            "HAS_ORDER": order is not None,
            "ACC": TRITON_DTYPE[dtype],
        }
        tiles = group.end - group.tile
        extras = saved.bias is not None or spec.softcap is not None or order is not None
        config = configs.gathered_dlogits(hidden.itemsize, extras=extras)
        config = configs.INTERPRETED if INTERPRETED else config
        gathered_dlogits_kernel[(_blocks(group.most, config.block_n), tiles, cells.width // config.block_v)](
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=saved.bias,
            rows_ptr=cells.rows,
            target_ptr=saved.targets,
            logp_ptr=saved.logps,
            row_max_ptr=saved.row_max,
            row_sum_ptr=saved.row_sum,
            peak_ptr=saved.row_peak,
            grad_logp_ptr=grad_logps,
            out_ptr=dz,
            stride_hn=hidden.stride(0),
            stride_wv=weight.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            BLOCK_D=config.block_d,
            **common,
            **options(config),
            **constants(spec, saved.bias),
        )
        if need.weight or need.bias:
            config = configs.GATHERED_DWEIGHT if low else configs.GATHERED_DWEIGHT_FP32
            config = configs.INTERPRETED if INTERPRETED else config
            columns = _blocks(d, config.block_d) if need.weight else 1
            gathered_dweight_kernel[(tiles, columns, cells.width // config.block_v)](
                hidden_ptr=hidden,
                dz_ptr=dz,
                rows_ptr=cells.rows,
                carry_in_ptr=carries[turn % 2],
                carry_out_ptr=carries[1 - turn % 2],
                d_weight_ptr=d_weight,
                d_bias_ptr=d_bias,
                stride_hn=hidden.stride(0),
                stride_wv=d,
                BLOCK_N=config.block_n,
                BLOCK_V=config.block_v,
                BLOCK_D=config.block_d,
                HAS_WEIGHT=need.weight,
                HAS_BIAS=need.bias,
                **common,
                **options(config),
            )
        if need.hidden and group.first < group.last:
            config = configs.GATHERED_PRODUCT if low else configs.GATHERED_PRODUCT_FP32
            config = configs.INTERPRETED if INTERPRETED else config
            gathered_product_kernel[(_blocks(group.most, config.block_n), tiles, _blocks(d, config.block_d))](
                dz_ptr=dz,
                weight_ptr=weight,
                product_ptr=products,
                stride_wv=weight.stride(0),
                BLOCK_N=config.block_n,
                BLOCK_V=config.block_v,
                BLOCK_D=config.block_d,
                **common,
                **options(config),
            )
            by_row = cells.rows[group.first : group.last].sort(stable=True)
            config = configs.ADD_PRODUCTS
            add_products_kernel[(n, _blocks(d, config.block_d))](
                product_ptr=products,
                place_ptr=by_row.indices,
                row_start_ptr=torch.searchsorted(by_row.values, torch.arange(n + 1, device=hidden.device)),
                d_hidden_ptr=d_hidden,
                D=d,
                BLOCK_D=config.block_d,
                **options(config),
            )
    return (
        None if d_hidden is None else d_hidden.to(saved.hidden.dtype),
        None if d_weight is None else d_weight.to(saved.weight.dtype),
        None if d_bias is None else d_bias.to(saved.bias.dtype),
    )


def _blocks(total: int, block: int) -> int:
    return max(triton.cdiv(total, block), 1)


def _groups(offsets: list[int], capacity: int) -> Iterator[_Group]:
    """All tiles in order, those without a cell too: their gradient is 0 and must be written."""
    tile, first, most, tiles = 0, 0, 0, len(offsets) - 1
    for t in range(tiles):
        start = offsets[t]
        while offsets[t + 1] - first > capacity or t + 1 - tile > 65535:  # the second: a launch's grid
            last = min(first + capacity, offsets[t + 1])
            yield _Group(tile, t + 1, first, last, max(most, last - max(start, first)))
            tile, first, most = t, last, 0
        most = max(most, offsets[t + 1] - max(start, first))
    yield _Group(tile, tiles, first, offsets[-1], most)
