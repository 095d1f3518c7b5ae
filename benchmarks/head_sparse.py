"""The certified sparse backward on the CPU against plain PyTorch that materialises the logits.

    python benchmarks/head_sparse.py            about two minutes on two cores; writes results/head_sparse.json

N = 2048, D = 512, V = 32768, float32, forward and backward, workspace 32 MiB. Peaked: hidden states built (by least
squares) so that 40 random tokens a row have probabilities that follow rank^-1.5, above the noise of the others; targets
are sampled from the softmax. Flat: normal hidden states. Times are taken in turns in one process, flat and peaked against
their own plain PyTorch; extra memory is that of a process of its own. Errors of the gradients are relative, in the L2
norm, against plain PyTorch in float32.
"""

from __future__ import annotations

import argparse
import json

import torch
from common import in_own_process, interleaved, peak_rss, reset_peak_rss, save, summary, table

from bco_fast import HeadStats, fused_linear_logps

N, D, V, TOKENS = 2048, 512, 32768, 40
TOP_LOGIT = 24.0  # the others are noise of standard deviation 5
WORKSPACE = 32 << 20
TAUS = {"plain": None, "dense": 0.0, "tau 2^-7": 2.0**-7, "tau 2^-5": 2.0**-5}


def inputs(kind: str, n: int = N):
    """hidden [N, D], weight [V, D], targets [N]."""
    torch.manual_seed(0)
    weight = torch.randn(V, D) / D**0.5
    hidden = torch.randn(n, D)
    if kind == "flat":
        return hidden, weight, torch.randint(0, V, (n,))
    targets = torch.empty(n, dtype=torch.int64)
    wanted = TOP_LOGIT - 1.5 * torch.arange(1, TOKENS + 1.0).log()
    for first in range(0, n, 256):
        rows = slice(first, min(first + 256, n))
        tokens = torch.stack([torch.randperm(V)[:TOKENS] for _ in range(rows.stop - first)])
        chosen = weight[tokens]
        mixture = torch.linalg.solve(chosen @ chosen.mT, wanted.expand(len(tokens), TOKENS)[..., None])
        hidden[rows] = (chosen.mT @ mixture)[..., 0]
        targets[rows] = torch.multinomial((hidden[rows] @ weight.T).softmax(1), 1)[:, 0]
    return hidden, weight, targets


def step(case: str, hidden, weight, targets, stats: HeadStats | None = None) -> list:
    """One forward and backward; -> the gradients, so that they count as memory."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    if case == "plain":
        logps = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    else:
        logps = fused_linear_logps(
            hidden, weight, targets, workspace_bytes=WORKSPACE, sparse_tolerance=TAUS[case], stats=stats
        )
    logps.mean().backward()
    return [hidden.grad, weight.grad]


def memory(kind: str, case: str) -> dict:
    hidden, weight, targets = inputs(kind)
    step(case, hidden[:64], weight, targets[:64])  # libraries and threads are up; what the step itself takes is to come
    before = reset_peak_rss()
    kept = step(case, hidden, weight, targets)
    return {"extra_mb": round((peak_rss() - before) / 1e6, 1), "gradients": len(kept)}


def errors(tensors) -> dict[str, dict]:
    truth = step("plain", *tensors)
    found = {}
    for case in list(TAUS)[1:]:
        stats = HeadStats()
        ours = step(case, *tensors, stats)
        relative = [float((a - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True)]
        found[case] = {
            "rho": round(stats.kept_fraction, 4),
            "certified": stats.error_bound,
            "error_d_hidden": relative[0],
            "error_d_weight": relative[1],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "CASE"), help="measure the memory of one case")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(*options.memory)))
        return
    tensors = {kind: inputs(kind) for kind in ("peaked", "flat")}
    times = interleaved(
        {f"{kind}, {case}": lambda k=kind, c=case: step(c, *tensors[k]) for kind in tensors for case in TAUS},
        options.repeats,
    )
    rows = []
    for kind in tensors:
        found = errors(tensors[kind])
        plain = summary(times[f"{kind}, plain"])["median_s"]
        for case in TAUS:
            measured = summary(times[f"{kind}, {case}"])
            rows.append(
                {
                    "benchmark": "head_sparse",
                    "case": f"{kind}, {case}",
                    **{"N": N, "D": D, "V": V, "dtype": "float32", "workspace_bytes": WORKSPACE},
                    **measured,
                    "ratio_to_plain": round(measured["median_s"] / plain, 3),
                    **found.get(case, {}),
                    "extra_mb": in_own_process(__file__, "--memory", kind, case)["extra_mb"],
                }
            )
    print(f"\n{save('head_sparse', rows)}")
    print(table(rows, ["case", "median_s", "min_s", "max_s", "ratio_to_plain", "rho", "error_d_hidden", "extra_mb"]))


if __name__ == "__main__":
    main()
