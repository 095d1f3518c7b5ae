"""Every kernel and shipped config compiles for GPUs that are not here: nothing spilled, shared memory in its limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = 42
MULTIPLY = ("head_logps", "gathered_")
"""Kernels with a matmul in them; the others are fed by the vendor's library."""


def _report(*capabilities):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, script, *map(str, capabilities)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def _check(rows):
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["smem_bytes"] <= row["smem_limit"], row
        if row["kernel"].startswith(MULTIPLY) and "fp32" not in row["kernel"]:
            assert row["tensor_core"], row


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80, 86, 89, 100, 120])
def test_nvidia(capability):
    rows = _report(capability)
    assert len(rows) == KERNELS
    _check(rows)


@pytest.mark.slow
def test_amd_instinct():
    rows = _report("amd")
    assert len(rows) == KERNELS
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["smem_bytes"] <= row["smem_limit"], row
        assert row["matrix_core"] == row["kernel"].startswith(MULTIPLY), row
