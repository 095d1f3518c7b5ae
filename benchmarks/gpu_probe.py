"""The numbers that decide how the head is cut on a GPU, within 90 seconds: run this first.

    python benchmarks/gpu_probe.py --out DIR      DIR/gpu_probe.json and a table
    python benchmarks/gpu_probe.py --out DIR --tiny      the same program, small, on the CPU

matmul     hidden @ W.T, dz @ W added to a float32 sum, and dz.T @ hidden, for widths of a chunk that are odd, even, and
           multiples of 128 and 512 columns: cuBLAS has no kernel for unaligned bf16 rows
kernels    bytes/s of the kernels that fold a tile into the statistics and turn it into its gradient
choice     milliseconds to choose the blocks of a sparse backward
bias       mean error of log-probabilities in nats: tensor cores truncate, so the error of a token has a sign
frozen     a frozen head with tall tiles (8192 x 5120) and with wide ones (2048 x 16384, as many columns as a row kernel holds)
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from unittest import mock

import torch
from common import interleaved, save, summary, table
from contenders import Head

WIDTHS = (5461, 5460, 5376, 5120)
FROZEN = ((8192, 5120), (2048, 16384))
SHAPE, TINY = (8192, 4096, 128256, None), (64, 48, 1000, None)  # N, D, V, softcap


def milliseconds(cases: dict, cuda: bool) -> dict[str, float]:
    return {name: 1e3 * summary(s)["median_s"] for name, s in interleaved(cases, 7 if cuda else 1, cuda=cuda).items()}


def matmul_rows(head: Head, widths: tuple, cuda: bool) -> list[dict]:
    from bco_fast.head.backends.products import add_matmul, matmul, operand

    hidden, weight, rows = operand(head.hidden, head.hidden.dtype), operand(head.weight, head.weight.dtype), []
    n, d = hidden.shape
    total = torch.zeros(n, d, device=hidden.device)
    for width in widths:
        chunk = weight[:width]
        tile = torch.empty(n, width, device=hidden.device)
        dz = torch.randn(n, width, device=hidden.device).to(hidden.dtype)
        cases = {
            "mm": functools.partial(matmul, hidden, chunk.T, tile),
            "addmm": functools.partial(add_matmul, total, dz, chunk),
            "dz.T": functools.partial(matmul, dz.T, hidden),
        }
        for name, ms in milliseconds(cases, cuda).items():
            tflops = 2 * n * d * width / max(ms, 1e-6) / 1e9
            rows.append({"part": "matmul", "case": f"{name}, C = {width}", "ms": ms, "tflops": tflops})
    return rows


def kernel_rows(head: Head, width: int, name: str, cuda: bool) -> list[dict]:
    """The row kernels on one tile: bytes that they must move, over their time."""
    from bco_fast.head.backends.walk import Memory, Statistics
    from bco_fast.head.dispatch import load_backend
    from bco_fast.head.types import HeadInputs, HeadSaved, HeadSpec, HeadWant

    backend, n = load_backend(name), len(head.hidden)
    inputs = HeadInputs(head.hidden, head.weight, head.targets, None, HeadSpec())
    z = (head.hidden.float() @ head.weight[:width].float().T).contiguous()
    seen, memory = Statistics(inputs, HeadWant(), backend.MASS_TILE), Memory(head.hidden, width)
    everything, columns = slice(0, n), slice(0, width)
    out = torch.empty(n, width, device=z.device, dtype=head.hidden.dtype)
    zeros = torch.zeros(n, device=z.device)
    saved = HeadSaved(inputs, zeros - 9, zeros + 9, zeros + 1e4, None, torch.full_like(head.targets, -1))
    cases = {
        "fold": lambda: backend._fold(seen, z, None, everything, columns, memory),
        "dlogits": lambda: backend._dlogits(head.upstream, None, saved, z, out, everything, columns, memory),
    }
    moved = {"fold": z.nbytes, "dlogits": z.nbytes + out.nbytes}
    found = milliseconds(cases, cuda)
    return [
        {"part": "kernels", "case": f"{name}, C = {width}", "ms": ms, "gb_s": moved[name] / max(ms, 1e-6) / 1e6}
        for name, ms in found.items()
    ]


def choice_rows(head: Head, name: str, cuda: bool) -> list[dict]:
    from bco_fast.head.dispatch import load_backend
    from bco_fast.head.sparse.choose import choose_blocks
    from bco_fast.head.types import HeadInputs, HeadSaved, HeadSpec, HeadWant

    backend = load_backend(name)
    inputs = HeadInputs(head.hidden, head.weight, head.targets, None, HeadSpec())
    seen = backend.forward(inputs, HeadWant(mass=True), head.workspace_bytes)
    saved = HeadSaved(inputs, seen.logps, seen.row_max, seen.row_sum, None, seen.row_argmax, seen.mass)
    how = {"width": backend.MASS_TILE, "sharded": False, "break_even": 1.1, "workspace_bytes": head.workspace_bytes}
    choose = functools.partial(choose_blocks, head.upstream, saved, 2.0**-7, **how)
    (ms,) = milliseconds({"choice": choose}, cuda).values()
    return [
        {"part": "choice", "case": "blocks of a sparse backward", "ms": ms, "kept_fraction": choose().kept_fraction}
    ]


def bias_rows(head: Head, rows: int, backend: str) -> list[dict]:
    from contenders import ours, plain

    exact = head.exact(rows, block=256)
    methods = ("fold", "fused") if backend == "triton" else (None,)
    calls = {method or backend: ours(head, backend=backend, method=method) for method in methods}
    calls["PyTorch"] = plain(head)
    found = []
    for name, logps in calls.items():
        error = head.step(logps, "forward", rows=slice(rows))["logps"].double() - exact
        numbers = {"bias_nats": float(error.mean()), "rms_nats": float(error.square().mean().sqrt())}
        found.append({"part": "bias", "case": name, **numbers, "of_4096_tokens_nats": 4096 * float(error.mean())})
    return found


def frozen_rows(head: Head, tiles: tuple, backend: str, cuda: bool) -> list[dict]:
    from contenders import ours

    from bco_fast.head.backends import walk

    def cut(tile: tuple[int, int]):
        with mock.patch.object(walk, "tile_shape", return_value=tile):
            head.step(ours(head, backend=backend), "frozen")

    cases = {f"{tile[0]} x {tile[1]}": functools.partial(cut, tile) for tile in tiles}
    return [{"part": "frozen", "case": name, "ms": ms} for name, ms in milliseconds(cases, cuda).items()]


def parts(tiny: bool, backend: str) -> dict:
    """name -> what gives its rows, most valuable first."""
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    flat = functools.cache(lambda: Head(TINY if tiny else SHAPE, device, dtype))
    peaked = functools.cache(lambda: Head(TINY if tiny else SHAPE, device, dtype, logits="peaked"))
    widths, tiles, cuda = ((61, 60, 56, 48), ((64, 96), (16, 384)), False) if tiny else (WIDTHS, FROZEN, True)
    return {
        "matmul": lambda: matmul_rows(flat(), widths, cuda),
        "kernels": lambda: kernel_rows(flat(), widths[-1], backend, cuda),
        "frozen": lambda: frozen_rows(flat(), tiles, backend, cuda),
        "bias": lambda: bias_rows(flat(), 64 if tiny else 4096, backend),
        "choice": lambda: choice_rows(peaked(), backend, cuda),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: keeps this program alive")
    parser.add_argument("--seconds", type=float, default=80.0, help="no part is started after this long")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny runs the same program on the CPU")
    start, rows = time.perf_counter(), []
    for name, work in parts(options.tiny, "torch" if options.tiny else "triton").items():
        if time.perf_counter() - start > options.seconds:
            rows.append({"part": name, "case": "-", "error": f"not started within {options.seconds:g} s"})
            continue
        try:
            rows += work()
        except Exception as error:  # one part may not cost the others their minutes
            rows.append({"part": name, "case": "-", "error": f"{type(error).__name__}: {str(error)[:200]}"})
        save("gpu_probe", rows, folder=options.out)
    print(f"{options.out / 'gpu_probe.json'}  {time.perf_counter() - start:.0f} s")
    columns = ["part", "case", "ms", "tflops", "gb_s", "bias_nats", "rms_nats", "of_4096_tokens_nats", "kept_fraction"]
    print(table(rows, [*columns, "error"]))


if __name__ == "__main__":
    main()
