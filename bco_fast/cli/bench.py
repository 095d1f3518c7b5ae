"""`bco-fast bench`: what the fused head saves on this machine, at the sizes of a given model, in about ten seconds.

`--derive H200` prints what a card's datasheet allows instead; nothing is measured then.

Forward and backward of the lm-head on random hidden states, alternating with plain PyTorch that stores the logits. Only
the model's config is read; no weights are loaded.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..head.linear_logps import fused_linear_logps
from ..head.roofline import CARDS, derive
from .common import Parser, UsageError, nearest, usage_errors

TURNS = 3
FEWEST_TOKENS, MOST_TOKENS = 64, 1024
DERIVED_TOKENS = 8192
MEMORY_SHARE = 0.4  # of the free memory, for the logits of plain PyTorch
LOGITS_COPIES = 4  # [tokens, vocabulary] float32 tensors that it holds at once


@dataclass(frozen=True)
class HeadSize:
    """Sizes of an lm-head, and the softcap of its logits."""

    name: str
    hidden: int
    vocabulary: int
    softcap: float | None = None


def head_size(model: str) -> HeadSize:
    """From the config of a model, a folder or a name on the Hub. Raises OSError or ValueError if it tells no sizes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    sizes = [getattr(config, field, None) for field in ("hidden_size", "vocab_size")]
    if None in sizes:
        raise ValueError(f"the config of {model} has no hidden_size and vocab_size: give --hidden and --vocab")
    return HeadSize(model, *sizes, getattr(config, "final_logit_softcapping", None))


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None) -> Tensor:
    """log_softmax of stored logits: [N] out of [N, V]."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def compare(
    size: HeadSize,
    *,
    tokens: int | None = None,
    seconds: float = 10.0,
    dtype: torch.dtype | None = None,
) -> dict:
    """Time and memory of both, with a frozen and with a trained head.

    Args:
        tokens: completion tokens in the batch. Default: 1024, or fewer where `seconds` or free memory do not allow it.
        seconds: for all measurements together, approximately.
        dtype: default: bfloat16 on a GPU, float32 on the CPU.

    Returns:
        device, threads, dtype, tokens, hidden, vocabulary, and for each of `frozen` and `trained` a dict with `plain_s`,
        `ours_s` (median seconds), `plain_mb`, `ours_mb` (peak beyond the inputs, with gradients; None if not measurable).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(size.vocabulary, size.hidden, generator=g, device=device, dtype=dtype) / size.hidden**0.5

    def inputs(n: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(n, size.hidden, generator=g, device=device, dtype=dtype)
        return hidden, torch.randint(0, size.vocabulary, (n,), generator=g, device=device)

    def step(ours: bool, trained: bool, hidden: Tensor, targets: Tensor) -> list:
        hidden, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        logps = fused_linear_logps if ours else plain_logps
        logps(hidden, head, targets, softcap=size.softcap).mean().backward()
        return [hidden.grad, head.grad]

    if tokens is None:
        tokens = _affordable_tokens(lambda n: step(False, True, *inputs(n)), size, seconds, device)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "hidden": size.hidden,
        "vocabulary": size.vocabulary,
    }
    hidden, targets = inputs(tokens)
    for mode, trained in (("frozen", False), ("trained", True)):
        cases = {
            name: functools.partial(step, ours, trained, hidden, targets)
            for name, ours in (("plain", False), ("ours", True))
        }
        memory = {name: _extra_mb(case, device) for name, case in cases.items()}  # its first call warms up
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(TURNS):
            for name, case in cases.items():
                times[name].append(_seconds(case, device))
        found[mode] = {f"{name}_s": float(f"{statistics.median(t):.4g}") for name, t in times.items()}
        found[mode] |= {f"{name}_mb": mb for name, mb in memory.items()}
    return found


