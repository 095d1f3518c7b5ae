"""The certified sparse backward: the bound holds, on every distribution and upstream gradient, and nothing else changes."""

import importlib
import itertools

import pytest
import ranks
import torch
import torch.distributed as dist
from heads import OPTIONS, Case, case, relative_error, run
from test_logps import BACKENDS, DEVICE, PeakBytes, _bytes

from bco_fast import HeadStats, fused_linear_logps
from bco_fast.head.dispatch import load_backend, load_sparse
from bco_fast.head.sparse.choose import GPU_REPLICAS, _threshold, choose_blocks
from bco_fast.head.types import HeadInputs, HeadNeed, HeadSaved, HeadSpec, HeadWant

KINDS = ("flat", "peaked", "one-hot", "heavy-tailed", "certain target", "adversarial upstream")
TAUS = (2.0**-9, 2.0**-7, 2.0**-5, 0.25)


@pytest.fixture
def always(monkeypatch):
    """Take the sparse way however many blocks it keeps."""
    for backend in ("torch", "triton"):
        monkeypatch.setattr(load_sparse(backend), "break_even", lambda dtype: 1.1)


def _logits(kind: str, n: int, v: int, g: torch.Generator) -> torch.Tensor:
    z = torch.randn(n, v, generator=g)
    if kind == "flat":
        return 0.01 * z
    if kind == "peaked" or kind == "adversarial upstream":
        return 6 * z
    if kind == "heavy-tailed":
        return z * z.abs() ** 2
    z[torch.arange(n), torch.randint(0, v, (n,), generator=g)] += 30.0 if kind == "one-hot" else 12.0
    return z


def _from_logits(kind: str, n: int, v: int, seed: int, options: str = "plain") -> Case:
    """Hidden states that are the identity: the weight is the logits, and d weight is dZ transposed."""
    g = torch.Generator().manual_seed(seed)
    z = _logits(kind, n, v, g).double()
    targets = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    if kind == "certain target":
        targets = z.argmax(1)
    upstream = torch.randn(n, generator=g, dtype=torch.float64)
    if kind == "adversarial upstream":  # a few rows own the budget of all
        upstream = 10.0 ** (upstream * 4)
        upstream[::5] = 0.0
    targets[::9] = -100
    return Case(
        torch.eye(n, dtype=torch.float64), z.T.contiguous(), targets, upstream=upstream, options=OPTIONS[options]
    )


def _check_bound(made: Case, backend: str, tau: float, **kwargs) -> HeadStats:
    truth = run(made, "reference", torch.float64)
    stats = HeadStats()
    ours = run(made, backend, torch.float32, sparse_tolerance=tau, stats=stats, **kwargs)
    dense = run(made, backend, torch.float32, **kwargs)
    error = float((ours["d_weight"].double() - truth["d_weight"]).abs().sum())
    rounding = float((dense["d_weight"].double() - truth["d_weight"]).abs().sum())
    norm = float(truth["d_weight"].abs().sum())
    assert stats.error_bound <= tau
    # What the bound says, plus what the dense backward is off by, which no choice of blocks can undo.
    assert error <= (stats.error_bound * norm + rounding) * (1 + 1e-4) + 1e-30, (error / norm, stats, rounding / norm)
    assert torch.equal(ours["logps"], dense["logps"])
    return stats


