"""No kernel reads or writes outside the tensors of its launch: the interpreter's every address is compared with them."""

import itertools
import sys

import numpy as np
import pytest
import torch
from heads import case, run

from bco_fast.head.backends import launching
from bco_fast.head.backends import triton as triton_backend
from bco_fast.head.dispatch import load_sparse
from bco_fast.kernels import configs

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer looks at compiled kernels")


class Bounds:
    """The bytes that a launch may touch, and what was touched beside them."""

    def __init__(self):
        self.allowed: list[tuple[int, int]] = []
        self.kernel, self.accesses, self.outside = None, 0, []

    def enter(self, kernel, arguments) -> None:
        self.kernel, self.allowed = kernel.fn.__name__, []
        for tensor in (a for a in arguments if isinstance(a, torch.Tensor) and a.numel()):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self.allowed.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))

    def check(self, kind: str, pointers, mask) -> None:
        addresses, item = pointers.data[mask.data.astype(bool)], pointers.get_element_ty().primitive_bitwidth // 8
        self.accesses += addresses.size
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, stop in self.allowed:
            inside |= (addresses >= start) & (addresses + item <= stop)
        if not inside.all():
            self.outside.append(f"{self.kernel}: {int((~inside).sum())} {kind}s")


@pytest.fixture
def bounds(monkeypatch):
    found = Bounds()
    builder = type(sys.modules["triton.runtime.interpreter"].interpreter_builder)
    for kind, at in (("load", 1), ("store", 2)):
        real = getattr(builder, f"create_masked_{kind}")

        def guarded(self, pointers, *rest, real=real, kind=kind, at=at):
            found.check(kind, pointers, rest[at - 1])
            return real(self, pointers, *rest)

        monkeypatch.setattr(builder, f"create_masked_{kind}", guarded)
    launch = launching.launch

    def noted(kernel, *rest, **arguments):
        found.enter(kernel, arguments.values())
        launch(kernel, *rest, **arguments)

    for module in (triton_backend, load_sparse("triton")):
        monkeypatch.setattr(module, "launch", noted)
    return found


@triton.jit
def _one_too_far(x_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    offsets = tl.arange(0, BLOCK_N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets + 1, mask=offsets < N), mask=offsets < N)


@pytest.mark.parametrize(("n", "expected"), [(7, []), (8, ["_one_too_far: 1 loads"])])
def test_the_guard_finds_an_overrun(bounds, n, expected):
    x = torch.zeros(16)[:8]  # its neighbour is the same allocation, but not the launch's
    bounds.enter(_one_too_far, (x,))
    _one_too_far[(1,)](x_ptr=x, y_ptr=x, N=n, BLOCK_N=8)
    assert bounds.outside == expected


RAGGED = list(itertools.product((1, 63, 65), (1, 255, 257, 600), (1, 8, 130)))  # N, V, D; blocks are 64, 256, 128


def _all_passes(n: int, v: int, d: int, bounds: Bounds) -> None:
    for options, frozen in (("plain", ()), ("everything", ()), ("everything", ("weight", "bias"))):
        made = case(
            n, v, d, bias=options == "everything", entropy=options == "everything" and not frozen, options=options
        )
        for backend in ("triton", "triton fold"):
            run(made, backend, torch.float32, frozen=frozen, workspace_bytes=200_000)
    sparse = case(n, v, d, bias=True, spread=6.0, options="softcap")
    run(sparse, "triton", torch.float32, workspace_bytes=3_000_000, sparse_tolerance=0.25)
    assert bounds.outside == [], (n, v, d)


@pytest.mark.parametrize("backend", ["triton", "triton fold"])
def test_nothing_outside_at_a_ragged_shape(backend, bounds):
    made = case(17, 257, 9, bias=True, options="everything")
    run(made, backend, torch.float32, workspace_bytes=200_000)
    assert bounds.outside == []
    assert bounds.accesses > 17 * 257


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("small_blocks", [False, True])
def test_nothing_outside_at_any_ragged_shape(bounds, monkeypatch, small_blocks):
    """Small blocks too, so that every kernel has full ones, ragged ones, and more than one of each."""
    monkeypatch.setattr(load_sparse("triton"), "break_even", lambda dtype: 1.1)
    if small_blocks:
        monkeypatch.setattr(configs, "INTERPRETED", configs.LaunchConfig(16, 64, 32, 4, 1))
    for shape in RAGGED[1::5] if small_blocks else RAGGED[::2]:
        _all_passes(*shape, bounds)
    assert bounds.accesses > 1e5