def _affordable_tokens(step: Callable, size: HeadSize, seconds: float, device: str) -> int:
    step(FEWEST_TOKENS)
    one = _seconds(lambda: step(FEWEST_TOKENS), device) / FEWEST_TOKENS
    by_time = seconds / (one * 2 * 2 * (TURNS + 1))  # two modes, two implementations
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _free_memory()
    by_memory = MEMORY_SHARE * free / (LOGITS_COPIES * 4 * size.vocabulary)
    return max(FEWEST_TOKENS, min(MOST_TOKENS, int(min(by_time, by_memory)) // 64 * 64))


def _free_memory() -> float:
    """Bytes; 4e9 if the system does not tell."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 4e9
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _seconds(case: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    case()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _extra_mb(case: Callable, device: str) -> float | None:
    """Peak memory of one call, beyond the memory in use before; None on a CPU without Linux."""
    case()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # else this call reuses, uncounted, what the previous one freed
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    kept = case()
    extra = _resident("VmHWM") - before
    del kept
    return round(extra / 1e6, 1)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def describe(found: dict, size: HeadSize) -> str:
    """A short table, and the logits of a larger batch."""
    lines = [
        f"{size.name}: hidden {size.hidden}, vocabulary {size.vocabulary}; {found['tokens']} completion tokens, "
        f"{found['dtype']}, {found['device']}",
        f"{'lm-head, forward and backward':31}{'PyTorch':>20}{'bco_fast':>20}{'time':>8}{'memory':>8}",
    ]
    for mode, label in (("frozen", "frozen (LoRA)"), ("trained", "trained, its gradient included")):
        row = found[mode]
        cells = [_cell(row["plain_s"], row["plain_mb"]), _cell(row["ours_s"], row["ours_mb"])]
        time_ratio = f"{row['ours_s'] / row['plain_s']:.2f}x"
        known = row["plain_mb"] and row["ours_mb"] is not None
        memory_ratio = f"{row['ours_mb'] / row['plain_mb']:.2f}x" if known else "-"
        lines.append(f"{label:31}{cells[0]:>20}{cells[1]:>20}{time_ratio:>8}{memory_ratio:>8}")
    per_token = 4 * size.vocabulary
    lines.append(
        f"A token's logits are {per_token / 1e6:.2f} MB in float32: a batch of 16384 completion tokens would store "
        f"{16384 * per_token / 1e9:.1f} GB, more than once. bco_fast holds a workspace of fixed size instead."
    )
    return "\n".join(lines)


def _cell(seconds: float, mb: float | None) -> str:
    return f"{seconds:.3g} s" + ("" if mb is None else f", {mb:.0f} MB")


def derived(card_name: str, size: HeadSize, tokens: int) -> dict:
    """Seconds that `head.roofline` allows a card, printed as a table."""
    known = {name.lower(): card for name, card in CARDS.items()}
    if card_name.lower() not in known:
        raise UsageError(f"--derive {card_name}: known cards are {', '.join(CARDS)}{nearest(card_name, CARDS)}")
    card = known[card_name.lower()]
    found = derive(card, tokens, size.hidden, size.vocabulary)
    print(
        f"derived, not measured: {card.name}, bfloat16, {tokens} completion tokens, hidden {size.hidden}, vocabulary "
        f"{size.vocabulary}"
    )
    labels = {
        "matmul": "hidden @ weight.T alone",
        "forward": "no gradient",
        "frozen": "frozen (LoRA), forward and backward",
        "trainable": "trained, forward and backward",
        "sparse": "trained, a tenth of the blocks kept",
    }
    for name, label in labels.items():
        print(f"{label:38}{1e3 * found[name]:9.1f} ms{found[name] / found['matmul']:8.2f} matmuls")
    return {"card": card.name, "tokens": tokens, **{f"{name}_s": seconds for name, seconds in found.items()}}


def bench(arguments: list[str]) -> dict:
    parser = Parser(prog="bco-fast bench", description="The fused lm-head against plain PyTorch on this machine.")
    parser.add_argument("--model", help="folder or Hub name; only its config is read (default: Qwen2.5-0.5B's sizes)")
    parser.add_argument("--hidden", type=int, help="hidden size, without --model (default: 896)")
    parser.add_argument("--vocab", type=int, help="vocabulary size, without --model (default: 151936)")
    parser.add_argument(
        "--tokens",
        type=int,
        help="completion tokens of a batch (default: 1024, or what the time allows; 8192 with --derive)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of all measurements, approximately")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--derive", metavar="CARD", help="times that this card's datasheet allows, such as H200; runs nothing"
    )
    options = parser.parse_args(arguments)
    if options.derive is not None and options.dtype not in (None, "bfloat16"):
        raise UsageError(f"--derive knows bfloat16 only, not --dtype {options.dtype}")
    if options.model is not None and (options.hidden or options.vocab):
        raise UsageError("--hidden and --vocab cannot be combined with --model")
    for flag in ("hidden", "vocab", "tokens", "seconds"):
        value = getattr(options, flag)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{flag} must be > 0, not {value}")
    if options.model is not None:
        with usage_errors(OSError, ValueError, ImportError, prefix=f"--model {options.model}: "):
            size = head_size(options.model)
    else:
        name = "the given sizes" if options.hidden or options.vocab else "Qwen2.5-0.5B"
        size = HeadSize(name, options.hidden or 896, options.vocab or 151936)
    if options.derive is not None:
        return derived(options.derive, size, options.tokens or DERIVED_TOKENS)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    found = compare(size, tokens=options.tokens, seconds=options.seconds, dtype=dtype)
    print(describe(found, size))
    return found
