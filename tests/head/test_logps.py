"""The operator is right: every backend against float64, within twice the error of plain PyTorch in the same dtype."""

import importlib
import threading

import pytest
import torch
from heads import DEVICE, GPU, OPTIONS, Case, case, check, forced, fused_call, plain, relative_error, run
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bco_fast import HeadStats, fused_linear_logps
from bco_fast.head.dispatch import load_sparse
from bco_fast.head.linear_logps import head_logps
from bco_fast.head.types import HeadInputs, HeadNeed, HeadOptions, HeadSaved, HeadSpec, HeadWant

BACKENDS = ["torch", "triton", "triton fold"]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "v", "d"), [(1, 1, 1), (1, 2, 8), (5, 31, 64), (127, 1000, 65), (129, 1100, 257)], ids=str
)
def test_ragged_shapes(backend, dtype, n, v, d):
    check(case(n, v, d, seed=n + v, bias=n % 2 == 1), backend, dtype)


@pytest.mark.usefixtures("low_precision_matmuls")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trainable", "frozen"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_low_precision_operands_as_a_gpu_has_them(options, frozen, dtype):
    check(case(70, 600, 48, bias=True, options=options), "torch", dtype, frozen=frozen)
    if not frozen:
        check(case(70, 600, 48, bias=True, entropy=True, options=options), "torch", dtype, workspace_bytes=60_000)


@pytest.mark.skipif(GPU, reason="a setting of the CPU")
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trainable", "frozen"])
def test_bf16_matmuls_of_the_cpu_lose_nothing(frozen):
    """docs/kernels.md, bfloat16 on a CPU."""
    made = case(129, 1100, 257, bias=True)
    before = run(made, "torch", torch.bfloat16, frozen=frozen)["logps"]
    setting = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        check(made, "torch", torch.bfloat16, frozen=frozen)
        after = run(made, "torch", torch.bfloat16, frozen=frozen)["logps"]
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = setting
    assert (after - before).abs().max() < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_options_and_entropy(backend, options, entropy):
    check(case(70, 600, 48, bias=True, entropy=entropy, options=options), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [20.0, -20.0], ids=["+20", "-20"])
