"""The sparse backward of the `triton` backend: launches over as many blocks at a time as the workspace holds."""

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
from ..backends.launching import INTERPRETED, TRITON_DTYPE, constants, here, launch
from ..backends.products import add_matmul, adds_in_place, uses_onednn
from ..tiling import accumulator_dtype
from ..types import Grads, HeadNeed, HeadSaved, KeptBlocks


def break_even(dtype: torch.dtype) -> float:
    """Kept fraction at which the dense backward becomes the faster one. Not measured yet; derived (`head.roofline`) from
    gathered rows at 0.3 of cuBLAS's rate. Triton multiplies no float64."""
    if dtype == torch.float64:
        return 1.1 if INTERPRETED else 0.0
    return 0.35 if dtype.itemsize <= 2 else 0.29


# Of a scattered gradient's group. Fewer, and the passes over the sums [N, D] cost more than the products that they save.
FEWEST_COLUMNS = 2048


class _Group(NamedTuple):
    """Blocks first to last, and the tiles from tile to end, some of which may have no block."""

    tile: int
    end: int
    first: int
    last: int
    most: int
    """The most blocks of one tile."""

    @property
    def tiles(self) -> int:
        return self.end - self.tile


def backward(
    grad_logps: Tensor,  # [N]
    saved: HeadSaved,
    blocks: KeptBlocks,
    need: HeadNeed,
    workspace_bytes: int,
) -> Grads:
    launches = _Launches(grad_logps, saved, blocks, need, workspace_bytes)
    for turn, group in enumerate(_groups(blocks.offsets, launches.capacity, launches.most_tiles)):
        chunk = launches.weight_of(group)
        launches.dlogits(group, chunk)
        if need.weight or need.bias:
            launches.dweight(group, turn)
        if need.hidden and group.first < group.last:
            if launches.scattered:
                launches.dhidden_at_once(chunk)
            else:
                launches.dhidden(group, chunk)
    sums = launches.d_hidden, launches.d_weight, launches.d_bias
    leaves = saved.inputs.hidden, saved.inputs.weight, saved.inputs.bias
    return tuple(None if total is None else total.to(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True))


