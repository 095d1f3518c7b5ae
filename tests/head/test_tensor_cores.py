"""What tensor cores' rounding does to log-probabilities, by a model of it: no CPU rounds that way."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tensor_cores as cores


def test_bf16_is_torchs():
    import torch

    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.array_equal(cores.bf16(x), torch.from_numpy(x).bfloat16().double().numpy())


@pytest.mark.parametrize("name", ["Ampere, Ada", "Hopper"])
def test_sums_are_cut_towards_zero_by_less_than_the_bits_allow(name):
    g = np.random.default_rng(0)
    a, b = np.abs(cores.bf16(g.standard_normal((8, 256)))), np.abs(cores.bf16(g.standard_normal((256, 8))))
    rounding, exact = cores.CARDS[name], a @ b
    error = (cores.matmul(a, b, rounding) - exact) / exact
    assert (error < 0).all()
    steps = 256 / rounding.products
    assert -error.min() <= steps * (2.0**-23 + (rounding.products + 1) * 2.0 ** -(23 + rounding.extra))
    assert np.array_equal(cores.matmul(-a, b, rounding), -cores.matmul(a, b, rounding))


def test_chains_are_joined_in_float32():
    g = np.random.default_rng(0)
    a, b = cores.bf16(g.standard_normal((4, 256))), cores.bf16(g.standard_normal((256, 4)))
    hopper = cores.CARDS["Hopper"]
    halves = [cores.matmul(a[:, part], b[part], hopper) for part in (slice(128), slice(128, None))]
    joined = (halves[0] + halves[1]).astype(np.float32).astype(np.float64)
    assert np.array_equal(cores.matmul(a, b, hopper, chain=128), joined)


@pytest.mark.parametrize("name", ["Ampere, Ada", "Hopper"])
def test_the_bias_is_of_unlikely_tokens_and_cancels_in_log_ratios(name):
    """Logits shrink towards 0, so the normaliser falls: an unlikely token seems likelier, in policy and reference alike."""
    unlikely, likely = (cores.errors(cores.CARDS[name], 16, 512, 256, likely=kind) for kind in (False, True))
    exact = cores.errors(cores.CARDS["fma"], 16, 512, 256, likely=False)
    assert unlikely.policy[0] > 4 * abs(exact.policy[0]) + 1e-6
    assert abs(likely.policy[0]) < unlikely.policy[0] / 4
    assert abs(unlikely.log_ratio[0]) < unlikely.policy[0] / 4
