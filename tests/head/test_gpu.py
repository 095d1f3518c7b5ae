"""On a GPU (`pytest -m gpu`): the kernels as compiled, at sizes near real ones."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from heads import OPTIONS, case, check, run

from bco_fast import HeadStats, fused_linear_logps
from bco_fast.kernels import configs

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
    for _ in range(50):
        again = run(c, "triton", torch.bfloat16, device="cuda")
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize(("backend", "scattered"), [("triton", False), ("triton", True), ("torch", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_sparse_backward(backend, scattered, dtype, monkeypatch):
    monkeypatch.setattr(configs, "scattered_from", lambda itemsize, width: 0.0 if scattered else 2.0)
    g = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(32768, 512, generator=g, device="cuda") * (6 / 512**0.5)
    targets = torch.randint(0, 32768, (2048,), generator=g, device="cuda")
    hidden = 0.3 * weight[targets] + torch.randn(2048, 512, generator=g, device="cuda")
    upstream = torch.randn(2048, generator=g, device="cuda")

    def step(tolerance: float, stats: HeadStats | None = None) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        logps = fused_linear_logps(*leaves, targets, backend=backend, sparse_tolerance=tolerance, stats=stats)
        (logps * upstream).sum().backward()
        return [leaf.grad.float() for leaf in leaves]

    stats = HeadStats()
    sparse, again, dense = step(2.0**-5, stats), step(2.0**-5), step(0.0)
    assert stats.error_bound <= 2.0**-5
    assert stats.kept_fraction < 0.4, "a test of the sparse way must leave something out"
    for ours, same, truth in zip(sparse, again, dense, strict=True):
        assert torch.equal(ours, same)
        assert (ours - truth).norm() / truth.norm() <= 0.05


def test_weights_past_two_to_the_31_elements():
    v, d = 270_000, 8192
    assert v * d > 2**31
    hidden = torch.randn(4, d, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) * 0.01
    targets = torch.tensor([0, 1, v - 2, v - 1], device="cuda")
    logps = fused_linear_logps(hidden, weight, targets, backend="triton")
    expected = torch.log_softmax(hidden.float() @ weight.float().T, -1)[torch.arange(4), targets.cpu()]
    assert torch.allclose(logps, expected, atol=1e-3)


REAL = [(32768, 896, 151_936), (8192, 2304, 262_144), (8192, 4096, 128_256)]  # N, D, V


def _exact(hidden, weight, targets, upstream, block=512):
    """logps and gradients in float64, by blocks of rows: 18 GB for the largest of the shapes."""
    wide = weight.detach().double()
    logps = torch.empty(len(hidden), device="cuda", dtype=torch.float64)
    d_hidden = torch.empty(hidden.shape, device="cuda", dtype=torch.float64)
    d_weight = torch.zeros_like(wide)
    for start in range(0, len(hidden), block):
        rows = slice(start, start + block)
        h, at = hidden.detach()[rows].double(), targets[rows, None]
        dz = torch.log_softmax(h @ wide.T, -1)
        logps[rows] = dz.gather(1, at)[:, 0]
        dz.exp_().neg_().scatter_add_(1, at, torch.ones_like(at, dtype=torch.float64)).mul_(upstream[rows, None])
        d_hidden[rows] = dz @ wide
        d_weight.addmm_(dz.T, h)
    return logps, d_hidden, d_weight


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", REAL, ids=str)
@pytest.mark.parametrize("method", ["fused", "fold"])
def test_real_shapes(shape, method):
    """bf16: per-token error, gradients, bytes beyond the inputs and equal bits, trainable and frozen."""
    n, d, v = shape
    needed = 20 * v * d + (8 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(v, d, generator=g, device="cuda") * 3 / d**0.5).bfloat16()
    targets = torch.randint(0, v, (n,), generator=g, device="cuda")
    upstream = torch.randn(n, generator=g, device="cuda")
    exact = _exact(hidden, weight, targets, upstream.double())
    workspace = 256 << 20

    def step():
        logps = fused_linear_logps(hidden, weight, targets, backend="triton", workspace_bytes=workspace)
        wanted = (hidden, weight) if weight.requires_grad else (hidden,)
        return (logps.detach(), *torch.autograd.grad((logps * upstream).sum(), wanted))

    with mock.patch.object(configs, "forward_method", return_value=method):
        for trainable in (True, False):
            weight.requires_grad_(trainable)
            first = step()  # compiles, and lets cuBLAS take its own workspace
            for ours, truth in zip(first, exact, strict=False):
                assert ours.shape == truth.shape
            assert (first[0].double() - exact[0]).square().mean().sqrt() <= 1e-4
            for ours, truth in zip(first[1:], exact[1:], strict=False):
                assert (ours.double() - truth).norm() / truth.norm() <= torch.finfo(torch.bfloat16).eps
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            again = step()
            extra = torch.cuda.max_memory_allocated() - before
            results = sum(t.numel() * t.element_size() for t in again)
            kept = 0 if trainable else 2 * n * d  # d logp / d hidden, from the forward to the backward
            assert extra <= results + workspace + 4 * n * d + kept + 256 * n + (4 << 20), f"{extra} bytes"
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


SANITIZED = """
import itertools, sys
sys.path.insert(0, "tests")
import torch
from heads import case, run
for options, entropy, frozen in itertools.product(("plain", "everything"), (False, True), ((), ("weight", "bias"))):
    for backend in ("triton", "triton fold"):
        for dtype in (torch.bfloat16, torch.float32):
            made = case(70, 1100, 72, bias=options == "everything", entropy=entropy, options=options)
            run(made, backend, dtype, device="cuda", frozen=frozen, workspace_bytes=100_000)
