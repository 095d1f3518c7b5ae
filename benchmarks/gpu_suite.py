"""What only a GPU can tell: numerics, times and memory of the fused head at real shapes, growth, a long context.

    python benchmarks/gpu_suite.py --out DIR      under 9 minutes on a large GPU; DIR/gpu_suite.json and a table
    python benchmarks/gpu_suite.py --out DIR --smoke      the same program, small, on the CPU

Most valuable first; every part is a process with a time limit of its own, its rows are written when it ends, one that
fails or takes too long is a row that says so, and a second run takes up what the first one did not finish. Times are
medians of calls that take turns in one process; `derived_s` is what bco_fast/head/roofline.py allows ours at this GPU's
measured matmul and copy rates; `share_of_limit` is the useful work (counts.py) at this GPU's measured
matmul and copy rates, over the time. Errors are per-token log-probabilities, and sums of them, against float64. Peers
run as installed from their own packages (contenders.py); one that is missing or fails is a row that says so.
`triton fused` and `triton fold` are the two forwards of the triton backend.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import long_context
import torch
from common import environment, interleaved, peak_rss, reset_peak_rss, save, summary, table
from contenders import PEERS, WORKSPACE, Head, compiled, described, errors, liger_kto, ours, plain
from counts import MODELS, OUR_MATMULS, head_bytes, head_flops, measured_limits, share_of_limit, slope

MODES = ("frozen", "trainable", "forward")  # most users have a frozen head
N = {"Qwen2.5-0.5B": 32768}
SHAPES = {  # N tokens, D, V, softcap
    name: (N.get(name, 8192), MODELS[name].D, MODELS[name].V, MODELS[name].softcap)
    for name in ("Llama-3-8B", "Qwen3-8B", "Qwen2.5-0.5B", "Gemma-2-2B", "Gemma-2-9B", "Llama-3.2-1B", "Mistral-7B")
}
"""Qwen3-8B's is the shape of trl issue 7244. Published there on an H100: bare matmuls 42 ms, PyTorch 59 ms and 19.9 GiB,
Liger 192 ms and 6.1 GiB, forward and backward with a trained head."""
SMOKE = {"smoke": (96, 32, 1000, None), "smoke softcap": (96, 32, 1000, 30.0)}
CHECKED_ROWS = 4096
GROWTH = (2048, 4096, 8192, 16384), (32768, 65536, 131072), 2048
"""Numbers of tokens, vocabularies, D."""
COMPILED = {"PyTorch, compiled": compiled, "Liger chunked KTO": liger_kto}
TOLERANCES = {"flat": (7,), "likely": (5, 11)}
"""Of a sparse backward, as powers of 1/2. Of likely tokens they keep about 0.1 and 0.25 of the blocks: both of its ways run."""
STEPS = [("Llama-3-8B", case, 8192) for case in ("bco_fast, LoRA", "TRL 1.16 KTOTrainer, LoRA")]
"""The reference and two optimizer steps of one row of 8192 tokens each, random weights; both compute the reference first."""
SHARED = "Llama-3-8B", (8192, 4, 512)
"""One prompt of that many tokens a micro-batch, its completions, and the tokens of each."""
CONTEXTS = [("Llama-3.2-1B", "bco_fast, full", 32768), ("Llama-3-8B", "bco_fast, LoRA", 65536)]


def parts(smoke: bool) -> dict[str, tuple[float, functools.partial]]:
    """name -> (seconds it may take, what gives its rows), most valuable first."""
    if smoke:
        found = {f"head, {s}": (60, functools.partial(head_parts, s, shape)) for s, shape in SMOKE.items()}
        return found | {
            "growth": (60, functools.partial(growth_part, (32, 64), (500, 1000), 32)),
            "step": (150, functools.partial(context_part, [("small", case, 64) for _, case, _ in STEPS], "step")),
            "shared": (60, functools.partial(shared_part, "small", (64, 2, 16))),
            "context": (60, functools.partial(context_part, [("small", "bco_fast, LoRA", 64)], "context")),
        }
    found = {}
    first, later = list(SHAPES.items())[:4], list(SHAPES.items())[4:]
    for mode in MODES:
        found |= {f"head, {s}, {mode}": (75, functools.partial(head_part, s, shape, mode)) for s, shape in first}
        if mode == "trainable":  # where the backward may leave out what does not matter
            s, shape = first[0]
            found[f"head, {s}, {mode}, likely"] = 75, functools.partial(head_part, s, shape, mode, logits="likely")
    found["step"] = (120, functools.partial(context_part, STEPS, "step"))
    found["shared"] = (90, functools.partial(shared_part, *SHARED))
    found["growth"] = (60, functools.partial(growth_part, *GROWTH))
    found["context"] = (150, functools.partial(context_part, CONTEXTS, "context"))
    for s, shape in later:
        found |= {f"head, {s}, {mode}": (60, functools.partial(head_part, s, shape, mode)) for mode in MODES[:2]}
    for s, shape in first[:2]:  # the compiler may take minutes, and costs no other row
        found |= {
            f"head, {s}, {mode}, compiled": (120, functools.partial(head_part, s, shape, mode, compiling=True))
            for mode in MODES
        }
    return found


def gradient_difference(mine: dict, theirs: dict) -> dict:
    """Relative Frobenius distance of gradients from plain PyTorch's in the same dtype: a check, not an error."""
    return {
        f"{name}_vs_plain": round(
            float((mine[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()), 6
        )
        for name in mine
        if name != "logps"
    }


def peak_bytes(step, cuda: bool) -> int:
    """Beyond the inputs; outputs and gradients included."""
    gc.collect()
    if not cuda:
        before = reset_peak_rss()
        step()
        return peak_rss() - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def contenders(cuda: bool, mode: str, logits: str) -> dict:
    mine = {"torch": functools.partial(ours, backend="torch")}
    for power in TOLERANCES[logits] if mode == "trainable" else ():  # the only mode with something to leave out
        backend = "triton" if cuda else "torch"
        mine[f"sparse 2^-{power}"] = functools.partial(ours, backend=backend, sparse_tolerance=2.0**-power)
    if cuda:
        for method in ("fused", "fold"):
            mine[f"triton {method}"] = functools.partial(ours, backend="triton", method=method)
    peers = {name: make for name, make in PEERS.items() if name not in ("PyTorch", *COMPILED)}
    return {"plain": plain} | mine | peers


def derived(mode: str, shape: tuple, limits: dict, kept_fraction: float | None) -> float:
    """Seconds that the roofline allows our triton backend on this GPU; on a CPU, of an H200's multiprocessors."""
    from bco_fast.head.roofline import CARDS, derive

    card, (n, d, v, _) = CARDS["H200"], shape
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = 10 * properties.major + properties.minor
        card = replace(card, processors=properties.multi_processor_count, capability=capability)
    card = card.measured(limits["limit_gflops"], limits["limit_gb_s"])
    times = derive(card, n, d, v, workspace_bytes=WORKSPACE, kept_fraction=kept_fraction or 1.0)
    return float(f"{times[mode if kept_fraction is None else 'sparse']:.4g}")


def head_part(
    shape_name: str,
    shape: tuple,
    mode: str,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    *,
    logits: str = "flat",
    compiling: bool = False,
) -> list[dict]:
    """compiling: only what PyTorch's compiler is in, beside plain PyTorch, which has its row in another part."""
    cuda = device == "cuda"
    n, d, v, _ = shape
    head = Head(shape, device, dtype, logits=logits)
    common = {"benchmark": "gpu_suite", "shape": shape_name, "mode": mode, "logits": logits}
    common |= {"dtype": str(dtype).removeprefix("torch.")}
    common |= dict(zip(("N", "D", "V", "softcap"), shape, strict=True))
    common |= measured_limits(device, dtype, size=None if cuda else 256)
    cases, rows, outputs = {"matmul": lambda: head.hidden @ head.weight.T}, [], {}
    several = {"plain": plain} | COMPILED if compiling else contenders(cuda, mode, logits)
    for name, make in several.items():
        row = {**common, "case": name}
        rows.append(row)
        head.stats = None
        try:
            step = functools.partial(head.step, make(head), mode)
            outputs[name] = step()  # compiles, and lets cuBLAS take its workspace
            if head.stats is not None and head.stats.kept_fraction is not None:
                row["rho"] = round(head.stats.kept_fraction, 3)
            row["extra_mb"] = round(peak_bytes(step, cuda) / 1e6, 1)
            again = step()
            row["same_bits"] = all(torch.equal(again[k], t) for k, t in outputs[name].items())
            cases[name] = step
        except Exception as error:  # whatever a peer raises is its row; shown, never skipped
            row["error"] = described(error)
    exact = head.exact(min(CHECKED_ROWS, n), block=256)
    for row in rows:
        if row["case"] in outputs and outputs[row["case"]]["logps"].shape == head.targets.shape:
            row |= errors(outputs[row["case"]]["logps"], exact)
            if row["case"] != "plain" and "plain" in outputs:
                row |= gradient_difference(outputs[row["case"]], outputs["plain"])
                bound = WORKSPACE + 4 * n * d + sum(t.nbytes for t in outputs[row["case"]].values())
                row["bound_mb"] = round(bound / 1e6, 1)  # what ours promises; frozen keeps 2ND more for the backward
    outputs.clear()
    times = {name: summary(seconds) for name, seconds in interleaved(cases, repeats, cuda=cuda).items()}
    matmul = max(times["matmul"]["median_s"], 1e-9)
    for row in rows:
        if row["case"] in times:
            row |= times[row["case"]]
            seconds = max(row["median_s"], 1e-9)
            work = head_flops(mode, n, d, v), head_bytes(mode, n, d, v, dtype.itemsize)
            if row["case"].startswith(("torch", "triton", "sparse")):
                rho = row.get("rho", 1.0)
                row["derived_s"] = derived(mode, shape, common, rho if rho < 1 else None)
            row["share_of_limit"] = share_of_limit(*work, seconds, common)
            row["matmul_s"] = matmul
            row["matmuls"] = round(seconds / matmul, 2)  # ours should cost OUR_MATMULS
            row["of_matmul_rate"] = round(OUR_MATMULS[mode] * matmul / seconds, 3)
            if "plain" in times:
                row["ratio_to_plain"] = round(row["median_s"] / max(times["plain"]["median_s"], 1e-9), 3)
    return rows[1:] if compiling else rows


def head_parts(shape_name: str, shape: tuple, *arguments) -> list[dict]:
    cases = [(mode, "flat") for mode in MODES] + [("trainable", "likely")]
    return [row for mode, logits in cases for row in head_part(shape_name, shape, mode, *arguments, logits=logits)]


def growth_part(ns: tuple, vs: tuple, d: int, device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Time and memory of a frozen and a trainable head against N and V, with fitted exponents."""
    cuda, rows = device == "cuda", []
    lines = {"N": [(n, vs[1]) for n in ns], "V": [(ns[1], v) for v in vs]}
    for mode in ("frozen", "trainable"):
        for axis, sizes in lines.items():
            line = []
            for n, v in sizes:
                head = Head((n, d, v, None), device, dtype)
                step = functools.partial(head.step, ours(head), mode)
                seconds = interleaved({"ours": step}, repeats, cuda=cuda)["ours"]
                extra = peak_bytes(step, cuda) - sum(t.nbytes for t in step().values())
                row = {"benchmark": "growth", "case": f"{mode}, N = {n}, V = {v}", "shape": f"growth along {axis}"}
                row |= {"mode": mode, "N": n, "D": d, "V": v, **summary(seconds)}
                line.append(row | {"extra_mb": round(max(extra, 0) / 1e6, 1)})
            x = [row[axis] for row in line]
            fit = {
                "benchmark": "growth",
                "case": f"{mode}, along {axis}",
                "shape": f"growth along {axis}",
                "mode": mode,
            }
            fit["time_exponent"] = round(slope(x, [max(row["median_s"], 1e-6) for row in line]), 3)
            fit["memory_exponent"] = round(slope(x, [max(row["extra_mb"], 1.0) for row in line]), 3)
            rows += [*line, fit]
    return rows


def context_part(trials: list, benchmark: str, device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Two optimizer steps at one length, against the prediction; long_context.py bisects."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import build_tokenizer

    rows = []
    for name, case, tokens in trials:
        shape, lora = long_context.SHAPES[name], long_context.CASES[case][1]
        row = {
            "benchmark": benchmark,
            "shape": name,
            "mode": "LoRA" if lora else "full",
            "case": case,
            "tokens": tokens,
        }
        if case.startswith("bco_fast"):
            memory = long_context.counted(shape, tokens, lora=lora, device=device, **long_context.OURS[device])
            row["predicted_mb"] = round(memory.total / 1e6, 1)
        rows.append(row)
        with tempfile.TemporaryDirectory() as folder:
            build_tokenizer().save_pretrained(Path(folder) / "tokenizer")
            budget = 4e9 if device == "cpu" else torch.cuda.mem_get_info()[1]
            job = {"case": case, "shape": name, "device": device, "tokens": tokens, "budget": budget}
            try:
                done = long_context.run_trial(job, Path(folder), 100)
                row |= {"extra_mb": round(done["peak"] / 1e6, 1), "median_s": done["seconds"]} if done["fits"] else done
            except (OSError, RuntimeError) as error:
                row["error"] = str(error).strip().splitlines()[-1][:240]
    return rows


def shared_part(name: str, sizes: tuple, device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """A LoRA micro-batch, forward and backward: all completions of one prompt, with the prompt computed once and for each."""
    import numpy as np

    from bco_fast.data.batch import collate
    from bco_fast.data.dataset import Example, Item
    from bco_fast.models.attention import use_segments
    from bco_fast.models.load import add_adapter
    from bco_fast.models.memory import free_embeddings
    from bco_fast.models.patch import completion_logps, patch_model

    (prompt, completions, tokens), shape = sizes, long_context.SHAPES[name]
    options = long_context.counted_options(True, device)
    model = long_context.build(shape, prompt + tokens, device)
    model = patch_model(add_adapter(model, options, long_context.lora_config(), quiet=True)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    free_embeddings(model)
    use_segments(model)
    ids = np.random.default_rng(0).integers(2, shape.V, prompt + completions * tokens).astype(np.int32)
    items = [
        Item(Example(np.concatenate([ids[:prompt], own]), prompt, True, 1.0))
        for own in np.split(ids[prompt:], completions)
    ]

    def step(batch: dict) -> None:
        completion_logps(model, batch).sum().backward()

    cases = {}
    for case, layout in (("prompt once", "shared"), ("prompt repeated", "packed")):
        batch = collate(items, layout=layout)
        held = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        cases[case] = functools.partial(step, held)
    common = {"benchmark": "step", "shape": f"{name}, {prompt} + {completions} x {tokens}", "mode": "LoRA"}
    times = interleaved(cases, min(repeats, 3), cuda=device == "cuda")  # the first turn compiles, and is not counted
    peaks = {case: peak_bytes(run, device == "cuda") for case, run in cases.items()}
    return [{**common, "case": c, **summary(times[c]), "extra_mb": round(peaks[c] / 1e6, 1)} for c in cases]


def run_part(name: str, limit: float, options: argparse.Namespace) -> list[dict]:
    """The part in its own process; -> its rows, or one that says why there are none."""
    answer = options.out / "part.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(options.out), "--part", name, *["--smoke"] * options.smoke]
    failed = {"part": name, "case": "-", "shape": name, "unfinished": True}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        try:
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its trials, which would keep the GPU's memory
            return [{**failed, "error": f"over its limit of {limit:.0f} s"}]
    if process.returncode:
        return [{**failed, "error": (said.strip().splitlines() or ["no word"])[-1][:240]}]
    rows = json.loads(answer.read_text())
    answer.unlink()
    return [{"part": name, **row} for row in rows]


COLUMNS = ["shape", "mode", "logits", "case", "median_s", "derived_s", "ratio_to_plain", "share_of_limit", "extra_mb"]
COLUMNS += ["predicted_mb", "rho", "time_exponent", "logp_rms_error", "sum_4096_error", "same_bits", "error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU: keeps this program alive")
    parser.add_argument("--minutes", type=float, default=8.5, help="everything ends after this long")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only parts whose name begins with this")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no GPU here; --smoke runs the same program on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    todo = parts(options.smoke)
    if options.part:
        device, dtype = ("cpu", torch.float32) if options.smoke else ("cuda", torch.bfloat16)
        rows = todo[options.part][1](device, dtype, 3 if options.smoke else 7)
        (options.out / "part.json").write_text(json.dumps(rows))
        return
    start = time.perf_counter()
    rows = _resume(options.out / "gpu_suite.json")
    done = {row["part"] for row in rows}
    late = []
    for name, (limit, _) in todo.items():
        left = options.minutes * 60 - (time.perf_counter() - start)
        if name in done or not name.startswith(options.only):
            continue
        if left < 10:
            late.append(name)
            continue
        rows += run_part(name, min(limit, left), options)
        save("gpu_suite", rows, folder=options.out)
    print(f"{options.out / 'gpu_suite.json'}  {time.perf_counter() - start:.0f} s")
    if late:
        print(f"not started within {options.minutes} minutes: {'; '.join(late)}")
    print(table(rows, COLUMNS))


def _resume(path: Path) -> list[dict]:
    """Rows of the parts that an earlier run on this machine and these versions finished."""
    if not path.is_file():
        return []
    earlier, now = json.loads(path.read_text()), environment()
    same = all(earlier["environment"][k] == now[k] for k in ("commit", "gpu", "torch", "triton"))
    return [row for row in earlier["rows"] if not row.get("unfinished")] if same else []


if __name__ == "__main__":
    main()
