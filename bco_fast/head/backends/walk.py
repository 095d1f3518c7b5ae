"""The two walks over the vocabulary, one bounded tile of logits at a time. A backend says what happens to a tile.

forward   running statistics of the rows (online softmax); 2NDV FLOP
frozen    the same walk sums e_k f_k W_k over k != y, which gives d logp / d hidden; 4NDV
backward  recompute each tile, turn it into dlogits, two matmuls; dW is written once per chunk; 6NDV
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tiling import GPU_MOST_COLUMNS, accumulator_dtype, slices, tile_shape
from ..types import Grads, HeadForward, HeadInputs, HeadNeed, HeadSaved, HeadWant
from .products import add_matmul, adds_in_place, matmul, operand, uses_onednn, writes_into


class Memory:
    """Matrices that every tile needs anew, allocated once: the C library returns freed pages of 4 MiB to the system, and
    fetching them again took 10 to 45 % of a step. On a GPU their rows are aligned, also those of a ragged last chunk."""

    def __init__(self, like: Tensor, most_columns: int = 0):
        self.like, self.most_columns, self.flat = like, most_columns, {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, columns], in the accumulator's dtype by default; holds what was written last under that name."""
        stride = columns
        if self.like.device.type != "cpu":
            stride = max(columns, min(-(-columns // 64) * 64, self.most_columns))
        size = rows * stride
        if name not in self.flat or len(self.flat[name]) < size:
            self.flat.pop(name, None)
            self.flat[name] = self.like.new_empty(size, dtype=dtype or accumulator_dtype(self.like.dtype))
        return self.flat[name][:size].view(rows, stride)[:, :columns]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, in memory that the next product overwrites where the matmul allows it."""
        return matmul(a, b, self.take("z", a.shape[0], b.shape[1]) if writes_into(a, b) else None)

    def successor(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of that dtype for what a tile is turned into: the tile itself where the dtypes agree."""
        return z if z.dtype == dtype else self.take("low", *z.shape, dtype)


class Statistics:
    """What the forward knows of each row after some tiles."""

    def __init__(self, inputs: HeadInputs, want: HeadWant, mass_width: int):
        hidden, n, v = inputs.hidden, len(inputs.targets), len(inputs.weight)
        self.inputs, self.want, self.mass_width = inputs, want, mass_width
        self.state = hidden.new_zeros((7, n), dtype=accumulator_dtype(hidden.dtype))
        # max; sum of e^(z - max); target's logit; sum of (z - max) e^(z - max); row_sum without the target's own term;
        # derivative of the softcap at the target; e^(max before the last tile - max)
        self.row_max, self.row_sum, self.logits, self.u, self.off_target, self.softcap_grad, self.shrink = self.state
        self.row_max.fill_(float("-inf"))
        self.softcap_grad.fill_(1.0)
        self.argmax = torch.full_like(inputs.targets, -1)
        # log of the sum of e^z f over mass_width columns
        self.mass = self.state.new_empty((n, -(-v // mass_width))) if want.mass else None


def forward(
    seen: Statistics,
    fold: Callable[[Tensor, Tensor | None, slice, slice, Memory], Tensor | None],
    rescale: Callable[[Tensor, Tensor], None],
    *,
    tiles: float,
    workspace_bytes: int,
    most_columns: int = GPU_MOST_COLUMNS,
) -> HeadForward:
    """`fold(z, out, rows, columns, memory)` adds a tile z [R, C] of hidden @ weight.T to the statistics.

    With a frozen head it returns e^(z - max) f, 0 at the target, in out or another tensor of its dtype; f is the
    derivative of the softcap, or 1. On a GPU such a tile has at most `most_columns`. `rescale(sums, shrink)` multiplies the rows of sums [R, D] by shrink [R].
    """
    (hidden, weight, targets, _, _), want = seen.inputs, seen.want
    n, v, frozen = len(hidden), len(weight), want.frozen
    tile_rows, tile_columns = tile_shape(
        hidden, weight, workspace_bytes, tiles=tiles, product=frozen, sums=False,
        adds_in_place=not frozen or adds_in_place(hidden.device, hidden.dtype), step=seen.mass_width if want.mass else 1,
        most_columns=most_columns,
    )  # fmt: skip
    weight_sum = hidden.new_zeros(hidden.shape, dtype=seen.state.dtype) if frozen else None
    rows_of, memory = operand(hidden, hidden.dtype), Memory(hidden, tile_columns)
    for columns in slices(v, tile_columns):
        chunk = operand(weight[columns], hidden.dtype)
        for rows in slices(n, tile_rows):
            z = memory.product(rows_of[rows], chunk.T)
            out = memory.successor(z, chunk.dtype) if frozen else None
            out = fold(z, out, rows, columns, memory)
            if frozen:
                rescale(weight_sum[rows], seen.shrink[rows])
                add_matmul(weight_sum[rows], out, chunk)
            z = out = None  # else they would exist beside the next tile
        chunk = None
    memory = rows_of = None  # else they would exist beside the target's rows of the weight
    log_sum = seen.row_sum.log()
    logits = torch.where((targets < 0) | (targets >= v), float("nan"), seen.logits)
    return HeadForward(
        (logits - seen.row_max) - log_sum,
        log_sum - seen.u / seen.row_sum if want.entropy else None,
        seen.row_max.clone(),  # outputs of an operator may not share memory
        seen.row_sum.clone(),
        seen.argmax,
        logits,
        _dlogp_dhidden(weight_sum, seen, workspace_bytes).to(hidden.dtype) if frozen else None,
        None if seen.mass is None else seen.mass.sub_((seen.row_max + log_sum)[:, None]).exp_(),
    )


def _dlogp_dhidden(weight_sum: Tensor, seen: Statistics, workspace_bytes: int) -> Tensor:  # [N, D]
    """scale / temperature * ((1 - p_y) f_y W_y - sum over k != y of p_k f_k W_k); overwrites weight_sum.

    1 - p_y is off_target / row_sum: without the target's own term it stays accurate as p_y -> 1, where W_y - sum p W
    cancels. NaN where the target is outside [0, V).
    """
    hidden, weight, targets, _, spec = seen.inputs
    safe = targets.clamp(0, len(weight) - 1)
    weight_sum *= (-spec.logit_multiplier / seen.row_sum)[:, None]
    factor = (spec.logit_multiplier * seen.softcap_grad * seen.off_target / seen.row_sum)[:, None]
    row = 2 * weight.shape[1] * weight_sum.itemsize
    for rows in slices(len(safe), max(workspace_bytes // row, 1)):
        weight_sum[rows].addcmul_(weight[safe[rows]].to(hidden.dtype).to(weight_sum.dtype), factor[rows])
    return weight_sum.masked_fill_((targets != safe)[:, None], float("nan"))


def backward(
    saved: HeadSaved,
    dlogits: Callable[[Tensor, Tensor, slice, slice, Memory], None],
    need: HeadNeed,
    *,
    tiles: float,
    workspace_bytes: int,
) -> Grads:
    """`dlogits(z, out, rows, columns, memory)` turns a tile z of hidden @ weight.T into its gradient, in out."""
    hidden, weight, _, bias, _ = saved.inputs
    n, v, dtype = len(hidden), len(weight), accumulator_dtype(hidden.dtype)
    tile_rows, tile_columns = tile_shape(
        hidden, weight, workspace_bytes, tiles=tiles, product=need.hidden, sums=need.weight or need.bias,
        adds_in_place=adds_in_place(hidden.device, hidden.dtype),
    )  # fmt: skip
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need.hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need.weight else None
    d_bias = torch.empty_like(bias) if need.bias else None
    rows_of, memory = operand(hidden, hidden.dtype), Memory(hidden, tile_columns)
    # A slice of dW is written in place if that rounds only once; otherwise it is summed in the accumulator's dtype.
    in_place = need.weight and (d_weight.dtype == dtype or (tile_rows >= n and rows_of.dtype == d_weight.dtype))
    # oneDNN's dz^T h is faster with h of unit stride in N; copied once for all chunks. Low-precision rows are a copy
    # already.
    columnwise = need.weight and uses_onednn(rows_of) and rows_of is hidden
    right = [rows_of[r].T.contiguous().T if columnwise else rows_of[r] for r in slices(n, tile_rows)]
    for columns in slices(v, tile_columns):
        chunk, d_chunk, d_chunk_bias = operand(weight[columns], hidden.dtype), None, None
        for rows, hidden_rows in zip(slices(n, tile_rows), right, strict=True):
            z = memory.product(rows_of[rows], chunk.T)
            dz = memory.successor(z, chunk.dtype)
            dlogits(z, dz, rows, columns, memory)
            if need.bias:
                part = dz.sum(0, dtype=dtype)
                d_chunk_bias = part if d_chunk_bias is None else d_chunk_bias.add_(part)
            if need.hidden:
                add_matmul(d_hidden[rows], dz, chunk)
            if need.weight and d_chunk is None:
                d_chunk = matmul(dz.T, hidden_rows, out=d_weight[columns] if in_place else None)
            elif need.weight:
                add_matmul(d_chunk, dz.T, hidden_rows)
            z = dz = None  # else they would exist beside the next tile
        if need.weight and not in_place:
            d_weight[columns] = d_chunk
        if need.bias:
            d_bias[columns] = d_chunk_bias
        chunk = None
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias
