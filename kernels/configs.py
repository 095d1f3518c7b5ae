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


# 128x128 keeps 64 fp32 accumulators per thread, which leaves room for softmax and entropy without spilling on
# sm_80 to sm_120 (the compile-only test holds this at 0 spilled bytes).
HEAD_LOGPS = LaunchConfig(block_n=128, block_v=128, block_d=64, num_warps=8, num_stages=3)

# fp32 operands double the shared memory per stage; sm_86, sm_89 and sm_120 have 99 KiB.
HEAD_LOGPS_FP32 = LaunchConfig(block_n=64, block_v=64, block_d=32, num_warps=4, num_stages=2)

# Elementwise over a tile: 16 fp32 values a thread, rows short enough that small batches still fill the GPU.
DLOGITS = LaunchConfig(block_n=4, block_v=1024, block_d=0, num_warps=8, num_stages=1)

MERGE_SPLITS = LaunchConfig(block_n=256, block_v=0, block_d=0, num_warps=4, num_stages=1)

# The interpreter pays about 10 ms for each program and loop turn, whatever the block holds.
INTERPRETED = LaunchConfig(block_n=64, block_v=256, block_d=128, num_warps=4, num_stages=1)
