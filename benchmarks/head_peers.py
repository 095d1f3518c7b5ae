"""The fused head against everything else that computes it: time, memory, error.

    make venv-peers && python benchmarks/head_peers.py                   everything; results/head_peers.json
    python benchmarks/head_peers.py --part time --shape "Qwen2.5-0.5B"    a part; its rows replace those in the file

Every contender runs in a process of its own, peers in the environment of their own package where they have one; the
processes map one weight and take turns. A contender that is not installed or fails is a row with its error. Extra
memory is what a step takes beyond its inputs, gradients included. `share_of_limit`: the useful FLOP and bytes
(counts.py) at the rates measured in the same run, over the time; it and `ratio_to_plain` are of processor seconds, which
a machine's other work enters least with OMP_NUM_THREADS=1. Errors are those of per-token log-probabilities against
float64 on 4096 tokens, and of their sums. N is small where this machine is; shapes marked /4 have a quarter of the
model's D and V.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS, Worker, peak_rss, peers_python, reset_peak_rss, save, say, summary, table
from contenders import CONTENDERS, DTYPES, ENVIRONMENTS, LOGITS, Head, described, errors, head_weight
from counts import MODELS, head_bytes, head_flops, measured_limits, share_of_limit

MODES = ("frozen", "trainable")
WORKSPACE = 32 << 20  # of a machine with little memory
CHECKED, ROWS_AT_ONCE = 4096, 512
SMALL_N, SCALED_N = 256, 1024
SHAPES = {  # on the CPU: N, D, V, softcap
    "Qwen2.5-0.5B": (SMALL_N, 896, 151936, None),
    **{
        f"{name} /4": (SCALED_N, MODELS[name].D // 4, MODELS[name].V // 4, MODELS[name].softcap)
        for name in ("Llama-3.2-1B", "Gemma-2-2B", "Gemma-2-9B", "Llama-3-8B", "Qwen3-8B", "Mistral-7B")
    },
}
PATIENCE_S = 8  # a contender that takes longer is timed once
MISSING: dict[str, str] = {}
KEYS = ("part", "shape", "mode", "logits", "dtype", "contender")


# ---- in the process of a contender


def work(job: dict) -> None:
    dtype, shape = getattr(torch, job["dtype"]), tuple(job["size"])
    n, d, v, _ = shape
    stored = torch.from_file(job["weight"], shared=True, size=v * d, dtype=dtype).view(v, d)
    head = Head(shape, "cpu", dtype, logits=job["logits"], workspace_bytes=WORKSPACE, weight=stored)
    logps = CONTENDERS[job["contender"]](head)
    if job["part"] == "errors":
        blocks = [slice(start, start + ROWS_AT_ONCE) for start in range(0, n, ROWS_AT_ONCE)]
        parts = [head.step(logps, "forward", rows=block)["logps"] for block in blocks]
        if len(parts[0]) == 1:
            raise NotImplementedError("gives a sum, no log-probability per token")
        torch.save(torch.cat(parts), job["output"])
        say({})
        return
    head.step(logps, job["mode"])  # libraries are up, compilers have compiled
    gc.collect()
    before = reset_peak_rss()
    kept, first = timed(lambda: head.step(logps, job["mode"]))
    rho = {"rho": round(head.stats.kept_fraction, 3)} if head.stats and head.stats.kept_fraction is not None else {}
    say({"extra_mb": round((peak_rss() - before) / 1e6, 1), "first": first, **rho})
    del kept
    while sys.stdin.readline():
        say(timed(lambda: head.step(logps, job["mode"]))[1])


def timed(step) -> tuple[object, tuple[float, float]]:
    """-> its result, seconds and processor seconds."""
    start, processor = time.perf_counter(), time.process_time()
    result = step()
    return result, (time.perf_counter() - start, time.process_time() - processor)


# ---- in the parent


class Contest:
    """The contenders of one shape, kind of logits, dtype and mode."""

    def __init__(self, row: dict, folder: Path, weight: Path, contenders: list[str]):
        self.row, self.folder, self.weight, self.contenders = row, folder, weight, contenders

    def start(self, contender: str) -> Worker:
        job = {**self.row, "contender": contender, "size": [self.row[k] for k in ("N", "D", "V", "softcap")]}
        job |= {"weight": str(self.weight), "output": str(self.folder / f"{contender}.pt")}
        package = ENVIRONMENTS.get(contender)
        python, environment = (peers_python(package), {"PYTHONPATH": None}) if package else (sys.executable, {})
        command = [python, __file__, "--worker", json.dumps(job)]
        return Worker(contender, command, self.folder / f"{contender}.log", **environment)

    def time(self, turns: int, limits: dict) -> list[dict]:
        workers, rows, first = {}, {}, {}
        try:
            for contender in self.contenders:
                rows[contender] = {**self.row, "contender": contender}
                if contender in MISSING:
                    rows[contender]["error"] = MISSING[contender]
                    continue
                try:
                    workers[contender] = self.start(contender)
                    rows[contender] |= workers[contender].answer()
                    first[contender] = rows[contender].pop("first")
                except (OSError, RuntimeError) as error:
                    rows[contender]["error"] = why(contender, error)
            running = [w for name, w in workers.items() if "error" not in rows[name]]
            times = {w.name: [first[w.name]] if first[w.name][0] > PATIENCE_S else [] for w in running}
            for _ in range(turns):
                for worker in running:
                    if first[worker.name][0] <= PATIENCE_S:
                        times[worker.name].append(worker.turn())
        finally:
            for worker in workers.values():
                worker.stop()
        n, d, v = (self.row[k] for k in "NDV")
        item = getattr(torch, self.row["dtype"]).itemsize
        work = head_flops(self.row["mode"], n, d, v), head_bytes(self.row["mode"], n, d, v, item)
        for name, turns_taken in times.items():
            seconds, processor = zip(*turns_taken, strict=True)
            rows[name] |= summary(seconds) | {"processor_s": round(statistics.median(processor), 5)}
            rows[name]["share_of_limit"] = share_of_limit(
                *work, rows[name]["processor_s"] / self.row["threads"], limits
            )
        for name in times:
            rows[name]["ratio_to_plain"] = round(rows[name]["processor_s"] / rows["PyTorch"]["processor_s"], 3)
        return [{**row, **limits} for row in rows.values()]

    def errors(self) -> list[dict]:
        shape, dtype = tuple(self.row[k] for k in ("N", "D", "V", "softcap")), getattr(torch, self.row["dtype"])
        stored = torch.from_file(str(self.weight), shared=True, size=shape[1] * shape[2], dtype=dtype)
        head = Head(shape, "cpu", dtype, logits=self.row["logits"], weight=stored.view(shape[2], shape[1]))
        exact = head.exact(shape[0], block=256)
        rows = []
        for contender in self.contenders:
            row = {**self.row, "contender": contender}
            rows.append(row)
            if contender in MISSING:
                row["error"] = MISSING[contender]
                continue
            try:
                worker = self.start(contender)
                worker.answer()
                worker.stop()
                row |= errors(torch.load(self.folder / f"{contender}.pt", weights_only=True), exact)
            except (OSError, RuntimeError) as error:
                row["error"] = why(contender, error)
            row |= {"mean_logp": round(float(exact.mean()), 3)}
        return rows


def why(contender: str, error: BaseException) -> str:
    """The last line of what the process said; a package that is not installed is asked for once."""
    line = str(error).strip().splitlines()[-1][:240]
    if line.startswith("missing: "):
        MISSING[contender] = line
    return line


def contests(options: argparse.Namespace, folder: Path, limits: dict) -> None:
    for name in options.shape or SHAPES:
        for part, dtype in (("time", "float32"), ("time", "bfloat16"), ("errors", "bfloat16")):
            if part not in options.part or dtype not in options.dtype or (part, dtype, name) in SKIPPED:
                continue
            n, d, v, softcap = SHAPES[name]
            size = (CHECKED if part == "errors" else n, d, v, softcap)
            weight = folder / "weight"
            torch.from_file(str(weight), shared=True, size=v * d, dtype=getattr(torch, dtype)).copy_(
                head_weight(size, "cpu", getattr(torch, dtype)).flatten()
            )
            for logits in options.logits or LOGITS:
                for mode in (options.mode or MODES) if part == "time" else ("forward",):
                    row = {"benchmark": "head_peers", "part": part, "shape": name, "mode": mode, "logits": logits}
                    row |= {
                        "threads": torch.get_num_threads(),
                        "dtype": dtype,
                        **dict(zip(("N", "D", "V", "softcap"), size, strict=True)),
                    }
                    contenders = [c for c in options.contender or CONTENDERS if DTYPES.get(c, dtype) == dtype]
                    contest = Contest(row, folder, weight, contenders)
                    done = contest.errors() if part == "errors" else contest.time(options.turns, limits[dtype])
                    for r in done:
                        r["case"] = ", ".join(str(r[k]) for k in KEYS)
                    print(table(done, COLUMNS[part]), flush=True)
                    save("head_peers", done, folder=options.out, keys=KEYS)
            weight.unlink()


COLUMNS = {
    "time": [
        "case",
        "median_s",
        "min_s",
        "max_s",
        "processor_s",
        "ratio_to_plain",
        "share_of_limit",
        "extra_mb",
        "error",
    ],
    "errors": ["case", "logp_rms_error", "logp_max_error", "sum_256_error", "sum_4096_error", "error"],
}
SKIPPED = {("errors", "bfloat16", name) for name in SHAPES if name not in ("Qwen2.5-0.5B", "Gemma-2-2B /4")}
SKIPPED |= {("time", "bfloat16", name) for name in SHAPES if name != "Qwen2.5-0.5B"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="only this one; may be repeated")
    parser.add_argument("--part", action="append", choices=["time", "errors"], help="only this one")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="only this one")
    parser.add_argument("--logits", action="append", choices=LOGITS, help="only these")
    parser.add_argument(
        "--contender", action="append", choices=list(CONTENDERS), help="only these; PyTorch with a time"
    )
    parser.add_argument("--mode", action="append", choices=MODES, help="only this one")
    parser.add_argument("--turns", type=int, default=5, help="times each contender is measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job = json.loads(options.worker)
        try:
            work(job)
        except Exception as error:  # whatever a peer raises is its row
            sys.exit(described(error))
        return
    if options.contender and "PyTorch" not in options.contender:
        options.contender.append("PyTorch")
    options.part = options.part or ["time", "errors"]
    options.dtype = options.dtype or ["float32", "bfloat16"]
    limits = {name: measured_limits("cpu", getattr(torch, name)) for name in ("float32", "bfloat16")}
    with tempfile.TemporaryDirectory() as folder:
        contests(options, Path(folder), limits)
    print(options.out / "head_peers.json")


if __name__ == "__main__":
    main()
