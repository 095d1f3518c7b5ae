"""Seeded random cases: every output and gradient against 2x plain PyTorch's error + 4 eps, both against float64.

On few numbers plain PyTorch's error is partly luck: with the columns of hidden and weight in another order it leaves
this bound against itself in 14 of 2,000 cases. So the cases outside are counted, printed and limited (1 %); none may
be further out than rounding can explain.
"""

import random

import numpy as np
import pytest
import torch
from heads import OPTIONS, case, errors, excess

BACKENDS = ("torch", "triton", "triton fold")
# Relative error beyond 2x plain PyTorch's that the rounding of logits of +-20 and nearly equal weights explains; the
# most that was seen is 2.2e-5.
FURTHEST = 5e-5


def _fuzz(seed: int) -> tuple[dict, str, dict]:
    """Arguments of `case`, dtype, arguments of `check`."""
    rng = random.Random(seed)  # noqa: S311
    shape = {
        "n": rng.choice((1, 2, 63, 64, 65, 127, 128, 129, rng.randint(1, 129))),
        "v": rng.choice((1, 2, 31, 255, 256, 257, 1000, 1100, rng.randint(1, 1100))),
        "d": rng.choice((1, 8, 64, 65, 127, 128, 129, 130, rng.randint(1, 130))),
    }
    made = {
        "seed": seed,
        "spread": rng.choice((0.1, 1.0, 3.0, 8.0)),
        "center": rng.choice((0.0, 0.0, 20.0, -20.0)) if shape["d"] > 1 else 0.0,
        "bias": rng.random() < 0.3,
        "ignored": rng.choice((0.0, 0.2, 0.9)),
        "zeros": rng.choice((0.0, 0.2, 0.9)),
        "entropy": rng.random() < 0.3,
        "options": rng.choice(list(OPTIONS)),
    }
    dtype = rng.choice((torch.float32, torch.float32, torch.float16))
    frozen = rng.choice(((), (), ("weight", "bias"), ("hidden",)))
    extra = {"frozen": frozen, "workspace_bytes": rng.choice((32 << 10, 200_000, 1 << 20, 64 << 20))}
    return shape | made, dtype, extra


def _check(seeds, backend, most_outside: int, record_property) -> None:
    ratios, outside, wrong = [], [], []
    for seed in seeds:
        made, dtype, extra = _fuzz(seed)
        found = errors(case(**made), backend, dtype, **extra)
        worst = [excess(*pair, dtype) for pair in found.values()]
        ratios += worst
        if max(worst) > 2:
            outside.append(seed)
        for name, (error, allowed) in found.items():
            if not error <= 2 * allowed + FURTHEST:
                wrong.append(f"seed {seed} {made} {dtype} {extra}: {name}: {error:.2e}, plain PyTorch {allowed:.2e}")
    quantiles = f"p50 {np.median(ratios):.2f}, p99 {np.quantile(ratios, 0.99):.2f}, max {max(ratios):.2f}"
    outcome = f"outside 2x: {len(outside)} of {len(seeds)} cases"
    record_property("figure", f"{backend}: error beyond 4 eps over plain PyTorch's {quantiles}; {outcome}")
    assert not wrong, wrong[:3]
    assert len(outside) <= most_outside, outside


@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend, record_property):
    _check(range(60 if backend == "torch" else 20), backend, 1, record_property)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz_many(backend, record_property):
    """Triton's interpreter takes ten times as long as the `torch` backend."""
    cases = 2000 if backend == "torch" else 400
    _check(range(cases), backend, cases // 100, record_property)
