"""The sparse backward of the `torch` backend: the rows of many blocks gathered at once, then one matmul per tile."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.products import add_matmul, matmul, operand
from ..backends.torch import Memory, finish_logits
from ..tiling import accumulator_dtype, slices
from ..types import Grads, HeadNeed, HeadSaved, KeptBlocks

# Blocks whose rows are gathered at once: enough to make the overhead around the matmuls negligible.
MOST_BLOCKS = 4096


def break_even(dtype: torch.dtype) -> float:
    """Kept fraction at which the dense backward becomes the faster one. Measured without the time to choose the blocks:
    0.50 at D = 512, 0.43 at D = 1024 (two cores of an Intel Xeon, float32)."""
    return 0.45


class _Exact(NamedTuple):
    """Entries of dlogits known from the forward, ascending by block."""

    block: Tensor  # [E] int64, position in KeptBlocks
    column: Tensor  # [E] int64, in the block's tile
    value: Tensor  # [E], the gradient without the softcap's derivative


def _exact_entries(grad_logps: Tensor, saved: HeadSaved, blocks: KeptBlocks) -> _Exact:
    """dlogits at the targets, from the forward's own logp, and at the rows' maxima where their block is kept.

    This matmul may round differently from the forward's. For a nearly certain token 1 - p would be all rounding, and the
    forward's numbers are exact.
    """
    _, weight, targets, _, spec = saved.inputs
    c = grad_logps * spec.logit_multiplier
    n, last = len(c), len(blocks.index)
    row = torch.arange(n, device=c.device)
    column = torch.cat([saved.row_argmax, targets])
    valid = torch.cat([saved.row_argmax != targets, torch.ones_like(row, dtype=torch.bool)])
    valid &= (column >= 0) & (column < len(weight))
    key = torch.div(column, blocks.width, rounding_mode="floor") * n + row.repeat(2)
    block = torch.searchsorted(blocks.index, key).clamp_max(max(last - 1, 0))
    if last:
        valid &= blocks.index[block] == key
    value = torch.cat([-c / saved.row_sum, -torch.expm1(saved.logps) * c])
    block = torch.where(valid, block, last).sort(stable=True)
    return _Exact(block.values, column[block.indices] % blocks.width, value[block.indices])


def backward(
    grad_logps: Tensor,  # [N]
    saved: HeadSaved,
    blocks: KeptBlocks,
    need: HeadNeed,
    workspace_bytes: int,
) -> Grads:
    hidden, weight, _, bias, spec = saved.inputs
    v, d = weight.shape
    dtype = accumulator_dtype(hidden.dtype)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need.weight else None
    d_bias = hidden.new_zeros(v, dtype=dtype) if need.bias else None
    if need.weight:
        for t, columns in enumerate(slices(v, blocks.width)):
            if blocks.offsets[t] == blocks.offsets[t + 1]:
                d_weight[columns] = 0.0
    c = (grad_logps * -spec.logit_multiplier / torch.where(saved.row_sum > 0, saved.row_sum, 1.0))[:, None]
    row_max = saved.row_max[:, None]
    exact = _exact_entries(grad_logps, saved, blocks)
    exact_blocks = exact.block.tolist()
    rows_of, memory = operand(hidden, hidden.dtype), Memory(hidden)
    in_place = need.weight and d_weight.dtype == dtype
    d_chunk = None
    for group in _groups(blocks, v, *_group_sizes(saved, blocks.width, workspace_bytes)):
        first, last = group[0].first, group[-1].last
        sizes = [piece.last - piece.first for piece in group]
        chunks = [operand(weight[piece.columns], hidden.dtype) for piece in group]
        rows = blocks.rows[first:last]
        gathered = torch.index_select(rows_of, 0, rows, out=memory.take("gathered", last - first, d, rows_of.dtype))
        hidden_rows = gathered.split(sizes)
        dz = memory.take("z", last - first, len(chunks[0]))
        tiles = dz.split(sizes)
        for tile, part, chunk, piece in zip(tiles, hidden_rows, chunks, group, strict=True):
            matmul(part, chunk.T, out=tile)
            if bias is not None:
                tile += bias[piece.columns]
        softcap_grad = finish_logits(dz, spec, memory)
        dz.sub_(row_max[rows]).exp_().mul_(c[rows])
        known = slice(bisect.bisect_left(exact_blocks, first), bisect.bisect_left(exact_blocks, last))
        dz[exact.block[known] - first, exact.column[known]] = exact.value[known]
        if softcap_grad is not None:
            dz *= softcap_grad
        for tile, part, piece in zip(tiles, hidden_rows, group, strict=True):
            if need.bias:
                d_bias[piece.columns] += tile.sum(0)
            if need.weight and in_place and piece.begins:
                d_chunk = matmul(tile.T, part, out=d_weight[piece.columns])
            elif need.weight:
                d_chunk = matmul(tile.T, part) if piece.begins else add_matmul(d_chunk, tile.T, part)
                if piece.ends and not in_place:
                    d_weight[piece.columns] = d_chunk
        if need.hidden:
            products = memory.take("products", *gathered.shape)
            for tile, chunk, product in zip(tiles, chunks, products.split(sizes), strict=True):
                matmul(tile, chunk, out=product)
            d_hidden.index_add_(0, rows, products)
        gathered = hidden_rows = chunks = dz = tiles = softcap_grad = products = None
    if need.bias:
        d_bias = d_bias.to(bias.dtype)
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


class _Piece(NamedTuple):
    """Blocks first to last of one tile: all of them, or a part where they are too many to be gathered at once."""

    columns: slice
    first: int
    last: int
    begins: bool
    ends: bool


def _groups(blocks: KeptBlocks, v: int, most_blocks: int, most_tiles: int) -> Iterator[list[_Piece]]:
    """Runs of pieces whose rows are gathered together; all tiles of a group have the same width."""
    group: list[_Piece] = []
    for t, columns in enumerate(slices(v, blocks.width)):
        start, stop = blocks.offsets[t : t + 2]
        for first in range(start, stop, most_blocks):
            last = min(first + most_blocks, stop)
            full = group and (last - group[0].first > most_blocks or len(group) == most_tiles)
            if full or (group and columns.stop - columns.start < blocks.width):
                yield group
                group = []
            group.append(_Piece(columns, first, last, first == start, last == stop))
    if group:
        yield group


def _group_sizes(saved: HeadSaved, width: int, workspace_bytes: int) -> tuple[int, int]:
    """The most blocks and tiles of a group.

    A block takes its row of hidden states and that row's gradient, its logits and the softcap's derivative. A tile takes
    its weights where they are converted. The group also takes a slice of dW and its next summand.
    """
    hidden, weight, _, _, spec = saved.inputs
    d, item, given = weight.shape[1], accumulator_dtype(hidden.dtype).itemsize, hidden.dtype.itemsize
    left = workspace_bytes - 2 * item * width * d
    block = item * (2 * d + (1 + (spec.softcap is not None)) * width)
    tile = width * d * (item * (given < item) + given * (weight.dtype != hidden.dtype))
    most_tiles = max(left // 2 // tile, 1) if tile else len(weight)
    return max(min((left // 2 if tile else left) // block, MOST_BLOCKS), 1), most_tiles
