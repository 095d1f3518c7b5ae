"""How tensor cores round, modelled in NumPy, and what that does to log-probabilities: no GPU is measured here.

    python benchmarks/tensor_cores.py      results/tensor_cores.json

A matrix instruction adds a block of products to its accumulator. It shifts all terms to the largest exponent among them,
keeps `extra` bits beyond float32's 23, and cuts off the rest; the sum is cut to float32. Everything is rounded towards zero,
so errors have a sign and add up. Blocks and bits as published for bf16 and fp16 inputs (arXiv 2512.07004, 2603.20421):
Ampere and Ada 8 products and 1 bit, Hopper 16 products and 2 bits. `fma` is a processor that rounds each step to nearest.

Our kernels and cuBLAS add the D products of a logit in one chain of such instructions, the accumulator staying in
registers; which tile a logit belongs to does not matter. A product with the weights ([rows, columns] @ [columns, D]) is one
chain for each chunk of columns, and the chunks are added in float32, rounded to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rounding(NamedTuple):
    products: int  # of a block
    extra: int | None  # bits kept beyond float32's; None: the exact sum, rounded to nearest


CARDS = {"fma": Rounding(1, None), "Ampere, Ada": Rounding(8, 1), "Hopper": Rounding(16, 2)}


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def _cut(x: np.ndarray, exponent: np.ndarray, bits: int) -> np.ndarray:
    """x towards zero to multiples of 2^(exponent - bits)."""
    unit = np.ldexp(1.0, exponent - bits)
    return np.trunc(x / unit) * unit


def matmul(a: np.ndarray, b: np.ndarray, rounding: Rounding, chain: int | None = None) -> np.ndarray:
    """a [M, K] @ b [K, L] of bf16 numbers held in float64 -> float32 numbers held in float64.

    Args:
        chain: products that one accumulator takes; the sums of the chains are added in float32. Default: all.
    """
    total = np.zeros((len(a), b.shape[1]))
    for first in range(0, a.shape[1], chain or a.shape[1]):
        last = min(first + (chain or a.shape[1]), a.shape[1])
        sums = np.zeros_like(total)
        for k in range(first, last, rounding.products):
            terms = a[:, k : min(k + rounding.products, last), None] * b[None, k : min(k + rounding.products, last)]
            if rounding.extra is None:
                sums = (sums + terms.sum(1)).astype(np.float32).astype(np.float64)
                continue
            largest = np.maximum(np.abs(terms).max(1), np.abs(sums))
            exponent = np.frexp(largest)[1] - 1
            cut = _cut(terms, exponent[:, None], 23 + rounding.extra).sum(1)
            sums = cut + _cut(sums, exponent, 23 + rounding.extra)
            sums = _cut(sums, np.frexp(sums)[1] - 1, 23)
        total = (total + sums).astype(np.float32).astype(np.float64)
    return total


def logps(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[N] out of [N, V], in float64: only the matmul's rounding counts."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted[np.arange(len(targets)), targets] - np.log(np.exp(shifted).sum(1))


class Errors(NamedTuple):
    """Nats a token, against exact products: mean and root mean square."""

    policy: tuple[float, float]
    log_ratio: tuple[float, float]


def errors(rounding: Rounding, n: int, d: int, v: int, *, likely: bool, change: float = 0.1, seed: int = 0) -> Errors:
    """Of log-probabilities, and of policy minus reference.

    Args:
        likely: targets are drawn from the model, as completions are; else from all tokens alike.
        change: of a policy's hidden state, relative to the reference's.
    """
    g = np.random.default_rng(seed)
    weight = bf16(g.standard_normal((v, d)) * (3 / d**0.5)).T
    hidden = g.standard_normal((n, d))
    moved = hidden + change * g.standard_normal((n, d))
    reference, policy = bf16(hidden), bf16(moved)
    exact = [policy @ weight, reference @ weight]
    drawn = (exact[1] + g.gumbel(size=(n, v))).argmax(1)
    targets = drawn if likely else g.integers(0, v, n)
    found = [logps(matmul(h, weight, rounding), targets) - logps(z, targets) for h, z in zip((policy, reference), exact, strict=True)]  # fmt: skip
    return Errors(*((float(e.mean()), float(np.sqrt((e**2).mean()))) for e in (found[0], found[0] - found[1])))


def main() -> None:
    from common import save, table

    rows = []
    for name, rounding in CARDS.items():
        for likely in (False, True):
            found = errors(rounding, 64, 4096, 1024, likely=likely)
            row = {"case": f"{name}, {'likely' if likely else 'random'} targets", "N": 64, "D": 4096, "V": 1024}
            row |= {"bias": found.policy[0], "rms": found.policy[1]}
            row |= {"log_ratio_bias": found.log_ratio[0], "log_ratio_rms": found.log_ratio[1]}
            rows.append({name: float(f"{x:.3g}") if isinstance(x, float) else x for name, x in row.items()})
    print(save("tensor_cores", rows))
    print(table(rows, ["case", "bias", "rms", "log_ratio_bias", "log_ratio_rms"]))


if __name__ == "__main__":
    main()