for backend, options in itertools.product(("triton", "torch"), ("plain", "everything")):
    made = case(70, 1100, 72, spread=8.0, bias=options == "everything", options=options)
    run(made, backend, torch.bfloat16, device="cuda", workspace_bytes=2_500_000, sparse_tolerance=0.25)
from bco_fast.kernels import configs
configs.scattered_from = lambda itemsize, width: 0.0
run(made, "triton", torch.bfloat16, device="cuda", workspace_bytes=2_500_000, sparse_tolerance=0.25)
"""
OUR_KERNELS = sorted(
    set(
        re.findall(
            r"def (\w+_kernel)\(", "".join(p.read_text() for p in (Path(__file__).parents[2] / "kernels").glob("*.py"))
        )
    )
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    name = "compute-sanitizer"
    wheel = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "bin"  # of nvidia-cuda-sanitizer-api
    path = shutil.which(name) or shutil.which(
        name, path=f"/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer:{wheel}"
    )
    if path is None:
        pytest.skip("compute-sanitizer is not installed: pip install nvidia-cuda-sanitizer-api")
    # One allocation a tensor, or an overrun would end in its neighbour and not show.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        path,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        # PyTorch and Triton try calls that a driver may lack; their errors are no errors of a kernel.
        "--report-api-errors",
        "no",
        "--launch-timeout",  # importing PyTorch may take longer than its default
        "0",
        # PyTorch's own kernels would take most of the time.
        *(word for kernel in OUR_KERNELS for word in ("--kernel-name", f"kns={kernel}")),
        sys.executable,
        "-c",
        SANITIZED,
    ]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


def test_a_foreign_target_is_nan_and_its_neighbours_are_not():
    hidden, weight = torch.randn(4, 64, device="cuda"), torch.randn(1000, 64, device="cuda")
    targets = torch.tensor([3, 1000, -5, 2**40], device="cuda")
    assert fused_linear_logps(hidden, weight, targets).isnan().tolist() == [False, True, True, True]


def test_auto_is_triton():
    assert fused_linear_logps(torch.randn(2, 8, device="cuda"), torch.randn(9, 8, device="cuda"), torch.tensor([0, 1], device="cuda")).isfinite().all()  # fmt: skip
