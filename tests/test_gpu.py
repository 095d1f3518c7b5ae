"""On a GPU (`pytest -m gpu`): the kernels as compiled, at sizes near real ones."""

import pytest
import torch
from heads import OPTIONS, case, check, run

from bco_fast import fused_linear_logps

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(1, 2, 8), (129, 1100, 257), (300, 50257, 896), (512, 32000, 2304)], ids=str)
def test_numerics(backend, dtype, n, v, d):
    check(case(n, v, d), backend, dtype, device="cuda")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_bias_and_entropy(backend, options):
    check(case(200, 5000, 320, bias=True, entropy=True, options=options), backend, torch.bfloat16, device="cuda")


@pytest.mark.parametrize("options", OPTIONS)
def test_frozen_head(options):
    check(case(200, 5000, 320, options=options), "torch", torch.bfloat16, device="cuda", frozen=("weight",))
    check(case(200, 5000, 320, options=options), "triton", torch.bfloat16, device="cuda", frozen=("weight",))


def test_the_same_bits_every_time():
    c = case(1000, 20000, 512)
    first = run(c, "triton", torch.bfloat16, device="cuda")
    for _ in range(10):
        again = run(c, "triton", torch.bfloat16, device="cuda")
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_weights_past_two_to_the_31_elements():
    v, d = 270_000, 8192
    assert v * d > 2**31
    hidden = torch.randn(4, d, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) * 0.01
    targets = torch.tensor([0, 1, v - 2, v - 1], device="cuda")
    logps = fused_linear_logps(hidden, weight, targets, backend="triton")
    expected = torch.log_softmax(hidden.float() @ weight.float().T, -1)[torch.arange(4), targets.cpu()]
    assert torch.allclose(logps, expected, atol=1e-3)


def test_memory_is_bounded_by_the_workspace():
    n, v, d, workspace = 8192, 128_256, 1024, 64 << 20
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(v, d, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    targets = torch.randint(0, v, (n,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_logps(hidden, weight, targets, backend="triton", workspace_bytes=workspace).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = weight.numel() * 2 + hidden.numel() * 2
    # dh in float32 and its partial product, one dW slice in float32
    assert extra < gradients + workspace + 2 * n * d * 4 + 4096 * d * 4 + (8 << 20)


def test_a_foreign_target_is_nan_and_its_neighbours_are_not():
    hidden, weight = torch.randn(4, 64, device="cuda"), torch.randn(1000, 64, device="cuda")
    targets = torch.tensor([3, 1000, -5, 2**40], device="cuda")
    assert fused_linear_logps(hidden, weight, targets).isnan().tolist() == [False, True, True, True]


def test_auto_is_triton():
    assert fused_linear_logps(torch.randn(2, 8, device="cuda"), torch.randn(9, 8, device="cuda"), torch.tensor([0, 1], device="cuda")).isfinite().all()  # fmt: skip