class _Launches:
    """The launches for a group of blocks, and what they write into."""

    def __init__(self, grad_logps: Tensor, saved: HeadSaved, blocks: KeptBlocks, need: HeadNeed, workspace_bytes: int):
        self.grad_logps, self.saved, self.blocks, self.need = grad_logps, saved, blocks, need
        hidden, weight = saved.inputs.hidden, saved.inputs.weight
        self.v, d, width = *weight.shape, blocks.width
        # The interpreter multiplies the bit patterns of bf16 and truncates its stores.
        self.hidden = hidden = hidden.float() if INTERPRETED and hidden.itemsize <= 2 else hidden
        self.dtype = dtype = accumulator_dtype(hidden.dtype)
        self.low = hidden.itemsize <= 2
        left = workspace_bytes - 2 * width * d * dtype.itemsize  # two carries
        cast = width * d * hidden.itemsize * (weight.dtype != saved.inputs.hidden.dtype)  # a group's weights
        new, kept, most = hidden.new_empty, max(len(blocks.rows), 1), 65535  # tiles of a launch's grid
        tiles = self._scattered_tiles(left, cast) if need.hidden else 0
        self.scattered = tiles > 0
        if self.scattered:
            self.capacity, self.most_tiles = kept, min(tiles, most)
            self.dz, self.products = new((len(hidden), self.most_tiles * width)), None
        else:
            self.most_tiles = min(max(left // 2 // cast, 1), most) if cast else most
            left = left // 2 if cast else left
            # dlogits and their product with the weights; and the lists by row: two of int64, sorted.
            self.capacity = min(max(left // (width * hidden.itemsize + d * dtype.itemsize + 32), 1), kept)
            self.dz = new((self.capacity, width))
            self.products = new((self.capacity, d), dtype=dtype) if need.hidden else None
        self.carries = new((2, width, d), dtype=dtype)
        self.offsets = torch.tensor(blocks.offsets, device=hidden.device)
        self.d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
        self.d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need.weight else None
        self.d_bias = hidden.new_zeros(self.v, dtype=dtype) if need.bias else None

    def _scattered_tiles(self, left: int, cast: int) -> int:
        """Tiles of a group whose gradient is held whole, zero where no block was kept; 0 where products cost less."""
        given, (n, d), width = self.saved.inputs.hidden, self.hidden.shape, self.blocks.width
        tiles = len(self.blocks.offsets) - 1
        if len(self.blocks.rows) < configs.scattered_from(given.itemsize, d) * n * tiles:
            return 0
        if not adds_in_place(self.hidden.device, self.hidden.dtype):
            left -= n * d * self.dtype.itemsize
        copies = 1 + uses_onednn(self.hidden)  # of a gradient whose rows have a gap between them
        most = min(left // (copies * n * width * self.hidden.itemsize + cast), tiles)
        return most if most >= min(FEWEST_COLUMNS // width, tiles) else 0

    def weight_of(self, group: _Group) -> Tensor:
        """The rows of the weight that belong to the group's tiles, in the dtype of hidden."""
        width, inputs = self.blocks.width, self.saved.inputs
        return inputs.weight[group.tile * width : group.end * width].to(inputs.hidden.dtype).to(self.hidden.dtype)

    def _arguments(self, group: _Group) -> dict:
        """What all kernels that walk the blocks of a tile take."""
        return {
            "offset_ptr": self.offsets,
            "FIRST_TILE": group.tile,
            "FIRST": group.first,
            "LAST": group.last,
            "V": self.v,
            "D": self.hidden.shape[1],
            "TILE": self.blocks.width,
            "ACC": TRITON_DTYPE[self.dtype],
        }

    def _scattering(self) -> dict:
        return {"stride_zn": self.dz.stride(0), "SCATTERED": self.scattered}

    def dlogits(self, group: _Group, weight: Tensor) -> None:
        hidden, saved, (_, _, targets, bias, spec) = self.hidden, self.saved, self.saved.inputs
        extras = bias is not None or spec.softcap is not None
        config = here(configs.gathered_dlogits(hidden.itemsize, extras=extras))
        if self.scattered:
            self.dz.zero_()
        grid = _count(group.most, config.block_n), group.tiles, self.blocks.width // config.block_v
        launch(
            gathered_dlogits_kernel, grid, config, hidden.device,
            hidden_ptr=hidden, weight_ptr=weight, rows_ptr=self.blocks.rows, target_ptr=targets,
            logp_ptr=saved.logps, row_max_ptr=saved.row_max, row_sum_ptr=saved.row_sum, argmax_ptr=saved.row_argmax,
            grad_logp_ptr=self.grad_logps, out_ptr=self.dz, stride_hn=hidden.stride(0), stride_wv=weight.stride(0),
            **self._scattering(), **self._arguments(group), **constants(spec, bias),
        )  # fmt: skip

    def dweight(self, group: _Group, turn: int) -> None:
        """d_weight and d_bias. The sum of a tile that the group's end cuts is carried to the next turn."""
        config = here(configs.GATHERED_DWEIGHT if self.low else configs.GATHERED_DWEIGHT_FP32)
        d = self.hidden.shape[1]
        columns = _count(d, config.block_d) if self.need.weight else 1
        launch(
            gathered_dweight_kernel, (group.tiles, columns, self.blocks.width // config.block_v), config, self.dz.device,
            hidden_ptr=self.hidden, dz_ptr=self.dz, rows_ptr=self.blocks.rows, carry_in_ptr=self.carries[turn % 2],
            carry_out_ptr=self.carries[1 - turn % 2], d_weight_ptr=self.d_weight, d_bias_ptr=self.d_bias,
            stride_hn=self.hidden.stride(0), stride_wv=d, HAS_WEIGHT=self.need.weight, HAS_BIAS=self.need.bias,
            **self._scattering(), **self._arguments(group),
        )  # fmt: skip

    def dhidden(self, group: _Group, weight: Tensor) -> None:
        config = here(configs.GATHERED_PRODUCT if self.low else configs.GATHERED_PRODUCT_FP32)
        (n, d), device = self.hidden.shape, self.dz.device
        launch(
            gathered_product_kernel, (_count(group.most, config.block_n), group.tiles, _count(d, config.block_d)),
            config, device,
            dz_ptr=self.dz, weight_ptr=weight, product_ptr=self.products, stride_wv=weight.stride(0),
            **self._arguments(group),
        )  # fmt: skip
        by_row = self.blocks.rows[group.first : group.last].sort(stable=True)
        row_start = torch.searchsorted(by_row.values, torch.arange(n + 1, device=device))
        config = configs.ADD_PRODUCTS
        launch(
            add_products_kernel, (n, _count(d, config.block_d)), config, device,
            product_ptr=self.products, place_ptr=by_row.indices, row_start_ptr=row_start, d_hidden_ptr=self.d_hidden, D=d,
        )  # fmt: skip

    def dhidden_at_once(self, weight: Tensor) -> None:
        add_matmul(self.d_hidden, self.dz[:, : len(weight)], weight)


def _count(total: int, block: int) -> int:
    return max(triton.cdiv(total, block), 1)


def _groups(offsets: list[int], capacity: int, most_tiles: int) -> Iterator[_Group]:
    """All tiles in order, those without a block too: their gradient is 0 and must be written. Only a lack of capacity cuts a
    tile: a kernel takes a tile that began before its group for one whose sum is carried."""
    tile, first, most, tiles = 0, 0, 0, len(offsets) - 1
    for t in range(tiles):
        start = offsets[t]
        if t - tile == most_tiles:
            yield _Group(tile, t, first, start, most)
            tile, first, most = t, start, 0
        while offsets[t + 1] - first > capacity:
            last = first + capacity
            yield _Group(tile, t + 1, first, last, max(most, last - max(start, first)))
            tile, first, most = t, last, 0
        most = max(most, offsets[t + 1] - max(start, first))
    yield _Group(tile, tiles, first, offsets[-1], most)
