"""FLOPs and bytes, counted in the open, and what this machine can do at most: the measure of every share of a limit.

A multiply-add is two FLOP. "Useful" is what any implementation must do: the matmuls of an operator that keeps its
logits. Recomputing them costs more FLOP and earns no share, so the shares of all contenders can be compared.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch
from common import interleaved


@dataclass(frozen=True)
class Model:
    """Sizes of a published model's config.json."""

    D: int
    V: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    softcap: float | None = None  # of the logits
    tied: bool = False  # the lm-head is the embedding

    def scaled(self, by: int) -> Model:
        """D and V divided, for a machine that is that much smaller."""
        return replace(self, D=self.D // by, V=self.V // by)

    def parameters(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.D * (2 * q + 2 * kv) + 3 * self.D * self.intermediate + 2 * self.D
        return self.layers * layer + self.D + self.V * self.D * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Of adapters on every linear layer but the head."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ends = 2 * (self.D + q) + 2 * (self.D + kv) + 3 * (self.D + self.intermediate)
        return self.layers * rank * ends


MODELS = {
    "Qwen2.5-0.5B": Model(896, 151936, 24, 14, 2, 64, 4864, tied=True),
    "Llama-3.2-1B": Model(2048, 128256, 16, 32, 8, 64, 8192, tied=True),
    "Gemma-2-2B": Model(2304, 256000, 26, 8, 4, 256, 9216, softcap=30.0, tied=True),
    "Gemma-2-9B": Model(3584, 256000, 42, 16, 8, 256, 14336, softcap=30.0, tied=True),
    "Llama-3.2-3B": Model(3072, 128256, 28, 24, 8, 128, 8192, tied=True),
    "Llama-3-8B": Model(4096, 128256, 32, 32, 8, 128, 14336),
    "Qwen3-8B": Model(4096, 151936, 36, 32, 8, 128, 12288),
    "Qwen3-14B": Model(5120, 151936, 40, 40, 8, 128, 17408),
    "Mistral-7B": Model(4096, 32768, 32, 32, 8, 128, 14336),
}

USEFUL_MATMULS = {"forward": 1, "frozen": 2, "trainable": 3}  # of 2NDV FLOP each: logits, d hidden, d weight
OUR_MATMULS = {"forward": 1, "frozen": 2, "trainable": 4}  # a trainable head computes its logits twice


def head_flops(mode: str, n: int, d: int, v: int, *, matmuls: dict[str, int] = USEFUL_MATMULS) -> int:
    return matmuls[mode] * 2 * n * d * v


def head_bytes(mode: str, n: int, d: int, v: int, item: int) -> int:
    """Least traffic: operands read and results written once, no logits."""
    results = {"forward": 0, "frozen": n * d, "trainable": n * d + v * d}[mode]
    return item * (n * d + v * d + results) + 12 * n  # targets in, log-probabilities out


def measured_limits(device: str, dtype: torch.dtype, *, size: int | None = None, repeats: int = 7) -> dict[str, float]:
    """The fastest of a few square matmuls, FLOP/s, and copies, bytes/s read and written, of this machine, now."""
    cuda = device == "cuda"
    copied = (1 << 30 if cuda else 1 << 28) if size is None else 16 * size**2
    size = size or (8192 if cuda else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(copied // dtype.itemsize, device=device, dtype=dtype).fill_(1)
    target = torch.empty_like(source)
    out = torch.empty_like(a)

    def seconds(work) -> float:
        return min(interleaved({"work": work}, repeats, cuda=cuda)["work"])

    return {
        "limit_gflops": round(2 * size**3 / seconds(lambda: torch.mm(a, b, out=out)) / 1e9, 1),
        "limit_gb_s": round(2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9, 2),
    }


def share_of_limit(flops: float, bytes_: float, seconds: float, limits: dict[str, float]) -> float:
    """Time that the measured limits allow for this work, over the time it took; at most about 1."""
    least = max(flops / (limits["limit_gflops"] * 1e9), bytes_ / (limits["limit_gb_s"] * 1e9))
    return round(least / seconds, 3)


def slope(x: list[float], y: list[float]) -> float:
    """Exponent p of the least-squares fit y ~ x^p."""
    from math import log

    return statistics.linear_regression([log(v) for v in x], [log(v) for v in y]).slope
