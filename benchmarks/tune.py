"""Propose launch configurations for the GPU at hand: rows for kernels/configs.py, with the time of each candidate.

    python benchmarks/tune.py                 on a GPU, about three minutes
    python benchmarks/tune.py --compile 90    no GPU: which candidates compile for sm_90 without a spilled register

Tuning is opt-in and its result is written into the table by hand: a launch never searches, so that the same inputs
give the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from common import interleaved, summary, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "head"))

WIDTHS = (4096, 896, 2048)
TOKENS, VOCABULARY = 4096, 128_256


def candidates():
    from bco_fast.kernels.configs import LaunchConfig

    for n, v, d, warps, stages in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)):
        if 64 * 64 <= n * v <= 128 * 256:
            yield LaunchConfig(n, v, d, warps, stages)


def compiled(capability: int, extras: bool) -> list[dict]:
    """Candidates of the fused forward that compile within the limits, cheapest in registers first."""
    import compile_kernels as compiler

    kernels = {name: case for name, *case in compiler.cases()}
    name = "head_logps bf16" + (" bias softcap entropy mass" if extras else "")
    kernel, types, constants, _ = kernels[name]
    rows = []
    for config in candidates():
        blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
        binary = compiler.compile_for(capability, kernel, types, constants | blocks, config)
        row = {"config": tuple(config), **compiler.resources(binary, capability)}
        row["fits"] = row["spill_bytes"] == 0 and row["smem_bytes"] <= row["smem_limit"] and row["tensor_core"]
        rows.append(row)
    return sorted(rows, key=lambda row: (not row["fits"], -row["config"][0] * row["config"][1], row["registers"]))


def measured(seconds: float) -> Iterator[list[dict]]:
    """Times of the fused forward by candidate, for one hidden size after the other, beside the fold forward and the bare
    matmul. Largest tiles first; no candidate is compiled after that many seconds."""
    from bco_fast import fused_linear_logps
    from bco_fast.kernels import configs

    until, left = time.perf_counter() + seconds, sorted(candidates(), key=lambda c: -c.block_n * c.block_v)
    for width in WIDTHS:
        hidden = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(VOCABULARY, width, device="cuda", dtype=torch.bfloat16) / width**0.5
        targets = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")

        def call(config, method, tensors=(hidden, weight, targets)):
            chosen = mock.patch.object(configs, "head_logps", return_value=config)
            forced = mock.patch.object(configs, "forward_method", return_value=method)
            with chosen, forced, torch.no_grad():
                return fused_linear_logps(*tensors, backend="triton")

        cases, rows, tried = {"matmul": lambda h=hidden, w=weight: h @ w.T}, [], []
        cases["fold"] = lambda: call(configs.HEAD_LOGPS, "fold")
        for config in left:
            if time.perf_counter() > until and width == WIDTHS[0]:
                rows.append({"D": width, "config": f"{len(left) - len(tried)} others", "error": "out of time"})
                break
            tried.append(config)
            try:
                call(config, "fused")
                cases[str(tuple(config))] = lambda c=config: call(c, "fused")
            except Exception as error:  # out of shared memory or registers: not a candidate on this GPU
                rows.append({"D": width, "config": str(tuple(config)), "error": type(error).__name__})
        left = tried
        times = {name: summary(found)["median_s"] for name, found in interleaved(cases, 5, cuda=True).items()}
        for name, median in sorted(times.items(), key=lambda item: item[1])[:8]:
            rows.append({"D": width, "config": name, "median_s": median, "matmuls": round(median / times["matmul"], 2)})
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, metavar="SM", help="compile only, for this capability (80, 90, ...)")
    parser.add_argument("--extras", action="store_true", help="with bias, softcap, entropy and tile masses")
    parser.add_argument("--seconds", type=float, default=120.0, help="no candidate is compiled after this long")
    parser.add_argument("--most", type=int, default=12, help="rows to print")
    options = parser.parse_args()
    if options.compile:
        if "TRITON_INTERPRET" in os.environ:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
        rows = compiled(options.compile, options.extras)
        print(table(rows[: options.most], ["config", "registers", "spill_bytes", "smem_bytes", "smem_limit", "fits"]))
        print(f"{sum(row['fits'] for row in rows)} of {len(rows)} candidates fit sm_{options.compile}")
    elif torch.cuda.is_available():
        for rows in measured(options.seconds):
            print(table(rows, ["D", "config", "median_s", "matmuls", "error"]), flush=True)
    else:
        parser.error("no GPU here; --compile SM works without one")


if __name__ == "__main__":
    main()