def test_logits_far_from_zero(backend, center):
    check(case(100, 700, 64, center=center, entropy=True), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trainable", "frozen"])
@pytest.mark.parametrize("scale", [6.0, 12.0, 30.0])
def test_peaked_logits_where_the_target_is_almost_certain(backend, frozen, scale):
    """p_y -> 1: the gradient is a difference of nearly equal numbers."""
    c = case(64, 500, 64, ignored=0.0, zeros=0.0)
    c.weight = torch.nn.functional.normalize(c.weight, dim=1) * scale
    c.hidden = torch.nn.functional.normalize(c.weight[c.targets], dim=1) + 0.01 * c.hidden
    check(c, backend, torch.float32, frozen=frozen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_another_token_than_the_target_is_almost_certain(backend, entropy):
    """p of that token is 1 - tiny: an error of its logit may not show, or dz would be off by the logit's rounding."""
    c = case(64, 1100, 130, ignored=0.0, zeros=0.9, entropy=entropy)
    c.weight = torch.nn.functional.normalize(c.weight, dim=1) * 60
    c.hidden = torch.nn.functional.normalize(c.weight[(c.targets + 300) % 1100], dim=1) + 0.01 * c.hidden
    check(c, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_logits_equal(backend):
    c = case(33, 257, 16)
    c.weight = c.weight[:1].expand(257, 16)
    ours = run(c, backend, torch.float32)["logps"]
    kept = c.targets != -100
    assert torch.allclose(ours[kept].double(), -torch.tensor(257.0).double().log(), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_ten_thousand_stay_finite(backend):
    c = case(20, 300, 8)
    c.weight *= 3000
    assert float((c.hidden @ c.weight.T).abs().max()) > 1e4
    c.upstream_entropy = torch.ones(20, dtype=torch.float64)
    for name, tensor in run(c, backend, torch.float32).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_maxima_that_fall_and_rise_between_tiles(backend):
    """A running maximum that follows the last tile would have to rescale by e^400."""
    c = case(30, 1100, 8, entropy=True)
    c.hidden[:, 0] = 1.0
    c.weight[:, 0] = torch.tensor([200.0, -200.0, 0.0, -300.0, 250.0]).repeat_interleave(256)[:1100]
    truth = run(c, "reference", torch.float64)
    for name, tensor in run(c, backend, torch.float32, workspace_bytes=100_000).items():
        # logits of 250 are themselves only known to 1.5e-5, and the backward rounds them anew
        assert relative_error(tensor, truth[name]) < 2e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_masks_tokens(backend):
    """Whole tiles and splits of the vocabulary can be masked: exp(-inf - -inf) must not appear."""
    c = case(12, 1100, 32, bias=True, entropy=True)
    c.bias[:600] = float("-inf")
    c.targets[c.targets >= 0] = 600 + c.targets[c.targets >= 0] % 500
    ours = run(c, backend, torch.float32, workspace_bytes=1 << 18)
    kept = Case(c.hidden, c.weight[600:], torch.where(c.targets < 0, c.targets, c.targets - 600), c.bias[600:], c.upstream, c.upstream_entropy)  # fmt: skip
    truth = run(kept, "reference", torch.float64)
    for name in ("logps", "entropy", "d_hidden"):
        assert relative_error(ours[name], truth[name]) < 1e-5, name
    assert not ours["d_weight"][:600].any()
    assert relative_error(ours["d_weight"][600:], truth["d_weight"]) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_head(backend, options, dtype):
    """The 4NDV path: d logp / d hidden comes out of the forward."""
    c = case(130, 1100, 96, options=options, bias=True)
    check(c, backend, dtype, frozen=("weight", "bias"), workspace_bytes=300_000)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_frozen_head_with_an_entropy_gradient_recomputes(backend):
    check(case(40, 300, 32, entropy=True, options="everything"), backend, torch.float32, frozen=("weight",))


@pytest.mark.parametrize("method", ["fused", "fold"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_mass_of_each_256_wide_tile(method, softcap):
    """What the sparse backward will choose by: the share of every tile in its row, times the derivative of the softcap."""
    from bco_fast.head.backends import triton as backend

    c = case(20, 1100, 16, ignored=0.0, center=5.0)
    inputs = HeadInputs(c.hidden.float(), c.weight.float(), c.targets, None, HeadSpec(softcap=softcap))
    out = backend.forward(inputs, HeadWant(mass=True), 100_000, method=method)
    z = c.hidden @ c.weight.T
    softcap_grad = torch.ones_like(z)
    if softcap:
        softcap_grad = 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    masses = torch.nn.functional.pad(z.softmax(-1) * softcap_grad, (0, -1100 % 256)).view(20, -1, 256).sum(-1)
    assert out.mass.shape == (20, 5)
    assert relative_error(out.mass, masses) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("hidden", "weight"), ("bias", "hidden")], ids=str)
def test_only_the_gradients_that_are_asked_for(backend, frozen):
    ratios = check(case(20, 70, 24, bias="bias" in frozen), backend, torch.float32, frozen=frozen)
    assert not any(f"d_{name}" in ratios for name in frozen)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_all_rows_ignored_and_no_rows(backend):
    c = case(9, 40, 8, ignored=1.1)
    for rows in (9, 0):
        part = Case(c.hidden[:rows], c.weight, c.targets[:rows], None, c.upstream[:rows])
        out = run(part, backend, torch.float32)
        assert out["logps"].shape == (rows,)
        assert not out["logps"].any()
        assert not out["d_hidden"].any()
        assert not out["d_weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_upstream_gradient_gives_zero_gradients(backend):
    out = run(case(9, 40, 8, zeros=1.1), backend, torch.float32)
    assert out["logps"].any()
    assert not out["d_hidden"].any()
    assert not out["d_weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    c = case(40, 90, 32)
    straight = run(c, backend, torch.float32)
    h, w = c.hidden.float(), c.weight.float()
    layouts = {
        "transposed": (h.T.contiguous().T, w.T.contiguous().T),
        "padded": (torch.nn.functional.pad(h, (3, 5))[:, 3:-5], torch.nn.functional.pad(w, (0, 7))[:, :-7]),
        "every other": (h.repeat_interleave(2, 1)[:, ::2], w.repeat_interleave(2, 0)[::2]),
    }
    for name, (hidden, weight) in layouts.items():
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        assert hidden.stride() != h.stride() or weight.stride() != w.stride()
        logps = fused_linear_logps(hidden, weight, c.targets, backend=backend.removesuffix(" fold"))
        (logps * c.upstream).sum().backward()
        assert torch.allclose(logps, straight["logps"], rtol=1e-5, atol=1e-6), name
        assert relative_error(hidden.grad, straight["d_hidden"]) < 1e-6, name
        assert relative_error(weight.grad, straight["d_weight"]) < 1e-6, name


def test_expanded_inputs():
    hidden = torch.randn(1, 16).expand(5, 16)
    logps = fused_linear_logps(hidden, torch.randn(30, 16), torch.full((5,), 3))
    assert torch.allclose(logps, logps[0].expand(5), rtol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_leading_shapes_and_index_dtypes(backend):
    hidden, weight, targets = torch.randn(2, 3, 5, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 3, 5))
    logps, entropy = fused_linear_logps(hidden, weight, targets.int(), backend=backend, return_entropy=True)
    assert logps.shape == entropy.shape == targets.shape
    expected = plain(hidden.view(-1, 8), weight, targets.view(-1)).view(2, 3, 5)
    assert torch.allclose(logps, expected, atol=1e-5)
    assert logps.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [pytest.param("plain", marks=pytest.mark.slow), "everything"])
def test_the_workspace_changes_nothing_but_rounding(backend, options):
    c = case(80, 700, 40, options=options, bias=True, entropy=True)
    wide = run(c, backend, torch.float64)
    for workspace in (32 << 10, 200_000):
        narrow = run(c, backend, torch.float64, workspace_bytes=workspace)
        for name, tensor in wide.items():
            assert relative_error(narrow[name], tensor) < 1e-13, name


class PeakBytes(TorchDispatchMode):
    """Largest sum of the memory that operators called within have allocated and that still lives, after each call."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if all(r.alias_info is None for r in function._schema.returns):
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    storage = t.untyped_storage()
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.fixture
def products_in_place():
    """As on a GPU, whose matmuls write into the workspace: the interpreter keeps the arguments of its last launch, which
    would be products that oneDNN allocated."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


# The interpreter multiplies float32 copies of low-precision operands.
LOW = [torch.float32] if not GPU else [torch.float32, torch.bfloat16]
WAYS = [("torch", {}, dtype) for dtype in (torch.float32, torch.bfloat16)]
WAYS += [("triton", {"method": method}, dtype) for method in ("fused", "fold") for dtype in LOW]


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]} {way[1].get('method', '')} {way[2]}")
@pytest.mark.parametrize(("d", "workspace"), [(40, 32 << 10), (1024, 64 << 10), (40, 100_000)])
@pytest.mark.parametrize("options", [pytest.param("plain", marks=pytest.mark.slow), "everything"])
def test_the_workspace_is_a_hard_cap(way, d, workspace, options, request):
    """From the smallest workspace on; only the results, 64 bytes a row and 4ND bytes come on top."""
    name, method, dtype = way
    if name == "triton":
        request.getfixturevalue("products_in_place")
    module = importlib.import_module(f"bco_fast.head.backends.{name}")
    n, v = (70, 500) if d == 40 else (9, 90)
    full = options == "everything"
    c = case(n, v, d, ignored=0.0, zeros=0.0, bias=True, entropy=full, options=options)
    hidden, weight, bias = (t.to(DEVICE, dtype) for t in (c.hidden, c.weight, c.bias))
    targets, upstream = c.targets.to(DEVICE), c.upstream.float().to(DEVICE)
    grad_entropy = c.upstream_entropy.float().to(DEVICE) if full else None
    spec = HeadSpec(c.options.get("logit_scale", 1.0), c.options.get("softcap"), c.options.get("temperature", 1.0))
    inputs = HeadInputs(hidden, weight, targets, bias, spec)
    beside = 4 * n * d * (1 + (dtype == torch.bfloat16 and DEVICE == "cpu")) + 64 * n
    for frozen in (True, False):
        with PeakBytes() as memory:
            out = module.forward(inputs, HeadWant(full, frozen), workspace, **method)
        assert memory.peak > 0
        assert memory.peak <= workspace + _bytes(out) + beside, frozen
    saved = HeadSaved(inputs, out.logps, out.row_max, out.row_sum, out.entropy, out.row_argmax)
    for need in (HeadNeed(True, True, True), HeadNeed(True, False, False), HeadNeed(False, True, False)):
        with PeakBytes() as memory:
            grads = module.backward(upstream, grad_entropy, saved, need, workspace)
        assert memory.peak > _bytes(grads)
        assert memory.peak <= workspace + _bytes(grads) + beside, need


def test_a_workspace_too_small_for_the_hidden_size_is_refused():
    with pytest.raises(ValueError, match="workspace_bytes must be at least 262144"):
        fused_linear_logps(torch.randn(2, 4096), torch.randn(3, 4096), torch.tensor([0, 1]), workspace_bytes=200_000)


def _fifty_times(backend, dtype, made, **kwargs):
    first = run(made, backend, dtype, **kwargs)
    results = [run(made, backend, dtype, **kwargs) for _ in range(50)]
    thread = threading.Thread(target=lambda: results.append(run(made, backend, dtype, **kwargs)))
    thread.start()
    thread.join()
    assert len(results) == 51
    for other in results:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("backend", [b if b == "torch" else pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS])
def test_the_same_bits_fifty_times_and_from_another_thread(backend):
    _fifty_times(backend, torch.float32, case(9, 300, 24, entropy=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_same_bits_fifty_times_over_many_tiles(backend, dtype):
    made = case(66, 600, 72, ignored=0.0, bias=True, entropy=True, options="everything")
    _fifty_times(backend, dtype, made, workspace_bytes=60_000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize(
    ("options", "fast_mode"),
    [
        ("everything", True),
        *(pytest.param(o, False, marks=pytest.mark.slow) for o in ("everything", "plain", "softcap")),
    ],
)
def test_gradcheck(backend, bias, entropy, options, fast_mode):
    """`fast_mode` checks a random projection of the Jacobian, not each of its entries."""
    c = case(4, 7, 3, seed=1, bias=bias, entropy=entropy, ignored=0.2, options=options)
    inputs = [t.clone().requires_grad_() for t in (c.hidden, c.weight, c.bias) if t is not None]

    def call(hidden, weight, bias=None):
        made = Case(hidden, weight, c.targets, bias, options=c.options)
        return fused_call(made, backend, entropy)

    assert torch.autograd.gradcheck(call, inputs, eps=1e-5, atol=1e-6, fast_mode=fast_mode)
    frozen = [t.detach() for t in inputs[1:]]
    assert torch.autograd.gradcheck(lambda h: call(h, *frozen), inputs[:1], eps=1e-5, atol=1e-6, fast_mode=fast_mode)


def test_the_measure_catches_a_zeroed_gradient():
    c = case(30, 50, 16)
    truth = run(c, "reference", torch.float64)
    allowed = relative_error(run(c, "plain", torch.float16)["d_weight"], truth["d_weight"])
    assert (
        relative_error(torch.zeros_like(truth["d_weight"]), truth["d_weight"])
        > 2 * allowed + 4 * torch.finfo(torch.float16).eps
    )


def test_float64_stays_float64():
    c = case(5, 9, 4)
    for backend in BACKENDS:
        out = run(c, backend, torch.float64)
        assert out["logps"].dtype == torch.float64
        assert relative_error(out["logps"], run(c, "reference", torch.float64)["logps"]) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_float64_is_exact(backend, options):
    """gradcheck rests on it, and its own tolerance is wide."""
    c = case(20, 300, 16, bias=True, entropy=True, options=options)
    truth = run(c, "reference", torch.float64)
    for name, tensor in run(c, backend, torch.float64).items():
        assert relative_error(tensor, truth[name]) < 1e-13, name


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-7], ids=["", "sparse"])
def test_autocast_over_float32_master_weights(backend, tolerance, monkeypatch):
    """The numbers of a head cast to bf16; the gradient of the weight is float32 and not rounded to bf16."""
    if backend == "reference" and tolerance:
        pytest.skip("the reference is exact")
    for name in ("torch", "triton"):
        monkeypatch.setattr(load_sparse(name), "break_even", lambda dtype: 1.1)
    c = case(40, 700, 48, spread=6.0, bias=True)
    hidden, weight, bias = (t.float().requires_grad_() for t in (c.hidden, c.weight, c.bias))
    call = {"ignore_index": -100, "sparse_tolerance": tolerance, "workspace_bytes": 500_000, "bias": bias}
    with forced(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        logps = fused_linear_logps(hidden, weight, c.targets, backend=backend.removesuffix(" fold"), **call)
    (logps * c.upstream).sum().backward()
    low = c.weight.bfloat16().double().requires_grad_()
    truth = fused_linear_logps(c.hidden.bfloat16().double(), low, c.targets, backend="reference", bias=c.bias)
    (truth * c.upstream).sum().backward()
    assert relative_error(logps, truth) < 1e-5
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, low.grad) < (0.05 if tolerance else 1e-4)
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_autocast_saves_no_second_copy_of_the_weight():
    """And of a frozen head nothing but d logp / d hidden."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _saved_bytes() == 2 * 40 * 16
        hidden_and_weight = 2 * 40 * 16 + 4 * 90 * 16
        assert _saved_bytes(trainable=True) == hidden_and_weight + 4 * 3 * 40 + 8 * 2 * 40


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trainable", "frozen"])
def test_ignored_rows_may_hold_anything(backend, frozen):
    c = case(20, 60, 8)
    clean = run(c, backend, torch.float32, frozen=frozen)
    ignored = c.targets == -100
    c.hidden[ignored] = float("nan")
    for name, tensor in run(c, backend, torch.float32, frozen=frozen).items():
        assert torch.equal(tensor, clean[name]), name
    assert not clean["d_hidden"][ignored].any()


def test_no_grad_keeps_nothing():
    c = case(8, 40, 16)
    with torch.no_grad():
        logps = fused_linear_logps(c.hidden.requires_grad_(), c.weight.requires_grad_(), c.targets)
    assert not logps.requires_grad


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trainable", "frozen"])
def test_without_an_ignore_index_every_row_counts(backend, frozen):
    made = case(30, 90, 16, ignored=0.0, entropy=True)
    with_index = run(made, backend, torch.float32, frozen=frozen)
    without = run(made, backend, torch.float32, frozen=frozen, ignore_index=None)
    assert all(torch.equal(without[name], tensor) for name, tensor in with_index.items())
    made.targets[4] = -100
    with pytest.raises(IndexError, match=r"targets\[4\] is -100: outside the vocabulary \[0, 90\)$"):
        run(made, backend, torch.float32, ignore_index=None)


def _saved_bytes(**options) -> int:
    """Of all tensors that a call keeps for its backward, N = 40, V = 90, D = 16."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weight = torch.randn(90, 16, requires_grad=options.pop("trainable", False))
    hidden = torch.randn(40, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = head_logps(hidden, weight, torch.randint(0, 90, (40,)), None, HeadSpec(), HeadOptions("torch"), **options)
    assert (out[0] if options.get("return_entropy") else out).requires_grad
    return sum(sizes.values())


def test_only_what_the_backward_reads_is_saved():
    hidden = dlogp_dhidden = 4 * 40 * 16
    weight, vector, index = 4 * 90 * 16, 4 * 40, 8 * 40
    statistics = 3 * vector + 2 * index  # logps, row_max, row_sum; targets and row_argmax
    assert _saved_bytes() == dlogp_dhidden
    assert _saved_bytes(return_entropy=True, entropy_grad=False) == dlogp_dhidden
    assert _saved_bytes(return_entropy=True) == dlogp_dhidden + hidden + weight + statistics + vector
    assert _saved_bytes(trainable=True) == hidden + weight + statistics


def test_stats_report_the_dense_backward():
    stats = HeadStats()
    hidden = torch.randn(4, 8, requires_grad=True)
    logps = fused_linear_logps(hidden, torch.randn(10, 8), torch.arange(4), stats=stats)
    assert stats.kept_fraction is None
    assert stats.error_bound is None
    logps.sum().backward()
    assert (stats.kept_fraction, stats.error_bound) == (1.0, 0.0)


def _bad(**changes):
    good = {"hidden": torch.randn(3, 4), "weight": torch.randn(7, 4), "targets": torch.tensor([1, -100, 6])}
    return good | changes


@pytest.mark.parametrize("backend", ["torch", "triton", "reference", "auto"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": torch.tensor([1, 7, 0])}, IndexError, r"targets\[1\] is 7"),
        ({"targets": torch.tensor([1, 2, -5])}, IndexError, r"targets\[2\] is -5"),
        ({"targets": torch.tensor([2**63 - 1, 2, 3])}, IndexError, r"targets\[0\]"),
        ({"targets": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "int64"),
        ({"targets": torch.tensor([1, 2, 3], dtype=torch.int8)}, TypeError, "int8"),
        ({"targets": torch.tensor([1, 2])}, ValueError, "leading shape"),
        ({"hidden": torch.randn(3, 5)}, ValueError, "disagree about D"),
        ({"hidden": torch.randn(3, 4).half()}, TypeError, "float16 and weight"),
        ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "hidden must be"),
        (
            {"hidden": torch.tensor([[1.0, 2, float("nan"), 0]] * 3)},
            ValueError,
            "hidden has a value that is not finite",
        ),
        ({"weight": torch.full((7, 4), float("inf"))}, ValueError, "weight has a value that is not finite"),
        ({"weight": torch.randn(4)}, ValueError, "must be \\[V, D\\]"),
        ({"bias": torch.randn(3)}, ValueError, "bias must be \\[7\\]"),
        ({"bias": torch.full((7,), float("nan"))}, ValueError, "bias has NaN"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
        ({"workspace_bytes": 10}, ValueError, "workspace_bytes"),
        ({"sparse_tolerance": 1.5}, ValueError, "sparse_tolerance"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_bad_input_raises_the_same_on_every_backend(backend, changes, error, message):
    with pytest.raises(error, match=message):
        fused_linear_logps(**_bad(**changes), backend=backend)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'fast'"):
        fused_linear_logps(**_bad(), backend="fast")


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    ("module", "method"), [("torch", {}), ("triton", {"method": "fused"}), ("triton", {"method": "fold"})]
)
def test_the_kernels_give_nan_for_a_foreign_target(module, method, frozen):
    """Behind the host's checks, as on a GPU: no foreign memory is read and the row shows."""
    targets = torch.tensor([1, 50, -7, 2**62])
    inputs = HeadInputs(torch.randn(4, 8), torch.randn(20, 8), targets, None, HeadSpec())
    backend = importlib.import_module(f"bco_fast.head.backends.{module}")
    out = backend.forward(inputs, HeadWant(frozen=frozen), 1 << 20, **method)
    assert out.logps.isnan().tolist() == [False, True, True, True]
    if frozen:
        assert out.dlogp_dhidden.isnan().all(1).tolist() == [False, True, True, True]
