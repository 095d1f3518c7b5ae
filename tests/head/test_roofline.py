"""Derived times follow the shape and the card, and are those that the kernels were planned with."""

import pytest
import torch

from bco_fast.cli.bench import bench
from bco_fast.cli.common import UsageError
from bco_fast.head.dispatch import load_sparse
from bco_fast.head.roofline import CARDS, Card, derive, matmul_s, sparse_ways
from bco_fast.kernels.configs import scattered_from

PLANNED = {"forward": 13.7e-3, "frozen": 28e-3, "trainable": 57e-3, "sparse": 35e-3}
"""On an H200 with 8192 tokens of an 8B Llama, from the plan of the kernels, another count than the module's."""


def test_the_h200_is_as_planned():
    found = derive(CARDS["H200"], 8192, 4096, 128256)
    for name, seconds in PLANNED.items():
        assert found[name] == pytest.approx(seconds, rel=0.2 if name == "sparse" else 0.05), name
    assert found["matmul"] < found["forward"] < found["frozen"] < found["trainable"]


@pytest.mark.parametrize("name", CARDS)
def test_no_pass_beats_its_matmuls_and_none_takes_four_times_as_long(name):
    card = CARDS[name]
    for n, d, v in ((8192, 4096, 151936), (32768, 896, 151936), (4096, 2304, 256000)):
        found = derive(card, n, d, v)
        bare = 2 * n * d * v / card.flops
        for which, matmuls in (("matmul", 1), ("forward", 1), ("frozen", 2), ("trainable", 4)):
            assert matmuls * bare <= found[which] <= 4 * matmuls * bare, which
        assert derive(card, n, d, v, kept_fraction=0.3)["sparse"] > found["sparse"]


@pytest.mark.parametrize("name", ["A100", "H100", "H200", "B200"])
@pytest.mark.parametrize("shape", [(8192, 4096, 128256), (8192, 4096, 151936), (8192, 2304, 256000)], ids=str)
def test_the_shares_at_which_a_sparse_backward_changes_its_way_are_derived(name, shape):
    """What is taken costs at most 15 % more than the fastest way."""
    dense = derive(CARDS[name], *shape)
    dense = dense["trainable"] - dense["forward"]
    break_even = load_sparse("triton").break_even(torch.bfloat16)
    for share in (percent / 100 for percent in range(1, 60)):
        ways = sparse_ways(CARDS[name], *shape, kept_fraction=share) | {"dense": dense}
        sparse = "scattered" if share >= scattered_from(2, shape[1]) else "products"
        assert ways["dense" if share >= break_even else sparse] <= 1.15 * min(ways.values()), (share, ways)


def test_waves_are_whole():
    card = Card("one wave", 1.0, 1.0, 132, 90)
    assert matmul_s(card, 128 * 132, 256, 64) == pytest.approx(2 * 128 * 132 * 256 * 64 / card.flops)
    assert matmul_s(card, 128 * 133, 256, 64) == pytest.approx(2 * matmul_s(card, 128 * 132, 256, 64))
    assert card.measured(700.0, 4000.0).flops == pytest.approx(7e11)
    assert card.measured(700.0, 4000.0).bandwidth == pytest.approx(4e12)


def test_the_command_prints_them(capsys):
    found = bench(["--derive", "h200", "--hidden", "4096", "--vocab", "128256", "--tokens", "8192"])
    shown = capsys.readouterr().out
    assert "derived, not measured: H200" in shown
    for name, seconds in derive(CARDS["H200"], 8192, 4096, 128256).items():
        assert found[f"{name}_s"] == seconds
        assert f"{1e3 * seconds:.1f} ms" in shown
    with pytest.raises(UsageError, match=r"--derive H20: known cards are .*did you mean 'H200'"):
        bench(["--derive", "H20"])
    with pytest.raises(UsageError, match="--derive knows bfloat16 only"):
        bench(["--derive", "H200", "--dtype", "float32"])
