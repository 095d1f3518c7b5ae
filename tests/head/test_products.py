"""Matrix products of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = """
import torch
from bco_fast import fused_linear_logps


def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024


torch.set_num_threads(1)
weight = torch.randn(500, 64, requires_grad=True)
for rows in range(100, 220):
    if rows == 105:
        before = resident()
    hidden = torch.randn(rows, 64, requires_grad=True)
    fused_linear_logps(hidden, weight, torch.zeros(rows, dtype=torch.long)).sum().backward()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kept", [None, "1024"], ids=["default", "asked for"])
def test_batches_of_many_sizes_keep_few_compiled_products(kept):
    """By default PyTorch and oneDNN keep 1024 each, 0.5 MB and more apiece; a user's own setting is left alone."""
    environment = {**os.environ, "BCO_FAST_CPU_MATMUL": "onednn"}
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        environment.pop(name, None)
        environment |= {} if kept is None else {name: kept}
    run = subprocess.run([sys.executable, "-c", ROWS], capture_output=True, text=True, env=environment, check=True)
    assert (float(run.stdout) < 80) is (kept is None), run.stdout
