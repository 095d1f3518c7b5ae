"""The sparse backward of the `triton` backend: launches over as many cells at a time as the workspace holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...kernels import configs
from ...kernels.sparse_backward import (
    add_products_kernel,
    gathered_dlogits_kernel,
    gathered_dweight_kernel,
    gathered_product_kernel,
)
from ..backends.launching import TRITON_DTYPE, constants, here, operands, options
from ..types import HeadNeed, HeadSaved, HeadSpec, KeptCells, accumulator_dtype


class _Group(NamedTuple):
    """Cells first to last and the tiles they, or nothing, belong to: tile to end."""

    tile: int
    end: int
    first: int
    last: int
    most: int
    """The most cells of one tile."""

    @property
    def tiles(self) -> int:
        return self.end - self.tile


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
    launches = _Launches(grad_logps, saved, spec, cells, need=need, order=order, workspace_bytes=workspace_bytes)
    for turn, group in enumerate(_groups(cells.offsets, launches.capacity)):
        launches.dlogits(group)
        if need.weight or need.bias:
            launches.dweight(group, turn)
        if need.hidden and group.first < group.last:
            launches.dhidden(group)
    d_hidden, d_weight, d_bias = launches.d_hidden, launches.d_weight, launches.d_bias
    return (
        None if d_hidden is None else d_hidden.to(saved.hidden.dtype),
        None if d_weight is None else d_weight.to(saved.weight.dtype),
        None if d_bias is None else d_bias.to(saved.bias.dtype),
    )


class _Launches:
    """The launches for a group of cells, and what they write into."""

    def __init__(
        self,
        grad_logps: Tensor,
        saved: HeadSaved,
        spec: HeadSpec,
        cells: KeptCells,
        *,
        need: HeadNeed,
        order: Tensor | None,
        workspace_bytes: int,
    ):
        self.grad_logps, self.saved, self.spec, self.cells = grad_logps, saved, spec, cells
        self.need, self.order = need, order
        self.hidden, self.weight = operands(saved.hidden, saved.weight)
        new, d, width = self.hidden.new_empty, self.hidden.shape[1], cells.width
        self.dtype = dtype = accumulator_dtype(self.hidden.dtype)
        self.low = self.hidden.itemsize <= 2
        left = workspace_bytes - 2 * width * d * dtype.itemsize  # two carries
        # dlogits and their product with the weights; and the lists by row: two of int64, sorted.
        capacity = max(left // (width * self.hidden.itemsize + d * dtype.itemsize + 32), 1)
        self.capacity = min(capacity, max(len(cells.rows), 1))
        self.dz = new((self.capacity, width))
        self.products = new((self.capacity, d), dtype=dtype) if need.hidden else None
        self.carries = new((2, width, d), dtype=dtype)
        self.offsets = torch.tensor(cells.offsets, device=self.hidden.device)
        self.d_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=dtype) if need.hidden else None
        self.d_weight = torch.empty_like(self.weight, memory_format=torch.contiguous_format) if need.weight else None
        self.d_bias = self.hidden.new_zeros(len(self.weight), dtype=dtype) if need.bias else None

    def _arguments(self, group: _Group, config: configs.LaunchConfig) -> dict:
        """What all kernels that walk the cells of a tile take."""
        return {
            "order_ptr": self.order,
            "offset_ptr": self.offsets,
            "FIRST_TILE": group.tile,
            "FIRST": group.first,
            "LAST": group.last,
            "V": len(self.weight),
            "D": self.weight.shape[1],
            "TILE": self.cells.width,
            "HAS_ORDER": self.order is not None,
            "ACC": TRITON_DTYPE[self.dtype],
            "BLOCK_N": config.block_n,
            "BLOCK_V": config.block_v,
            "BLOCK_D": config.block_d,
            **options(config),
        }

    def dlogits(self, group: _Group) -> None:
        hidden, weight, saved = self.hidden, self.weight, self.saved
        extras = saved.bias is not None or self.spec.softcap is not None or self.order is not None
        config = here(configs.gathered_dlogits(hidden.itemsize, extras=extras))
        grid = _blocks(group.most, config.block_n), group.tiles, self.cells.width // config.block_v
        gathered_dlogits_kernel[grid](
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=saved.bias,
            rows_ptr=self.cells.rows,
            target_ptr=saved.targets,
            logp_ptr=saved.logps,
            row_max_ptr=saved.row_max,
            row_sum_ptr=saved.row_sum,
            peak_ptr=saved.row_peak,
            grad_logp_ptr=self.grad_logps,
            out_ptr=self.dz,
            stride_hn=hidden.stride(0),
            stride_wv=weight.stride(0),
            **self._arguments(group, config),
            **constants(self.spec, saved.bias),
        )

    def dweight(self, group: _Group, turn: int) -> None:
        """d_weight and d_bias. What a tile cut by the group's end has so far goes to the next turn."""
        config = here(configs.GATHERED_DWEIGHT if self.low else configs.GATHERED_DWEIGHT_FP32)
        d = self.weight.shape[1]
        columns = _blocks(d, config.block_d) if self.need.weight else 1
        gathered_dweight_kernel[(group.tiles, columns, self.cells.width // config.block_v)](
            hidden_ptr=self.hidden,
            dz_ptr=self.dz,
            rows_ptr=self.cells.rows,
            carry_in_ptr=self.carries[turn % 2],
            carry_out_ptr=self.carries[1 - turn % 2],
            d_weight_ptr=self.d_weight,
            d_bias_ptr=self.d_bias,
            stride_hn=self.hidden.stride(0),
            stride_wv=d,
            HAS_WEIGHT=self.need.weight,
            HAS_BIAS=self.need.bias,
            **self._arguments(group, config),
        )

    def dhidden(self, group: _Group) -> None:
        config = here(configs.GATHERED_PRODUCT if self.low else configs.GATHERED_PRODUCT_FP32)
        n, d = self.hidden.shape
        gathered_product_kernel[(_blocks(group.most, config.block_n), group.tiles, _blocks(d, config.block_d))](
            dz_ptr=self.dz,
            weight_ptr=self.weight,
            product_ptr=self.products,
            stride_wv=self.weight.stride(0),
            **self._arguments(group, config),
        )
        by_row = self.cells.rows[group.first : group.last].sort(stable=True)
        config = configs.ADD_PRODUCTS
        add_products_kernel[(n, _blocks(d, config.block_d))](
            product_ptr=self.products,
            place_ptr=by_row.indices,
            row_start_ptr=torch.searchsorted(by_row.values, torch.arange(n + 1, device=self.hidden.device)),
            d_hidden_ptr=self.d_hidden,
            D=d,
            BLOCK_D=config.block_d,
            **options(config),
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
