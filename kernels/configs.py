"""Launch configurations, one frozen record per kernel; each number with its reason.

Tuning is a script (benchmarks/), not a decorator: the same inputs must give the same bits on every run.
"""

from typing import NamedTuple


class LaunchConfig(NamedTuple):
    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


# 128x128 keeps 64 fp32 accumulators a thread and the online softmax beside them: no spilled register on sm_80 to
# sm_120. 128x256 spills on all of them (692 bytes on sm_80, 2676 on sm_100), and Triton 3.6 spills 128 bytes with a
# block_d of 64 on sm_90; 32 has the same bytes in flight with one more stage.
HEAD_LOGPS = LaunchConfig(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=4)

# Softcap and entropy need a second value per logit: at 128x128 that spills 232 bytes on sm_90 and 716 on sm_100.
HEAD_LOGPS_EXTRAS = LaunchConfig(block_n=64, block_v=128, block_d=32, num_warps=8, num_stages=4)

# IEEE fp32 has no tensor core, and its operands double the shared memory of a stage (99 KiB on sm_86, 89 and 120).
HEAD_LOGPS_FP32 = LaunchConfig(block_n=64, block_v=64, block_d=16, num_warps=4, num_stages=2)
HEAD_LOGPS_FP32_EXTRAS = LaunchConfig(block_n=32, block_v=32, block_d=16, num_warps=4, num_stages=2)

RESCALE_ROWS = LaunchConfig(block_n=1, block_v=0, block_d=1024, num_warps=4, num_stages=1)

# Elementwise over a tile: 16 fp32 values a thread, rows short enough that small batches still fill the GPU.
DLOGITS = LaunchConfig(block_n=4, block_v=1024, block_d=0, num_warps=8, num_stages=1)

MERGE_SPLITS = LaunchConfig(block_n=256, block_v=0, block_d=0, num_warps=4, num_stages=1)

# The sparse backward has the accumulators of HEAD_LOGPS, and a smaller block with bias or softcap for the same reason.
# Its kernels loop over the third block: dlogits over d, dweight over n, product over v.
GATHERED_DLOGITS = LaunchConfig(block_n=128, block_v=128, block_d=64, num_warps=8, num_stages=3)
GATHERED_DLOGITS_EXTRAS = LaunchConfig(block_n=64, block_v=128, block_d=64, num_warps=8, num_stages=3)
GATHERED_DLOGITS_FP32 = LaunchConfig(block_n=32, block_v=64, block_d=16, num_warps=4, num_stages=2)
GATHERED_DWEIGHT = LaunchConfig(block_n=32, block_v=128, block_d=128, num_warps=8, num_stages=3)
GATHERED_DWEIGHT_FP32 = LaunchConfig(block_n=16, block_v=64, block_d=64, num_warps=4, num_stages=2)
GATHERED_PRODUCT = LaunchConfig(block_n=128, block_v=32, block_d=128, num_warps=8, num_stages=3)
GATHERED_PRODUCT_FP32 = LaunchConfig(block_n=32, block_v=16, block_d=64, num_warps=4, num_stages=2)
ADD_PRODUCTS = LaunchConfig(block_n=1, block_v=0, block_d=1024, num_warps=4, num_stages=1)

# The interpreter pays about 10 ms for each program and loop turn, whatever the block holds.
INTERPRETED = LaunchConfig(block_n=64, block_v=256, block_d=128, num_warps=4, num_stages=1)


def head_logps(itemsize: int, *, extras: bool) -> LaunchConfig:
    """For operands of `itemsize` bytes; extras: bias, softcap or entropy is asked for."""
    if itemsize <= 2:
        return HEAD_LOGPS_EXTRAS if extras else HEAD_LOGPS
    return HEAD_LOGPS_FP32_EXTRAS if extras else HEAD_LOGPS_FP32


def fold_most_columns(*, extras: bool, out: bool) -> int:
    """Columns of a row that a program holds in registers without spilling; extras: bias, softcap, entropy or masses."""
    return 16384 if out and not extras else 8192


def fold_logits(columns: int, *, extras: bool, out: bool) -> LaunchConfig:
    """One row a program, 32 values a thread (16 with `out`): enough loads in flight to hide their latency."""
    block_v = min(max(1 << (columns - 1).bit_length(), 1024), fold_most_columns(extras=extras, out=out))
    return LaunchConfig(1, block_v, 0, num_warps=block_v // (512 if out else 1024), num_stages=1)


def gathered_dlogits(itemsize: int, *, extras: bool) -> LaunchConfig:
    """For operands of `itemsize` bytes; extras: bias or softcap."""
    if itemsize <= 2:
        return GATHERED_DLOGITS_EXTRAS if extras else GATHERED_DLOGITS
    return GATHERED_DLOGITS_FP32


# First row that fits: least capability (90 is sm_90; 0 is the interpreter and other vendors), most bytes an operand,
# least hidden size, which forward. Not measured here yet. Published on H100: cuBLAS tile + row kernel 648 to 709
# TFLOP/s, fused Triton 208 to 469, so Hopper and Blackwell fold. A100 has the bandwidth to fold from about D = 1024 on,
# where a matmul tile costs more than the traffic of its logits; the consumer cards sm_86 and sm_89 have not. IEEE
# float32 has no tensor core in Triton, and cuBLAS is far ahead in it everywhere.
FORWARD_METHODS = (
    (90, 2, 0, "fold"),
    (86, 2, 0, "fused"),
    (80, 2, 1024, "fold"),
    (80, 2, 0, "fused"),
    (80, 8, 0, "fold"),
    (0, 8, 0, "fused"),
)


def forward_method(capability: int, itemsize: int, width: int) -> str:
    """fused or fold, for operands of `itemsize` bytes and hidden size `width`."""
    for least_capability, most_bytes, least_width, method in FORWARD_METHODS:
        if capability >= least_capability and itemsize <= most_bytes and width >= least_width:
            return method
    raise ValueError(f"no forward for capability {capability}, {itemsize} bytes, width {width}")


# Least hidden size, kept share of all blocks from which on d hidden is one matmul over a gradient that is mostly zero. Derived, not
# measured (`bco_fast.head.roofline`): 0.17 to 0.23 at D >= 2048 on A100, H100, H200 and B200, 0.28 to 0.31 at D = 896, where adding up
# chunks [N, D] takes its part.
SCATTERED_FROM = ((1024, 0.2), (0, 0.3))


def scattered_from(itemsize: int, width: int) -> float:
    """That share for operands of `itemsize` bytes; above 1 for float32, which has no tensor core."""
    return 2.0 if itemsize > 2 else next(share for least, share in SCATTERED_FROM if width >= least)