ONE_FORWARD = ["torch", "triton", pytest.param("triton fold", marks=pytest.mark.slow)]
"""Both forwards of Triton have one backward."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_holds(backend, kind, always):
    taus, v = (TAUS, 1100) if backend == "torch" else (TAUS[1:2], 600)
    for seed, tau in enumerate(taus):
        for options in ("plain", "everything"):
            stats = _check_bound(_from_logits(kind, 24, v, seed, options), backend, tau)
            if kind == "peaked" and options == "plain":
                assert stats.kept_fraction < 0.9, "a test of the sparse way must leave something out"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_rounds_to_nothing_drops_nothing_it_can_name(backend, always):
    """Every 1 - p_y is 0 in float32, and so is the budget."""
    made = case(20, 400, 16, spread=0.1, ignored=0.0, zeros=0.0)
    made.weight[7], made.hidden[:, 0] = 0.0, 1.0
    made.weight[7, 0] = 60.0
    made.targets[:] = 7
    stats = HeadStats()
    found = run(made, backend, torch.float32, sparse_tolerance=0.2, stats=stats)
    assert not found["logps"].any()
    assert stats.error_bound == 0.0
    dense = run(made, backend, torch.float32)
    for name in ("d_hidden", "d_weight"):
        assert relative_error(found[name], dense[name].double()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_in_500_cases(kind, always):
    """84 of each kind, of every shape and option."""
    left_out = 0
    for seed in range(84):
        n, v = (3, 17, 48, 90)[seed % 4], (5, 64, 700, 1500)[seed // 4 % 4]
        made = _from_logits(kind, n, v, seed, list(OPTIONS)[seed % len(OPTIONS)])
        left_out += _check_bound(made, "torch", TAUS[seed % len(TAUS)]).kept_fraction < 1.0
    assert left_out >= 20


@pytest.mark.parametrize("backend", ONE_FORWARD)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_all_gradients_are_those_of_the_kept_blocks(backend, options, always):
    """d hidden, d weight and d bias against the dense backward's dlogits with the blocks that were dropped set to 0."""
    made = case(120, 900, 40, spread=6.0, bias=True, options=options)
    truth = run(made, "reference", torch.float64)
    for workspace in (1 << 20, 450_000):  # the second: tiles are cut
        found = run(made, backend, torch.float32, sparse_tolerance=2.0**-14, workspace_bytes=workspace)
        for name in ("d_hidden", "d_weight", "d_bias"):
            assert relative_error(found[name], truth[name]) < 1e-3, name
    loose = run(made, backend, torch.float32, sparse_tolerance=0.2)
    assert 1e-3 < relative_error(loose["d_weight"], truth["d_weight"]) < 0.5


def _forced(monkeypatch, *, scattered: bool) -> None:
    """How the triton backend makes d hidden: by one matmul over a group's gradient, or from a product of each block."""
    sparse = load_sparse("triton")
    monkeypatch.setattr(sparse.configs, "scattered_from", lambda itemsize, width: 0.0 if scattered else 2.0)
    monkeypatch.setattr(sparse, "FEWEST_COLUMNS", 1)


@pytest.mark.parametrize("workspace", [2 << 20, 400_000], ids=["one group", "groups"])
def test_a_scattered_gradient_is_that_of_the_torch_backend(workspace, always, poisoned, monkeypatch):
    """Tiles of 256 columns there too, so that both keep the same blocks; the last tile is ragged."""
    monkeypatch.setattr(load_backend("torch"), "MASS_TILE", 256)
    _forced(monkeypatch, scattered=True)
    made = case(60, 1100, 40, spread=6.0, bias=True, options="everything")
    found, expected = (
        run(made, backend, torch.float32, sparse_tolerance=0.05, workspace_bytes=workspace)
        for backend in ("triton", "torch")
    )
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor.double()) < 3e-6, name


def test_a_scattered_gradient_changes_no_bit_of_the_weights(always, monkeypatch):
    made, found = case(60, 700, 24, spread=6.0, bias=True), []
    for scattered in (True, False):
        _forced(monkeypatch, scattered=scattered)
        found.append(run(made, "triton", torch.float32, sparse_tolerance=0.05))
    scattered, products = found
    assert torch.equal(scattered["d_weight"], products["d_weight"])
    assert torch.equal(scattered["d_bias"], products["d_bias"])
    assert 0 < relative_error(scattered["d_hidden"], products["d_hidden"].double()) < 1e-6


@pytest.mark.parametrize("scattered", [False, True], ids=["products", "scattered"])
def test_groups_under_autocast_carry_no_tile_that_is_whole(scattered, always, poisoned, monkeypatch):
    """The weight is cast in groups of tiles; the last tile of one must not begin the next with a carried sum."""
    _forced(monkeypatch, scattered=scattered)
    made = case(30, 1300, 64, spread=6.0, ignored=0.0)
    hidden, weight = made.hidden.float().requires_grad_(), made.weight.float().requires_grad_()
    options = {"ignore_index": -100, "sparse_tolerance": 2.0**-9, "workspace_bytes": 560_000}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = fused_linear_logps(hidden, weight, made.targets, backend="triton", **options)
    (logps * made.upstream).sum().backward()
    low = (tensor.bfloat16().double() for tensor in (made.hidden, made.weight))
    truth = run(Case(*low, made.targets, upstream=made.upstream), "reference", torch.float64)
    assert relative_error(weight.grad, truth["d_weight"]) < 0.01
    assert relative_error(hidden.grad, truth["d_hidden"]) < 0.01


