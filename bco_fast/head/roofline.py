"""What a GPU allows the head at most: times derived from its datasheet, for any shape. Nothing here is measured.

    matmul       2NDV FLOP at the card's sustained rate, in whole waves of 128 x 256 tiles over its multiprocessors
    traffic      bytes written and read outside of matmuls at the sustained share of its bandwidth
    launches     10 us for each kernel of a tile

The tiles are those that `tiling.tile_shape` cuts. Sustained: 0.735 of the dense bf16 peak in whole waves and 0.9 of the
bandwidth, what cuBLAS and copies reach on an H100 and an H200 (published: 648 to 709 of 989 TFLOP/s).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..kernels.configs import forward_method, scattered_from
from .tiling import GPU_MOST_COLUMNS, tile_shape

SUSTAINED_FLOPS, SUSTAINED_BYTES = 0.735, 0.9
FUSED_RATE = 0.8  # of cuBLAS, for the kernel that keeps its logits in registers
GATHERED_RATE = (
    0.3  # of cuBLAS, for gathered rows: the lower end of what is published for fused Triton (208 of 690 TFLOP/s)
)
LAUNCH_S = 1e-5
MASS_TILE = 256  # of the triton backend
TILE = 128, 256  # of a bf16 matmul


@dataclass(frozen=True)
class Card:
    """Datasheet numbers: dense bf16 with float32 sums, without sparsity."""

    name: str
    tflops: float
    gb_s: float
    processors: int
    capability: int

    @property
    def flops(self) -> float:
        """Sustained, 1/s, in whole waves."""
        return SUSTAINED_FLOPS * self.tflops * 1e12

    @property
    def bandwidth(self) -> float:
        """Sustained, bytes/s."""
        return SUSTAINED_BYTES * self.gb_s * 1e9

    def measured(self, gflops: float, gb_s: float) -> Card:
        """The card at the rates that its matmuls and copies were seen to reach."""
        return replace(self, tflops=gflops / SUSTAINED_FLOPS / 1e3, gb_s=gb_s / SUSTAINED_BYTES)


CARDS = {
    card.name: card
    for card in (
        Card("A100-40GB", 312, 1555, 108, 80),
        Card("A100", 312, 2039, 108, 80),
        Card("RTX 3090", 71, 936, 82, 86),
        Card("L4", 121, 300, 58, 89),
        Card("L40S", 362, 864, 142, 89),
        Card("RTX 4090", 165, 1008, 128, 89),
        Card("H100", 989, 3350, 132, 90),
        Card("H200", 989, 4800, 132, 90),
        Card("B200", 2250, 8000, 148, 100),
        Card("RTX 5090", 210, 1792, 170, 120),
    )
}


def matmul_s(card: Card, m: int, n: int, k: int) -> float:
    """Seconds of [m, k] @ [k, n]: its tiles come in waves, and the last one is as long as a full one."""
    tiles = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1])
    waves = math.ceil(tiles / card.processors) * card.processors
    return waves * 2 * TILE[0] * TILE[1] * k / card.flops


def derive(
    card: Card, n: int, d: int, v: int, *, workspace_bytes: int = 256 << 20, kept_fraction: float = 0.1
) -> dict[str, float]:
    """Seconds in bf16 of the bare matmul, and of the `triton` backend's passes over N = n tokens.

    Returns:
        matmul: hidden @ weight.T, with its logits never written.
        forward: no gradient.
        frozen: forward and backward, d hidden only.
        trainable: forward and backward, d hidden and d weight.
        sparse: trainable, with `kept_fraction` of the blocks in the backward.
    """
    logits, state = n * v, 4 * n * d  # numbers; bytes of [N, D] in float32
    whole = {"adds_in_place": True, "most_columns": GPU_MOST_COLUMNS}

    def cut(*, product: bool, sums: bool) -> tuple[int, int, int]:
        hidden, weight = (torch.empty(rows, d, dtype=torch.bfloat16, device="meta") for rows in (n, v))
        rows, columns = tile_shape(hidden, weight, workspace_bytes, tiles=1, product=product, sums=sums, **whole)
        return rows, columns, math.ceil(n / rows) * math.ceil(v / columns)

    def seconds(tile: tuple[int, int, int], matmuls: float, per_logit: float, sums: float, kernels: int) -> float:
        _, columns, tiles = tile
        traffic = per_logit * logits + sums * state * math.ceil(v / columns)
        return tiles * matmuls + traffic / card.bandwidth + tiles * kernels * LAUNCH_S

    rows, columns, _ = tile = cut(product=False, sums=False)
    folded = seconds(tile, matmul_s(card, rows, columns, d), 4, 0, 2)
    bare = matmul_s(card, n, v, d)
    forward = folded if forward_method(card.capability, 2, d) == "fold" else bare / FUSED_RATE

    rows, columns, _ = tile = cut(product=True, sums=False)
    frozen = seconds(tile, _logits_and_product(card, rows, columns, d), 6, 4, 4)  # sums: rescaled, then added to

    rows, columns, _ = tile = cut(product=True, sums=True)
    three = _logits_and_product(card, rows, columns, d) + matmul_s(card, columns, d, rows)
    trainable = forward + seconds(tile, three, 6, 2, 4) + 2 * v * d / card.bandwidth

    ways = sparse_ways(card, n, d, v, workspace_bytes=workspace_bytes, kept_fraction=kept_fraction)
    sparse = forward + ways["scattered" if kept_fraction >= scattered_from(2, d) else "products"]
    return {"matmul": bare, "forward": forward, "frozen": frozen, "trainable": trainable, "sparse": sparse}


def sparse_ways(
    card: Card, n: int, d: int, v: int, *, workspace_bytes: int = 256 << 20, kept_fraction: float
) -> dict[str, float]:
    """Seconds of a sparse bf16 backward: d hidden from a product of each kept block, or from one matmul over a gradient that
    is zero where no block was kept."""
    tiles = math.ceil(v / MASS_TILE)
    gathered = kept_fraction * 2 * n * d * v / (GATHERED_RATE * card.flops)
    both = 2 * gathered + (40 * n * tiles + 2 * v * d) / card.bandwidth  # what choosing the blocks passes over; dW
    columns = min(workspace_bytes // (2 * n) // MASS_TILE, tiles) * MASS_TILE
    chunks = math.ceil(v / columns)
    return {
        "products": both + gathered + 8 * d * kept_fraction * n * tiles / card.bandwidth,
        # the gradient is set to zero and read; the sums are read and written
        "scattered": both + chunks * matmul_s(card, n, d, columns) + (4 * n * v + 8 * n * d * chunks) / card.bandwidth,
    }


def _logits_and_product(card: Card, rows: int, columns: int, d: int) -> float:
    """Seconds of a tile's logits and of their product with the weight."""
    return matmul_s(card, rows, columns, d) + matmul_s(card, rows, d, columns)
