"""The `triton` backend: launches of the kernels in `bco_fast.kernels`.

There are two forwards: "fused" (matmul, softmax and gather in one kernel) and "fold" (a matmul tile in the workspace,
then a row kernel). `configs.forward_method` picks one. A frozen head always folds, because the tile that the row kernel
writes is an operand of the second matmul, which gives d logp / d hidden.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
from torch import Tensor

from ...kernels import configs
from ...kernels.fold_logits import fold_logits_kernel, rescale_rows_kernel
from ...kernels.head_backward import dlogits_kernel
from ...kernels.head_logps import head_logps_kernel, merge_splits_kernel
from ..tiling import accumulator_dtype
from ..types import Grads, HeadForward, HeadInputs, HeadNeed, HeadSaved, HeadWant
from . import walk
from .launching import INTERPRETED, TRITON_DTYPE, constants, here, launch
from .walk import Memory, Statistics

# Wide enough for two tensor-core tiles; a row of the mass table costs 1/256 of its float32 logits.
MASS_TILE = 256


def check_device(device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "backend='triton' needs a GPU: the tensors are on the CPU. Use backend='torch' or 'auto', or set "
            "TRITON_INTERPRET=1 before importing triton to run the kernels in its (slow) interpreter."
        )


@functools.cache
def _capability(device: torch.device) -> int:
    """90 for sm_90; 0 where there is none (the interpreter, other vendors)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def forward(
    inputs: HeadInputs, want: HeadWant, workspace_bytes: int, method: Literal["fused", "fold"] | None = None
) -> HeadForward:
    hidden, weight = inputs.hidden, inputs.weight
    if method is None:
        method = configs.forward_method(_capability(hidden.device), hidden.dtype.itemsize, hidden.shape[1])
    if method == "fused" and not want.frozen and weight.dtype == hidden.dtype:  # the walk casts a weight by chunks
        return _forward_fused(inputs, want, workspace_bytes)
    seen = Statistics(inputs, want, MASS_TILE)
    return walk.forward(
        seen, functools.partial(_fold, seen), _rescale, tiles=1, workspace_bytes=workspace_bytes,
        most_columns=configs.fold_most_columns(extras=_extras(inputs, want), out=want.frozen),
    )  # fmt: skip


def _extras(inputs: HeadInputs, want: HeadWant) -> bool:
    """Whether a kernel needs registers for more than the logits and their exponentials."""
    return want.entropy or want.mass or inputs.bias is not None or inputs.spec.softcap is not None


def _rescale(sums: Tensor, shrink: Tensor) -> None:
    config, (n, d) = here(configs.RESCALE_ROWS), sums.shape
    grid = triton.cdiv(n, config.block_n), triton.cdiv(d, config.block_d)
    launch(rescale_rows_kernel, grid, config, sums.device, sums_ptr=sums, shrink_ptr=shrink, N=n, D=d)


def _group_masses(shares: Tensor, width: int) -> Tensor:
    """Masses of `width` columns -> of MASS_TILE columns."""
    group = MASS_TILE // width
    return torch.nn.functional.pad(shares, (0, -shares.shape[1] % group)).view(len(shares), -1, group).sum(-1)


def splits(row_blocks: int, column_blocks: int, processors: int, most: int) -> int:
    """Vocabulary ranges of the fused forward, at most `most`: the number with the shortest run.

    A program fills a multiprocessor, so programs run in waves, each as long as its range. At least two waves hide a
    program's start; a tie goes to fewer ranges, whose statistics are fewer.
    """
    most = max(min(most, column_blocks, 65535), 1)
    fewest = min(max(triton.cdiv(2 * processors, row_blocks), 1), most)

    def length(count: int) -> int:
        return triton.cdiv(row_blocks * count, processors) * triton.cdiv(column_blocks, count)

    return min(range(fewest, min(4 * fewest, most) + 1), key=length)


