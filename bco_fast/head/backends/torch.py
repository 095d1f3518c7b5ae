"""The `torch` backend: the fused head in plain PyTorch, one bounded tile of logits at a time.

It is what runs on the CPU, and it is the whole algorithm of the Triton backend written to be read:

    forward   walk the vocabulary with a running (max, sum) per row; 2NDV FLOP
    frozen    the same walk also carries Q = sum over k != y of e_k f_k W_k, which gives d logp / d hidden; 4NDV
    backward  recompute each tile, turn it into dlogits in place, two matmuls; dW is written once per chunk; 6NDV
    sparse    the same for the rows that were kept of each MASS_TILE columns, gathered; 6 rho NDV
"""

from __future__ import annotations

import bisect
import functools
import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import (
    HeadForward,
    HeadNeed,
    HeadSaved,
    HeadSpec,
    KeptCells,
    accumulator_dtype,
    assemble_direction,
    exact_entries,
    tile_shape,
)

# 512 columns keep the CPU's matmul at full speed; a tile of 4 MiB stays in the cache between the passes over it.
CPU_COLUMNS = 512
CPU_TILE_BYTES = 4 << 20
GPU_COLUMNS = 4096
# Narrow tiles keep fewer logits (0.38 of them at 256 columns, 0.14 at 64, for the same bound on scattered tokens), and
# below 64 the CPU's matmul loses more than that.
MASS_TILE = 64
# Share of a tile's rows that may be copied to find the place of their maximum.
PEAK_ROWS = 0.125
# Cells whose rows are gathered at once: enough that what stands round the matmuls is not felt.
SPARSE_CELLS = 4096
# Below this MKL is faster, and its dot products are the more accurate ones. Rows do not count: the backward may see
# fewer than the forward, and must round the same way.
ONEDNN_FEWEST_COLUMNS = 16


