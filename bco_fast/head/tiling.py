"""How the logits are cut into tiles that fit the workspace."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 512 columns keep the CPU's matmul at full speed; a tile of 4 MiB stays in the cache between the passes over it.
CPU_COLUMNS = 512
CPU_TILE_BYTES = 4 << 20
# Fewer columns starve a GPU's matmuls; rows are cut instead.
GPU_COLUMNS = 4096
# Rows of a tile start at multiples of 16 bytes only if the width is even enough: cuBLAS has no kernel for unaligned bf16 on
# sm_90, and Triton would load single numbers. 512 columns also make whole waves of cuBLAS's tiles.
GPU_STEP = 512
# Without a gradient of the weight, tall tiles only repeat the traffic of sums [N, D]: 2048 rows x 16384 columns pass over
# them a third as often as 8192 x 5120.
GPU_ROWS, GPU_MOST_COLUMNS = 2048, 16384


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def smallest_workspace(width: int, *, sparse: bool = False) -> int:
    """Bytes: one tile of 64 x 64 logits and their gradients, or eight float64 rows of hidden size `width`.

    A sparse backward adds up 256 rows of the gradient of the weight at a time: four matrices of that size.
    """
    return max(64 * 64 * 8, 64 * width) + sparse * 4 * 8 * 256 * width


def slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def tile_shape(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    workspace_bytes: int,
    *,
    tiles: float,
    product: bool,
    sums: bool,
    adds_in_place: bool,
    step: int = 1,
    most_columns: int = GPU_MOST_COLUMNS,
) -> tuple[int, int]:
    """Rows and columns of a tile; columns are a multiple of `step`. Fits from `smallest_workspace` on.

    Args:
        tiles: how many tiles of that size exist at once, in the accumulator's dtype.
        product: a product [rows, D] is added to a running sum.
        sums: a product [columns, D] is written, and added to once the rows are cut.
        adds_in_place: such additions take no memory.
        most_columns: on a GPU, with a product and no sums.
    """
    (n, d), v = hidden.shape, len(weight)
    item, given = accumulator_dtype(hidden.dtype).itemsize, hidden.dtype.itemsize
    cast = given * d * (weight.dtype != hidden.dtype)  # a chunk of a float32 weight under autocast
    logit, row, column, cut = item * tiles, item * d * product, cast, item * d * sums
    unit = step
    if hidden.device.type == "cpu":  # low-precision weights are converted, and a slice of dW is allocated
        rows = min(n, CPU_TILE_BYTES // item // CPU_COLUMNS)
        columns = max(CPU_COLUMNS, CPU_TILE_BYTES // item // rows)
        column += item * d * (sums + (given < item))
    else:  # the tile is converted
        unit = max(step, GPU_STEP)
        rows = min(n, GPU_ROWS) if product and not sums else n
        logit += given * (given < item and (product or sums))
        columns = max(GPU_COLUMNS, int(workspace_bytes / (logit * rows)) // unit * unit)
        columns = min(columns, most_columns) if product and not sums else columns
        row, cut = row * (not adds_in_place), cut * (1 if adds_in_place else 2)
    columns = -(-min(columns, v) // unit) * unit

    def used() -> float:
        return logit * rows * columns + row * rows + (column + (cut if rows < n else 0)) * columns

    while used() > workspace_bytes and (rows > 1 or columns > step):
        if rows > columns or columns == step:
            rows = (rows + 1) // 2
        else:
            unit = unit if columns > unit else step
            columns = -(-columns // (2 * unit)) * unit
    return rows, columns