def _forward_fused(inputs: HeadInputs, want: HeadWant, workspace_bytes: int) -> HeadForward:
    hidden, weight, targets, bias, spec = inputs
    (n, d), v, device = hidden.shape, len(weight), hidden.device
    entropy, mass = want.entropy, want.mass
    dtype = accumulator_dtype(hidden.dtype)
    config = here(configs.head_logps(hidden.dtype.itemsize, extras=_extras(inputs, want)))
    row_blocks, column_blocks = triton.cdiv(n, config.block_n), triton.cdiv(v, config.block_v)
    processors = 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    most = workspace_bytes // (n * (4 * dtype.itemsize + 4))
    split = triton.cdiv(column_blocks, splits(row_blocks, column_blocks, processors, most)) * config.block_v
    ranges = triton.cdiv(v, split)
    part = hidden.new_empty((ranges, 4, n), dtype=dtype)
    part_argmax = targets.new_empty((ranges, n), dtype=torch.int32)
    masses = hidden.new_empty((n, column_blocks), dtype=dtype) if mass else None
    flags = {"HAS_ENTROPY": entropy, "ACC": TRITON_DTYPE[dtype]}
    parts = {"part_ptr": part, "part_argmax_ptr": part_argmax, "target_ptr": targets, "N": n, "V": v}
    launch(
        head_logps_kernel, (row_blocks, ranges), config, device,
        hidden_ptr=hidden, weight_ptr=weight, mass_ptr=masses, D=d, SPLIT=split,
        stride_hn=hidden.stride(0), stride_wv=weight.stride(0), stride_mn=column_blocks,
        HAS_MASS=mass, UPCAST=INTERPRETED, **parts, **flags, **constants(spec, bias),
    )  # fmt: skip
    logps, row_max, row_sum, logits, h = (hidden.new_empty(n, dtype=dtype) for _ in range(5))
    argmax, merge = torch.empty_like(targets), configs.MERGE_SPLITS
    launch(
        merge_splits_kernel, (triton.cdiv(n, merge.block_n),), merge, device,
        logp_ptr=logps, row_max_ptr=row_max, row_sum_ptr=row_sum, logit_ptr=logits, entropy_ptr=h, argmax_ptr=argmax,
        S=ranges, **parts, **flags,
    )  # fmt: skip
    if mass:
        masses = _group_masses(masses.sub_((row_max + row_sum.log())[:, None]).exp_(), config.block_v)
    return HeadForward(logps, h if entropy else None, row_max, row_sum, argmax, logits, None, masses)


def _fold(
    seen: Statistics,
    tile: Tensor,  # [R, C]
    out: Tensor | None,  # [R, C]
    rows: slice,
    columns: slice,
    memory: Memory,
) -> Tensor | None:
    _, weight, targets, bias, spec = seen.inputs
    r, c = tile.shape
    config = configs.fold_logits(c, extras=_extras(seen.inputs, seen.want), out=out is not None)
    if INTERPRETED:  # whose tiles are not cut to what a GPU holds
        config = configs.INTERPRETED._replace(block_v=max(triton.next_power_of_2(c), MASS_TILE))
    state, mass = seen.state[:, rows], None if seen.mass is None else seen.mass[rows]
    launch(
        fold_logits_kernel, (triton.cdiv(r, config.block_n),), config, tile.device,
        tile_ptr=tile, target_ptr=targets[rows], state_ptr=state, argmax_ptr=seen.argmax[rows],
        mass_ptr=mass, out_ptr=out,
        N=r, V=len(weight), FIRST=columns.start, C=c, STATE=state.stride(0), stride_tn=tile.stride(0),
        stride_on=0 if out is None else out.stride(0), stride_mn=0 if mass is None else mass.stride(0),
        WIDTH=MASS_TILE, HAS_ENTROPY=seen.want.entropy, HAS_MASS=mass is not None, HAS_OUT=out is not None, **constants(spec, bias),
    )  # fmt: skip
    return out


def backward(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    need: HeadNeed,
    workspace_bytes: int,
) -> Grads:
    dlogits = functools.partial(_dlogits, grad_logps, grad_entropy, saved)
    return walk.backward(saved, dlogits, need, tiles=1, workspace_bytes=workspace_bytes)


def _dlogits(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    saved: HeadSaved,
    tile: Tensor,  # [R, C]
    out: Tensor,  # [R, C], may be the tile
    rows: slice,
    columns: slice,
    memory: Memory,
) -> None:
    _, weight, targets, bias, spec = saved.inputs
    config = here(configs.DLOGITS)
    r, c = tile.shape
    second = grad_entropy is not None
    launch(
        dlogits_kernel, (triton.cdiv(r, config.block_n), triton.cdiv(c, config.block_v)), config, tile.device,
        tile_ptr=tile, out_ptr=out, target_ptr=targets[rows], logp_ptr=saved.logps[rows],
        row_max_ptr=saved.row_max[rows], row_sum_ptr=saved.row_sum[rows], argmax_ptr=saved.row_argmax[rows],
        entropy_ptr=saved.entropy[rows] if second else None, grad_logp_ptr=grad_logps[rows],
        grad_entropy_ptr=grad_entropy[rows] if second else None,
        N=r, V=len(weight), FIRST=columns.start, C=c, stride_tn=tile.stride(0), stride_on=out.stride(0),
        HAS_GRAD_ENTROPY=second, **constants(spec, bias),
    )  # fmt: skip