def _tile(
    hidden: Tensor,
    weight: Tensor,
    workspace_bytes: int,
    *,
    tiles: float,
    products: bool,
    sums: bool,
    ordered: bool,
    step: int = 1,
) -> tuple[int, int]:
    """Rows and columns of a tile, of which `tiles` are held at once.

    Beside them stand, in the accumulator's dtype, a product [rows, D] with `products` and one [columns, D] with `sums`,
    twice once rows are cut; low-precision operands are held once more: on the CPU the weights, on a GPU the tile. In
    another `ordered` vocabulary the weights are gathered.
    """
    n, d = hidden.shape
    item = accumulator_dtype(hidden.dtype).itemsize
    low = hidden.dtype.itemsize < item
    cell, column = item * tiles, item * d * sums + hidden.dtype.itemsize * d * ordered
    if hidden.device.type == "cpu":
        rows = min(n, CPU_TILE_BYTES // item // CPU_COLUMNS)
        columns = max(CPU_COLUMNS, CPU_TILE_BYTES // item // rows)
        column += item * d * low
    else:
        rows = n
        cell += hidden.dtype.itemsize * low
        columns = max(GPU_COLUMNS, workspace_bytes // (cell * rows))
    columns = min(columns, weight.shape[0])
    return tile_shape(
        n, rows, columns, workspace_bytes, cell=cell, row=item * d * products, column=column, cut=item * d * sums, step=step
    )  # fmt: skip


def sparse_worth(dtype: torch.dtype) -> float:
    """Share of kept cells from which on the dense backward is the faster one. Measured: 0.50 at D = 512, 0.43 at D = 1024
    (two cores of an Intel Xeon, float32), without the time it takes to choose the cells."""
    return 0.45


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which `a @ b` calls, on this processor.

    MKL is slow on AMD processors: oneDNN was 2.2x as fast on an EPYC with AVX-512. On an Intel Xeon with AVX-512 MKL was
    the faster one throughout, by 1.1x for hidden @ weight.T and by 1.35x for dz.T @ hidden.

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


def _onednn(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.enabled and _onednn_is_faster()


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, L], into `out` if given, in the accumulator's precision: float32 out of bf16 and fp16, never
    rounded back.

    a is a tile in that precision or an operand in the input's. A GPU multiplies in the input's dtype; the CPU has no
    such matmul with a float32 result, so there both are in the accumulator's dtype already.
    """
    if _writes_into(a, b):
        return torch.mm(a, b, out=out)
    if a.dtype.itemsize > b.dtype.itemsize:
        a = a.to(b.dtype)
    if a.dtype.itemsize < 4:
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        product = torch.ops.mkldnn._linear_pointwise(_packed(a), _packed(b).T, None, "none", [], "")
    return product if out is None else out.copy_(product)


def _writes_into(a: Tensor, b: Tensor) -> bool:
    """Whether `matmul` can write into, or add to, memory at hand; otherwise it allocates its product."""
    if min(a.dtype.itemsize, b.dtype.itemsize) < 4:
        return False
    return not (_onednn(a) and b.shape[1] >= ONEDNN_FEWEST_COLUMNS)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, L] += a [M, K] @ b [K, L], without a second [M, L] where that can be done."""
    if _writes_into(a, b):
        return total.addmm_(a, b)
    return total.add_(matmul(a, b))


def _packed(x: Tensor) -> Tensor:
    # Rows with a gap between them send oneDNN to its reference loop, a thousand times slower.
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


def _operand(x: Tensor) -> Tensor:
    """x as the matmuls of its device want it."""
    return x.to(accumulator_dtype(x.dtype)) if x.device.type == "cpu" else x


class _Memory:
    """Matrices that every tile needs anew, taken once: the C library returns the pages of 4 MiB that are freed, and
    fetching them again took 10 to 45 % of a step."""

    def __init__(self, like: Tensor):
        self.like, self.flat = like, {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, columns] in the accumulator's dtype unless told; what was in it last."""
        size = rows * columns
        if name not in self.flat or len(self.flat[name]) < size:
            self.flat.pop(name, None)
            self.flat[name] = self.like.new_empty(size, dtype=dtype or accumulator_dtype(self.like.dtype))
        return self.flat[name][:size].view(rows, columns)


def _rows(weight: Tensor, order: Tensor | None, columns: slice) -> Tensor:  # [C, D]
    return weight[columns] if order is None else weight.index_select(0, order[columns])


def _put_rows(d_weight: Tensor, order: Tensor | None, columns: slice, part: Tensor) -> None:
    if order is None:
        d_weight[columns] = part
    else:
        d_weight.index_copy_(0, order[columns], part.to(d_weight.dtype))


def logits_tile(
    hidden: Tensor,  # [R, D]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    spec: HeadSpec,
    memory: _Memory,
) -> tuple[Tensor, Tensor | None]:
    """Logits [R, C] and, with a softcap, their slope 1 - tanh^2 [R, C]."""
    shape = len(hidden), len(weight)
    z = matmul(hidden, weight.T, memory.take("z", *shape) if _writes_into(hidden, weight.T) else None)
    if bias is not None:
        z += bias
    return _finish(z, spec, memory)


def _finish(z: Tensor, spec: HeadSpec, memory: _Memory) -> tuple[Tensor, Tensor | None]:
    """What comes after the bias, in place, and with a softcap the slope."""
    if spec.softcap is None:
        if spec.slope != 1.0:
            z *= spec.slope
        return z, None
    z = z.mul_(spec.logit_scale / spec.softcap)
    slope = torch.cosh(z, out=memory.take("slope", *z.shape))
    slope.reciprocal_().square_()  # 1 - tanh^2 would cancel where the cap saturates
    z = z.tanh_()
    return z.mul_(spec.softcap / spec.temperature), slope


def _target_columns(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this chunk, and a column that is safe to gather for all of them."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)[:, None]


def _note_peaks(z: Tensor, raised: Tensor, peak: Tensor, first: int) -> None:
    """The column of the maximum for rows whose running maximum this tile has raised; few after the first tiles.

    A maximum with its place takes the CPU six times as long as one without, so few rows are copied and looked at again.
    """
    if z.device.type == "cpu":
        rows = raised.nonzero()[:, 0]
        if len(rows) <= PEAK_ROWS * len(z):
            peak.index_copy_(0, rows, z.index_select(0, rows).max(1).indices + first)
            return
    torch.where(raised, z.max(1).indices + first, peak, out=peak)


def _finite(row_max: Tensor) -> Tensor:
    """exp(-inf - -inf) is NaN; a row that is -inf so far is measured from 0 instead."""
    return torch.where(row_max == float("-inf"), 0.0, row_max)


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
) -> HeadForward:
    dtype = accumulator_dtype(hidden.dtype)
    n, v = hidden.shape[0], weight.shape[0]
    tile_rows, tile_columns = _tile(
        hidden,
        weight,
        workspace_bytes,
        tiles=1 + entropy + (spec.softcap is not None) + PEAK_ROWS,
        products=direction,
        sums=False,
        ordered=order is not None,
        step=MASS_TILE if mass else 1,
    )
    row_max = hidden.new_full((n,), float("-inf"), dtype=dtype)
    row_sum = hidden.new_zeros(n, dtype=dtype)
    logits = hidden.new_full((n,), float("nan"), dtype=dtype)
    u = hidden.new_zeros(n, dtype=dtype) if entropy else None  # sum of (z - m) e^(z - m)
    pull = hidden.new_zeros(hidden.shape, dtype=dtype) if direction else None  # Q
    off_target = hidden.new_zeros(n, dtype=dtype) if direction else None
    slope_y = hidden.new_ones(n, dtype=dtype)
    log_mass = hidden.new_empty((n, -(-v // MASS_TILE)), dtype=dtype) if mass else None  # of e^z f
    peak = torch.full_like(targets, -1)

    operand, memory = _operand(hidden), _Memory(hidden)
    for columns in _slices(v, tile_columns):
        chunk, chunk_bias = _operand(_rows(weight, order, columns)), None if bias is None else bias[columns]
        for rows in _slices(len(hidden), tile_rows):
            z, slope = logits_tile(operand[rows], chunk, chunk_bias, spec, memory)
            inside, at = _target_columns(targets[rows], columns)
            logits[rows] = torch.where(inside, z.gather(1, at)[:, 0], logits[rows])
            if direction and not entropy:  # no backward
                m = torch.maximum(row_max[rows], z.amax(1))
            else:
                highest = z.amax(1)
                _note_peaks(z, highest > row_max[rows], peak[rows], columns.start)
                m = torch.maximum(row_max[rows], highest)
            shrink = (row_max[rows] - _finite(m)).exp_()
            z.sub_(_finite(m)[:, None])
            if entropy:
                moved = torch.where(shrink == 0, 0.0, row_max[rows] - m)
                u[rows] = shrink * (u[rows] + moved * row_sum[rows])
                e = torch.exp(z, out=memory.take("e", *z.shape))
                u[rows] += z.mul_(e).nan_to_num_(nan=0.0).sum(1)  # -inf x 0 where the bias masks a token
            else:
                e = z.exp_()
            row_sum[rows] = row_sum[rows] * shrink + e.sum(1)
            if mass:
                cells = slice(columns.start // MASS_TILE, -(-columns.stop // MASS_TILE))
                sums = _tile_sums(e if slope is None else e.mul_(slope))
                log_mass[rows, cells] = sums.log_().add_(_finite(m)[:, None])
            if direction:
                # Q goes without the target's own term, see `assemble_direction`.
                e.scatter_(1, at, torch.where(inside[:, None], 0.0, e.gather(1, at)))
                off_target[rows] = off_target[rows] * shrink + e.sum(1)
                if slope is not None:
                    slope_y[rows] = torch.where(inside, slope.gather(1, at)[:, 0], slope_y[rows])
                    e *= slope
                part = pull[rows]
                part *= shrink[:, None]
                add_matmul(part, e, chunk)
            row_max[rows] = m
            z = e = slope = None  # or they would stand beside the next tile
        chunk = None

    logps = (logits - row_max) - row_sum.log()
    grad = None
    if direction:
        grad = assemble_direction(pull, weight, targets, slope_y, off_target, row_sum, spec, workspace_bytes)
        grad = grad.to(hidden.dtype)
    h = row_sum.log() - u / row_sum if entropy else None
    if mass:  # never with a direction
        log_mass.sub_((row_max + row_sum.log())[:, None]).exp_()
    return HeadForward(logps, h, row_max, row_sum, grad, logits, peak, log_mass)


def _tile_sums(e: Tensor) -> Tensor:  # [R, C] -> [R, C / MASS_TILE]
    whole = e.shape[1] // MASS_TILE * MASS_TILE
    sums = e[:, :whole].unflatten(1, (-1, MASS_TILE)).sum(2)
    return sums if whole == e.shape[1] else torch.cat([sums, e[:, whole:].sum(1, keepdim=True)], 1)


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
    hidden, weight, bias = saved.hidden, saved.weight, saved.bias
    dtype = accumulator_dtype(hidden.dtype)
    tiles = 1 + (grad_entropy is not None) + (spec.softcap is not None)
    tile_rows, tile_columns = _tile(
        hidden, weight, workspace_bytes, tiles=tiles, products=need.hidden, sums=need.weight, ordered=order is not None
    )
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need.weight else None
    d_bias = torch.empty_like(bias) if need.bias else None
    in_place = need.weight and order is None and d_weight.dtype == dtype
    operand, memory = _operand(hidden), _Memory(hidden)
    # Held once for all chunks: oneDNN's dz^T h is faster with h of unit stride in N. Low-precision rows are one copy
    # already.
    columnwise = need.weight and _onednn(operand) and operand is hidden
    right = [
        operand[rows].T.contiguous().T if columnwise else operand[rows] for rows in _slices(len(hidden), tile_rows)
    ]

    for columns in _slices(weight.shape[0], tile_columns):
        chunk, chunk_bias = _operand(_rows(weight, order, columns)), None if bias is None else bias[columns]
        d_chunk, d_chunk_bias = None, None
        for rows, hidden_rows in zip(_slices(len(hidden), tile_rows), right, strict=True):
            dz = _dlogits_tile(
                operand[rows], chunk, chunk_bias, grad_logps, grad_entropy, saved, spec, rows, columns, memory
            )
            if need.bias:
                d_chunk_bias = dz.sum(0) if d_chunk_bias is None else d_chunk_bias.add_(dz.sum(0))
            if need.hidden:
                add_matmul(d_hidden[rows], dz, chunk)
            if need.weight and d_chunk is None:
                d_chunk = matmul(dz.T, hidden_rows, out=d_weight[columns] if in_place else None)
            elif need.weight:
                add_matmul(d_chunk, dz.T, hidden_rows)
            dz = None  # or it would stand beside the next tile
        if need.weight and not in_place:
            _put_rows(d_weight, order, columns, d_chunk)
        if need.bias:
            d_bias[columns] = d_chunk_bias
        chunk = None
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


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
    hidden, weight, bias = saved.hidden, saved.weight, saved.bias
    v, d = weight.shape
    dtype = accumulator_dtype(hidden.dtype)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need.weight else None
    d_bias = hidden.new_zeros(v, dtype=dtype) if need.bias else None
    if need.weight:
        for t, columns in enumerate(_slices(v, cells.width)):
            if cells.offsets[t] == cells.offsets[t + 1]:
                _put_rows(d_weight, order, columns, hidden.new_zeros(()).expand(columns.stop - columns.start, d))
    c = (grad_logps * -spec.slope / torch.where(saved.row_sum > 0, saved.row_sum, 1.0))[:, None]
    row_max = saved.row_max[:, None]
    exact = exact_entries(grad_logps, saved, spec, cells)
    exact_cells = exact.cell.tolist()
    operand, memory = _operand(hidden), _Memory(hidden)
    in_place = need.weight and order is None and d_weight.dtype == dtype
    d_chunk = None
    for group in _groups(cells, v, *_group_sizes(saved, spec, cells.width, order, workspace_bytes)):
        first, last = group[0].first, group[-1].last
        sizes = [piece.last - piece.first for piece in group]
        chunks = [_operand(_rows(weight, order, piece.columns)) for piece in group]
        rows = cells.rows[first:last]
        gathered = torch.index_select(operand, 0, rows, out=memory.take("gathered", last - first, d, operand.dtype))
        hidden_rows = gathered.split(sizes)
        dz = memory.take("z", last - first, len(chunks[0]))
        tiles = dz.split(sizes)
        for tile, part, chunk, piece in zip(tiles, hidden_rows, chunks, group, strict=True):
            matmul(part, chunk.T, out=tile)
            if bias is not None:
                tile += bias[piece.columns]
        _, slope = _finish(dz, spec, memory)
        dz.sub_(row_max[rows]).exp_().mul_(c[rows])
        here = slice(bisect.bisect_left(exact_cells, first), bisect.bisect_left(exact_cells, last))
        dz[exact.cell[here] - first, exact.column[here]] = exact.value[here]
        if slope is not None:
            dz *= slope
        for tile, part, piece in zip(tiles, hidden_rows, group, strict=True):
            if need.bias:
                d_bias[piece.columns] += tile.sum(0)
            if need.weight and in_place and piece.begins:
                d_chunk = matmul(tile.T, part, out=d_weight[piece.columns])
            elif need.weight:
                d_chunk = matmul(tile.T, part) if piece.begins else add_matmul(d_chunk, tile.T, part)
                if piece.ends and not in_place:
                    _put_rows(d_weight, order, piece.columns, d_chunk)
        if need.hidden:
            products = memory.take("products", *gathered.shape)
            for tile, chunk, product in zip(tiles, chunks, products.split(sizes), strict=True):
                matmul(tile, chunk, out=product)
            d_hidden.index_add_(0, rows, products)
        gathered = hidden_rows = chunks = dz = tiles = slope = products = None
    if need.bias:
        d_bias = d_bias.to(bias.dtype)
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


class _Piece(NamedTuple):
    """Cells first to last of one tile: all, or a part where they are too many to be gathered at once."""

    columns: slice
    first: int
    last: int
    begins: bool
    ends: bool


def _groups(cells: KeptCells, v: int, most_cells: int, most_tiles: int) -> Iterator[list[_Piece]]:
    """Runs of pieces whose rows are gathered together; their tiles have one width."""
    group: list[_Piece] = []
    for t, columns in enumerate(_slices(v, cells.width)):
        start, stop = cells.offsets[t : t + 2]
        for first in range(start, stop, most_cells):
            last = min(first + most_cells, stop)
            full = group and (last - group[0].first > most_cells or len(group) == most_tiles)
            if full or (group and columns.stop - columns.start < cells.width):
                yield group
                group = []
            group.append(_Piece(columns, first, last, first == start, last == stop))
    if group:
        yield group


def _group_sizes(
    saved: HeadSaved, spec: HeadSpec, width: int, order: Tensor | None, workspace_bytes: int
) -> tuple[int, int]:
    """The most cells and tiles of a group.

    A cell holds its row of hidden states and that of their gradient, its logits and their slope. A tile holds its
    weights where they are converted or gathered. Beside them stand a slice of dW and its next summand.
    """
    d, item = saved.weight.shape[1], accumulator_dtype(saved.hidden.dtype).itemsize
    left = workspace_bytes - 2 * item * width * d
    cell = item * (2 * d + (1 + (spec.softcap is not None)) * width)
    low, ordered = saved.hidden.dtype.itemsize < item, order is not None
    tile = width * d * (item * low + saved.weight.itemsize * ordered)
    tiles = max(left // 2 // tile, 1) if tile else saved.weight.shape[0]
    return max(min((left // 2 if tile else left) // cell, SPARSE_CELLS), 1), tiles


def _dlogits_tile(
    hidden: Tensor,  # [R, D]
    chunk: Tensor,  # [C, D]
    chunk_bias: Tensor | None,  # [C]
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    spec: HeadSpec,
    rows: slice,
    columns: slice,
    memory: _Memory,
) -> Tensor:
    """Gradient at the matmul's output, [R, C]: c (1[k = y] - p) - g p (log p + H), times slope and scale."""
    z, slope = logits_tile(hidden, chunk, chunk_bias, spec, memory)
    c = grad_logps[rows] * spec.slope
    s = saved.row_sum[rows]
    inside, at = _target_columns(saved.targets[rows], columns)
    # This tile may have been rounded by another matmul than the forward's. A token that is nearly certain would be off
    # by the rounding of its logit, but that logit is known: it is the row's maximum.
    highest, peak = _target_columns(saved.row_peak[rows], columns)
    row_max = saved.row_max[rows]
    z.scatter_(1, peak, torch.where(highest, row_max, z.gather(1, peak)[:, 0])[:, None])
    z.sub_(row_max[:, None])
    if grad_entropy is None:
        dz = z.exp_().mul_((-c / s)[:, None])
    else:
        g = grad_entropy[rows] * spec.slope
        e = torch.exp(z, out=memory.take("e", *z.shape))
        z += (saved.entropy[rows] - s.log())[:, None]
        dz = z.mul_(-g[:, None]).sub_(c[:, None]).mul_(e).nan_to_num_(nan=0.0).div_(s[:, None])
    # At the target everything comes from the forward's own logp: as p_y -> 1 the difference 1 - p_y of nearly equal
    # numbers would be all rounding.
    logp = saved.logps[rows]
    exact = -torch.expm1(logp) * c
    if grad_entropy is not None:
        exact -= g * logp.exp() * (logp + saved.entropy[rows])
    dz.scatter_(1, at, torch.where(inside, exact, dz.gather(1, at)[:, 0])[:, None])
    return dz if slope is None else dz.mul_(slope)