@pytest.mark.parametrize("seed", range(20))
def test_groups_cut_a_tile_only_where_the_capacity_ends(seed):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (12,), generator=g) * (torch.rand(12, generator=g) < 0.7)
    offsets = [0, *counts.cumsum(0).tolist()]
    capacity, most_tiles = int(torch.randint(1, 25, (), generator=g)), int(torch.randint(1, 5, (), generator=g))
    groups = list(load_sparse("triton")._groups(offsets, capacity, most_tiles))
    assert (groups[0].tile, groups[0].first, groups[-1].end, groups[-1].last) == (0, 0, 12, offsets[-1])
    for group in groups:
        assert group.tiles <= most_tiles
        assert group.last - group.first <= capacity
        parts = [min(offsets[t + 1], group.last) - max(offsets[t], group.first) for t in range(group.tile, group.end)]
        assert group.most >= max(parts)
    for before, after in itertools.pairwise(groups):
        assert before.last == after.first
        whole = offsets[before.end] == before.last
        assert after.tile == before.end - (not whole) or (whole and before.last - before.first == capacity)


@pytest.mark.parametrize("backend", ONE_FORWARD)
def test_the_same_bits_whatever_the_workspace_holds(backend, always):
    """Blocks are chosen from the same masses; a row's and a tile's sums are added in one order."""
    made = case(50, 700, 24, spread=6.0, bias=True)
    first = run(made, backend, torch.float32, sparse_tolerance=0.02)
    for _ in range(20 if backend == "torch" else 5):
        again = run(made, backend, torch.float32, sparse_tolerance=0.02)
        assert all(torch.equal(first[name], again[name]) for name in first)
    small = run(made, backend, torch.float32, sparse_tolerance=0.02, workspace_bytes=300_000)
    for name in first:
        assert relative_error(small[name], first[name].double()) < 3e-6, name


def _chosen(made: Case, tau: float, **kwargs):
    """Choice, mass and |c| of a case, by the torch backend's own forward."""
    module = load_backend("torch")
    hidden, weight, upstream = made.hidden.float(), made.weight.float(), made.upstream.float()
    upstream = torch.where(made.targets >= 0, upstream, 0.0)
    targets = made.targets.clamp_min(0)
    inputs = HeadInputs(hidden, weight, targets, None, HeadSpec())
    out = module.forward(inputs, HeadWant(mass=True), 1 << 22)
    saved = HeadSaved(inputs, out.logps, out.row_max, out.row_sum, None, out.row_argmax, out.mass)
    options = {"width": module.MASS_TILE, "sharded": False, "break_even": 1.1, "workspace_bytes": 1 << 22} | kwargs
    return choose_blocks(upstream, saved, tau, **options), out.mass, upstream.abs(), saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", TAUS)
def test_the_histogram_finds_what_sorting_finds(kind, tau):
    """As many blocks as sorting all of them would drop, but for those within 2^-16 of the last one."""
    made = _from_logits(kind, 90, 2000, 3)
    choice, mass, upstream, saved = _chosen(made, tau)
    weight = (upstream[:, None] * mass).double()
    own = saved.inputs.targets // 64
    weight[torch.arange(90), own] = 0.0
    total = 2 * (upstream.double() * -torch.expm1(saved.logps.double())).sum()
    sorted_weight = weight.flatten().sort().values
    droppable = int((sorted_weight.cumsum(0) <= tau * total).sum())
    targets = int((upstream != 0).sum())
    best = weight.numel() - droppable + targets
    dropped = weight.flatten()[torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, _flat(choice, mass), False)]
    assert float(dropped.sum()) <= choice.error_bound * float(total) * (1 + 1e-9) <= tau * float(total)
    assert best <= len(choice.blocks.rows) <= best + max(3, 0.002 * weight.numel())
    other, *_ = _chosen(made, tau, workspace_bytes=64 << 10)  # counted in other blocks of rows
    assert torch.equal(other.blocks.index, choice.blocks.index)


