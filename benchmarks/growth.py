"""How time and memory of the head grow with the tokens and with the vocabulary: fitted exponents.

    OMP_NUM_THREADS=1 python benchmarks/growth.py        about two minutes; results/growth.json

float32, D = 128, forward and backward with a trainable head, and with a frozen one. A row is a point; rows with `fit`
are the exponents p of time ~ x^p (of the fastest calls) and extra memory ~ x^p (1 is linear, 0 is flat). Extra memory is the
growth of the peak resident size in a process of its own, less the gradients and results, which every implementation
returns; what a process needs anyway, a few MB, keeps ours from a clean 0.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json

import torch
from common import in_own_process, interleaved, peak_rss, reset_peak_rss, save, summary, table
from contenders import Head, ours, plain
from counts import head_bytes, head_flops, measured_limits, share_of_limit, slope

D, WORKSPACE = 128, 16 << 20
CONTENDERS = {"bco_fast": ours, "PyTorch": plain}
MODES = ("frozen", "trainable")
GROWTH = {  # axis: the points (N, V)
    "N": [(n, 32768) for n in (512, 1024, 2048, 4096)],
    "V": [(1024, v) for v in (16384, 32768, 65536, 131072)],
}
SMOKE = {"N": [(64, 2048), (128, 2048)], "V": [(64, 2048), (64, 4096)]}


def memory(contender: str, mode: str, n: int, v: int) -> dict:
    head = Head((n, D, v, None), "cpu", torch.float32, workspace_bytes=WORKSPACE)
    logps = CONTENDERS[contender](head)
    head.step(logps, mode)
    gc.collect()
    before = reset_peak_rss()
    results = sum(t.nbytes for t in head.step(logps, mode).values())
    return {"extra_mb": round(max(peak_rss() - before - results, 0) / 1e6, 1)}


def points(axis: str, sizes: list[tuple[int, int]], repeats: int, limits: dict) -> list[dict]:
    rows = []
    for n, v in sizes:
        head = Head((n, D, v, None), "cpu", torch.float32, workspace_bytes=WORKSPACE)
        cases = {
            (name, mode): functools.partial(head.step, make(head), mode)
            for name, make in CONTENDERS.items()
            for mode in MODES
        }
        for (name, mode), seconds in interleaved(cases, repeats).items():
            row = {"benchmark": "growth", "case": f"{name}, {mode}, N = {n}, V = {v}", "axis": axis}
            row |= {"contender": name, "mode": mode, "N": n, "D": D, "V": v, "workspace_bytes": WORKSPACE}
            row |= summary(seconds)
            work = head_flops(mode, n, D, v), head_bytes(mode, n, D, v, 4)
            row["share_of_limit"] = share_of_limit(*work, row["median_s"], limits)
            rows.append(row | limits | in_own_process(__file__, "--case", json.dumps([name, mode, n, v])))
    return rows


def fits(rows: list[dict]) -> list[dict]:
    """The exponents along each axis."""
    found = []
    for key in dict.fromkeys((row["contender"], row["mode"], row["axis"]) for row in rows):
        line = [row for row in rows if (row["contender"], row["mode"], row["axis"]) == key]
        x = [row[key[2]] for row in line]
        exponents = {
            "time_exponent": round(slope(x, [row["min_s"] for row in line]), 3),
            "memory_exponent": round(slope(x, [max(row["extra_mb"], 1.0) for row in line]), 3),
            "largest_extra_mb": max(row["extra_mb"] for row in line),
        }
        name, mode, axis = key
        found.append(
            {"benchmark": "growth", "case": f"{name}, {mode}, along {axis}", "fit": axis}
            | {"contender": name, "mode": mode, "from": min(x), "to": max(x), **exponents}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no file: keeps this program alive")
    parser.add_argument("--case", help="measure the memory of one case, JSON, and print it")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(memory(*json.loads(options.case))))
        return
    limits = measured_limits("cpu", torch.float32, size=256 if options.smoke else None)
    rows = [
        row
        for axis, sizes in (SMOKE if options.smoke else GROWTH).items()
        for row in points(axis, sizes, options.repeats, limits)
    ]
    rows += fits(rows)
    if not options.smoke:
        print(save("growth", rows))
    print(table(rows, ["case", "median_s", "share_of_limit", "extra_mb", "time_exponent", "memory_exponent"]))


if __name__ == "__main__":
    main()
