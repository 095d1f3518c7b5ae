"""The fused head on the CPU against plain PyTorch that materialises the logits.

    python benchmarks/head_cpu.py            about two minutes on two cores; writes results/head_cpu.json

N = 2048, D = 512, V = 32768, float32, forward and backward, workspace 32 MiB. Times are taken in turns in one process;
extra memory is the growth of the peak resident size in a process of its own, gradients included.
"""

from __future__ import annotations

import argparse
import json

import torch
from common import in_own_process, interleaved, peak_rss, reset_peak_rss, save, summary, table

from bco_fast import fused_linear_logps

N, D, V = 2048, 512, 32768
WORKSPACE = 32 << 20
CASES = ("plain", "ours", "ours, MKL matmul", "plain frozen", "ours frozen", "ours frozen, MKL matmul", "ours forward")


def inputs(n: int = N):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, D), torch.randn(V, D) / D**0.5
    return hidden, weight, torch.randint(0, V, (n,))


def step(case: str, hidden, weight, targets) -> list:
    """One forward and backward; -> the gradients, so that they count as memory."""
    frozen, mkl = "frozen" in case, "MKL" in case
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    with torch.backends.mkldnn.flags(enabled=not mkl):
        if case.startswith("plain"):
            logps = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
        elif case == "ours forward":
            with torch.no_grad():
                return [fused_linear_logps(hidden, weight, targets, workspace_bytes=WORKSPACE)]
        else:
            logps = fused_linear_logps(hidden, weight, targets, workspace_bytes=WORKSPACE)
        logps.mean().backward()
    return [hidden.grad, weight.grad]


def memory(case: str) -> dict:
    tensors = inputs()
    small = (tensors[0][:64], tensors[1], tensors[2][:64])
    step(case, *small)  # libraries and threads are up; what the step itself takes is still to come
    before = reset_peak_rss()
    kept = step(case, *tensors)
    return {"extra_mb": round((peak_rss() - before) / 1e6, 1), "gradients": sum(g is not None for g in kept)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="measure the memory of one case and print it")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(memory(options.case)))
        return
    tensors = inputs()
    times = interleaved({case: lambda case=case: step(case, *tensors) for case in CASES}, options.repeats)
    medians = {case: summary(seconds)["median_s"] for case, seconds in times.items()}
    rows = []
    for case, seconds in times.items():
        against = "plain frozen" if "frozen" in case else "plain"
        rows.append(
            {
                "benchmark": "head_cpu",
                "case": case,
                **{"N": N, "D": D, "V": V, "dtype": "float32", "workspace_bytes": WORKSPACE},
                **summary(seconds),
                "ratio_to_plain": round(medians[case] / medians[against], 3),
                "extra_mb": in_own_process(__file__, "--case", case)["extra_mb"],
            }
        )
    print(f"\n{save('head_cpu', rows)}")
    print(table(rows, ["case", "median_s", "min_s", "max_s", "ratio_to_plain", "extra_mb"]))


if __name__ == "__main__":
    main()