def _flat(choice, mass: torch.Tensor) -> torch.Tensor:
    """Kept blocks as positions in mass.flatten()."""
    n, tiles = mass.shape
    return choice.blocks.index % n * tiles + choice.blocks.index // n


def test_target_blocks_stay_and_rows_without_gradient_cost_nothing():
    made = _from_logits("adversarial upstream", 90, 2000, 0)
    choice, mass, upstream, saved = _chosen(made, 0.5)
    kept = torch.zeros(mass.numel(), dtype=torch.bool).index_fill(0, _flat(choice, mass), True).view(mass.shape)
    moving = upstream != 0
    assert kept[torch.arange(90), saved.inputs.targets // 64][moving].all()
    assert not kept[~moving].any()
    assert 0 < int(moving.sum()) < 90
    # No row loses more than the whole budget allows, however small its part in the total.
    total = 2 * (upstream.double() * -torch.expm1(saved.logps.double())).sum()
    lost = upstream.double() * (mass.double() * ~kept).sum(1)
    assert float(lost.max()) <= 0.5 * float(total)
    tiles = [choice.blocks.rows[a:b] for a, b in zip(choice.blocks.offsets, choice.blocks.offsets[1:], strict=False)]
    assert all(bool((rows.diff() > 0).all()) for rows in tiles)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_rows_take_the_dense_way_bit_for_bit(backend):
    made = _from_logits("flat", 40, 1500, 0)
    stats = HeadStats()
    ours = run(made, backend, torch.float32, sparse_tolerance=2.0**-7, stats=stats)
    dense = run(made, backend, torch.float32)
    assert (stats.kept_fraction, stats.error_bound) == (1.0, 0.0)
    assert all(torch.equal(ours[name], dense[name]) for name in dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_gradients_frozen_heads_and_no_rows_stay_exact(backend, always):
    for made, frozen in (
        (case(20, 400, 16, spread=8.0, entropy=True), ()),
        (case(20, 400, 16, spread=8.0), ("weight",)),
        (case(5, 400, 16, ignored=1.1), ()),
        (case(5, 400, 16, zeros=1.1), ()),
    ):
        ours = run(made, backend, torch.float32, sparse_tolerance=0.3, frozen=frozen)
        dense = run(made, backend, torch.float32, frozen=frozen)
        assert all(torch.equal(ours[name], dense[name]) for name in dense)
    made = case(1, 400, 16)
    empty = Case(made.hidden[:0], made.weight, made.targets[:0], upstream=made.upstream[:0])
    assert not run(empty, backend, torch.float32, sparse_tolerance=0.3)["d_weight"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_tolerance": 1.0}, r"sparse_tolerance must be in \[0, 1\)"),
        ({"sparse_tolerance": -0.1}, "sparse_tolerance must be in"),
        ({"sparse_tolerance": float("nan")}, "sparse_tolerance must be in"),
        ({"sparse_tolerance": 0.1, "backend": "reference"}, "it takes no sparse_tolerance"),
        ({"sparse_tolerance": 0.1, "workspace_bytes": 32 << 10}, "workspace_bytes must be at least"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_logps(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, -100, 6]), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_and_sparse_backward_stay_in_the_workspace(backend, monkeypatch):
    """Beside it the mass table, 64 bytes for every kept block and row, and 4ND bytes."""
    if backend == "triton fold":
        pytest.skip("the backward is that of triton")
    module = importlib.import_module(f"bco_fast.head.backends.{backend}")
    made = case(70, 700, 40, spread=6.0, ignored=0.0, zeros=0.0, bias=True)
    hidden, weight, bias, upstream = (
        t.float().to(DEVICE) for t in (made.hidden, made.weight, made.bias, made.upstream)
    )
    targets, workspace = made.targets.to(DEVICE), 400_000
    inputs = HeadInputs(hidden, weight, targets, bias, HeadSpec())
    with PeakBytes() as memory:
        out = module.forward(inputs, HeadWant(mass=True), workspace)
    assert memory.peak <= workspace + 4 * _bytes([out.mass]) + _bytes(out) + 4 * 70 * 40 + 64 * 70
    saved = HeadSaved(inputs, out.logps, out.row_max, out.row_sum, None, out.row_argmax, out.mass)
    width = module.MASS_TILE
    choice = choose_blocks(upstream, saved, 0.01, width=width, sharded=False, break_even=1.1, workspace_bytes=workspace)
    needs = HeadNeed(True, True, True), HeadNeed(False, True, False), HeadNeed(True, False, True)
    for need, scattered in [(need, False) for need in needs] + [(needs[0], True)] * (backend == "triton"):
        if backend == "triton":
            _forced(monkeypatch, scattered=scattered)
        with PeakBytes() as memory:
            grads = load_sparse(backend).backward(upstream, saved, choice.blocks, need, workspace)
        beside = _bytes(grads) + 64 * (len(choice.blocks.rows) + 70) + 4 * 70 * 40
        assert _bytes(grads) < memory.peak <= workspace + beside, (need, scattered)


def test_low_precision_operands_as_a_gpu_has_them(always, request):
    made = case(150, 700, 40, spread=6.0, ignored=0.1, zeros=0.0, bias=True)
    truth = run(made, "torch", torch.bfloat16)
    request.getfixturevalue("low_precision_matmuls")
    stats = HeadStats()
    ours = run(made, "torch", torch.bfloat16, sparse_tolerance=2.0**-9, stats=stats)
    assert stats.kept_fraction < 0.9
    for name, tensor in ours.items():
        assert relative_error(tensor, truth[name].double()) < 0.01, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_with_a_tolerance(backend):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    head = torch.tensor([0, 3, -100, 19, 5, -100]), None, 0.7, 5.0, 1.1, -100
    options = backend, 1 << 20, 0.1, False, False, True, None
    torch.library.opcheck(torch.ops.bco_fast.linear_logps, (hidden, weight, *head, *options))


def test_compiles_without_graph_breaks(always):
    hidden, weight, targets = torch.randn(30, 16), 3 * torch.randn(500, 16), torch.randint(0, 500, (30,))

    def gradients(function):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    def loss(h, w):
        return -fused_linear_logps(h.tanh(), w, targets, sparse_tolerance=0.05).mean()

    torch._dynamo.reset()
    compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for ours, eager in zip(compiled, gradients(loss), strict=True):
        assert torch.allclose(ours, eager, atol=1e-7)


def _sparse_shard(rank, world):
    # One rank is sparse, the other finds that all blocks are cheaper: they must still meet in one all-reduce.
    break_even = 1.1 if rank == 0 else 0.0
    load_sparse("torch").break_even = lambda dtype: break_even
    made = _from_logits("peaked", 30, 1000, 1)
    own = slice(0, 600) if rank == 0 else slice(600, 1000)
    stats = HeadStats()
    weight, hidden = made.weight[own].float().requires_grad_(), made.hidden.float().requires_grad_()
    logps = fused_linear_logps(
        hidden, weight, made.targets, sparse_tolerance=0.03, stats=stats, process_group=dist.group.WORLD
    )
    (logps * made.upstream).sum().backward()
    return weight.grad, hidden.grad, stats.kept_fraction, stats.error_bound


def test_shards_keep_the_bound_each_for_itself(tmp_path):
    truth = run(_from_logits("peaked", 30, 1000, 1), "reference", torch.float64)
    (first, d_hidden, kept_fraction, error_bound), (second, other, *dense) = ranks.run(_sparse_shard, 2, tmp_path)
    assert torch.equal(d_hidden, other)
    assert dense == [1.0, 0.0]
    assert kept_fraction < 0.9
    expected = truth["d_weight"]
    assert relative_error(second, expected[600:]) < 1e-5
    error = (first - expected[:600]).abs().sum()
    assert 1e-4 * expected[:600].abs().sum() < error <= error_bound * expected[:600].abs().sum() * 1.001
    assert error_bound <= 0.03
    assert relative_error(d_hidden, truth["d_hidden"]) < 0.1


def test_copies_of_hot_bins_change_no_threshold():
    """A GPU spreads additions to one bin over copies; sums of integers are exact in any order."""
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(40, 100, generator=g) ** 8
    cost[::3] = 1e-6  # most of them in one bin
    for share in (0.0, 0.01, 0.3, 1.0):
        found = [
            _threshold(lambda: iter([(slice(0, 40), cost)]), share * cost.double().sum(), replicas)
            for replicas in (1, 7, GPU_REPLICAS)
        ]
        assert len({(int(threshold), float(spent)) for threshold, spent in found}) == 1
