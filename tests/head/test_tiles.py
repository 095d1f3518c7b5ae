"""Tiles as a GPU gets them, counted on the meta device: whole numbers, aligned rows, memory within the promise."""

import contextlib
from pathlib import Path

import pytest
import torch
from test_logps import PeakBytes, _bytes

from bco_fast.head.backends import launching, walk
from bco_fast.head.backends import torch as chunked
from bco_fast.head.backends import triton as triton_backend
from bco_fast.head.backends.triton import splits
from bco_fast.head.sparse import triton as sparse_triton
from bco_fast.head.tiling import smallest_workspace, tile_shape
from bco_fast.head.types import HeadInputs, HeadNeed, HeadSaved, HeadSpec, HeadWant
from bco_fast.kernels import configs


@pytest.fixture(autouse=True)
def _a_pytorch_that_adds_in_place(monkeypatch):
    monkeypatch.setattr(walk, "adds_in_place", lambda device, dtype: True)


def _inputs(n, d, v, *, dtype=torch.bfloat16, weight_dtype=None):
    hidden, weight = (
        torch.empty(n, d, device="meta", dtype=dtype),
        torch.empty(v, d, device="meta", dtype=weight_dtype or dtype),
    )
    return HeadInputs(hidden, weight, torch.empty(n, device="meta", dtype=torch.int64), None, HeadSpec())


@pytest.mark.parametrize(("d", "v"), [(4096, 128256), (896, 50257)])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_rows_of_a_tile_are_aligned_for_every_number_of_tokens(d, v, frozen):
    weight = torch.empty(v, d, device="meta", dtype=torch.bfloat16)
    for n in range(1, 40_001):
        hidden = weight.new_empty(1, 1).expand(n, d)
        rows, columns = tile_shape(
            hidden, weight, 256 << 20, tiles=1, product=True, sums=not frozen, adds_in_place=True
        )
        assert isinstance(columns, int)
        assert columns % 512 == 0
        assert 1 <= rows <= n
        assert columns >= 4096, "narrow chunks starve the matmuls"


def test_a_ragged_last_chunk_is_aligned_too():
    memory = walk.Memory(torch.empty(1, 1, device="meta", dtype=torch.bfloat16), 5120)
    for columns in (5120, 50257 % 5120, 1, 63, 65):
        wide = memory.take("z", 100, columns)
        low = memory.successor(wide, torch.bfloat16)
        for tile in (wide, low):
            assert tile.shape == (100, columns)
            assert tile.stride(0) * tile.itemsize % 16 == 0
            assert tile.stride(1) == 1


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "workspace"),
    [
        ((8192, 4096, 128256), 256 << 20),
        pytest.param((32768, 896, 50257), 64 << 20, marks=pytest.mark.slow),
        pytest.param((300, 2304, 9000), 1 << 20, marks=pytest.mark.slow),
        ((5, 8, 300), 32 << 10),
    ],
    ids=str,
)
def test_memory_stays_within_the_promise(shape, workspace, dtypes):
    """The workspace, the results, 4ND bytes and a few numbers a row; a float32 weight is never cast whole."""
    n, d, _ = shape  # N, D, V
    assert workspace >= smallest_workspace(d)
    inputs = _inputs(*shape, dtype=dtypes[0], weight_dtype=dtypes[1])
    beside = 4 * n * d + 100 * n
    for frozen in (True, False):
        with PeakBytes() as memory:
            out = chunked.forward(inputs, HeadWant(frozen=frozen), workspace)
        assert memory.peak <= workspace + _bytes(out) + beside, frozen
    saved = HeadSaved(inputs, out.logps, out.row_max, out.row_sum, out.entropy, out.row_argmax)
    with PeakBytes() as memory:
        grads = chunked.backward(out.logps, None, saved, HeadNeed(True, True, False), workspace)
    assert grads[1].dtype == dtypes[1]
    assert memory.peak <= workspace + _bytes(grads) + beside


def test_a_gradient_of_float32_master_weights_is_never_rounded():
    """Mixed precision: dW leaves the matmul in float32."""
    written = []
    real = walk.matmul

    def matmul(a, b, out=None):
        written.append((a.dtype, None if out is None else out.dtype))
        return real(a, b, out)

    inputs = _inputs(64, 32, 5000, weight_dtype=torch.float32)
    statistics = [torch.empty(64, device="meta") for _ in range(3)]
    saved = HeadSaved(inputs, *statistics, None, torch.empty(64, device="meta", dtype=torch.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "matmul", matmul)
        chunked.backward(statistics[0], None, saved, HeadNeed(True, True, False), 1 << 20)
    assert (torch.bfloat16, torch.float32) in written
    assert (torch.bfloat16, None) not in written


@pytest.mark.parametrize("processors", [108, 132, 142], ids=["A100", "H100", "L40S"])
@pytest.mark.parametrize("v", [32000, 50257, 128256, 262144])
@pytest.mark.parametrize("n", [256, 1000, 8192, 32768])
def test_vocabulary_ranges_fill_the_multiprocessors(processors, v, n):
    """Waves x the length of a range, in blocks, against an even share of the blocks."""
    rows, columns = -(-n // 128), -(-v // 128)
    count = splits(rows, columns, processors, most=1 << 20)
    waves = -(-rows * count // processors)
    assert -(-rows * columns // processors) / (waves * -(-columns // count)) >= 0.9
    assert 1 <= splits(rows, columns, processors, most=0) <= splits(rows, columns, processors, most=3) <= 3


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """A model spread over GPUs has its head on one that need not be the current one."""
    current, launched = [], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    class Kernel:
        arg_names = ("N", "BLOCK_N")

        def __getitem__(self, grid):
            return lambda **arguments: launched.append((list(current), arguments))

    monkeypatch.setattr(torch.cuda, "device", device)
    other = torch.device("cuda", 1)
    launching.launch(Kernel(), (1,), configs.MERGE_SPLITS, other, N=3)
    launching.launch(Kernel(), (1,), configs.MERGE_SPLITS, torch.device("cpu"), N=3)
    arguments = {"N": 3, "BLOCK_N": 256, "num_warps": 4, "num_stages": 1}
    assert launched == [([other], arguments), ([], arguments)]
    sources = [Path(module.__file__).read_text() for module in (launching, triton_backend, sparse_triton)]
    assert sum(source.count("_kernel[") + source.count("kernel[grid]") for source in sources) == 1, "one place launches"
