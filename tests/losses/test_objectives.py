"""Every objective is its equation, computed here one number at a time; and BNF is its vocabulary-sized target."""

import math

import pytest
import torch

from bco_fast import RewardShift, fused_bco_loss, fused_bnf_loss, fused_linear_logps, losses
from bco_fast.losses import LOSSES, OBJECTIVES
from bco_fast.losses.bnf import bnf_weights
from bco_fast.losses.sequence import log1mexp

LABELS = torch.tensor([True, False, False, True, False])


def _f64(values):
    return torch.tensor(values, dtype=torch.float64)


SCORES = _f64([0.9, 0.1, 0.5, 0.7, 0.0])


def _sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x)


def _log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -700 else x


def _vectors(n=5, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * 3 - 20).double() for _ in range(count)]


UNPAIRED = {
    "bco": ({"beta": 0.3, "delta": 0.2}, lambda r, y, s: -_log_sigmoid((1 if y else -1) * (r - 0.2))),
    "bce": ({"beta": 0.3}, lambda r, y, s: -_log_sigmoid(r if y else -r)),
    "kto": (
        {"beta": 0.3, "kl": 2.0, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        lambda r, y, s: 1.5 * (1 - _sigmoid(r - 0.6)) if y else 0.7 * (1 - _sigmoid(0.6 - r)),
    ),
    "una_binary_mse": ({"beta": 0.3, "delta": 0.2}, lambda r, y, s: (_sigmoid(r - 0.2) - y) ** 2),
    "una_binary_bce": ({"beta": 0.3}, lambda r, y, s: -math.log(_sigmoid(r) if y else 1 - _sigmoid(r))),
    "apo_zero_unpaired": ({"beta": 0.3}, lambda r, y, s: _sigmoid(-r if y else r)),
    "una_score": ({"beta": 0.3, "delta": 0.2}, lambda r, y, s: (_sigmoid(r - 0.2) - s) ** 2),
    "una_reward": ({"beta": 0.3, "delta": 0.2}, lambda r, y, s: (r - 0.2 - s) ** 2),
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_equations(name):
    options, equation = UNPAIRED[name]
    logps, ref = _vectors(count=2)
    feedback = LABELS if OBJECTIVES[name].data == "labels" else SCORES
    out = LOSSES[name](logps, ref, feedback, **options)
    rewards = [0.3 * (a - b) for a, b in zip(logps.tolist(), ref.tolist(), strict=True)]
    expected = [equation(r, y, s) for r, y, s in zip(rewards, LABELS.tolist(), SCORES.tolist(), strict=True)]
    assert torch.allclose(out.per_example, _f64(expected), rtol=1e-12, atol=0)
    assert math.isclose(float(out.loss), sum(expected) / 5, rel_tol=1e-12)
    assert torch.allclose(out.rewards, _f64(rewards), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, ref, feedback, **options).loss, [logps.requires_grad_()])


LENGTHS = (torch.tensor([4, 9, 1, 30, 12]), torch.tensor([5, 3, 8, 25, 12]))
_by_length = {"chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1]}


def _log_odds(x):
    return x - math.log1p(-math.exp(x))


PAIRED = {  # of log-probs w, l, their references u, v, and lengths n, m
    "dpo": ({"beta": 0.3}, lambda w, l, u, v, n, m: -_log_sigmoid(0.3 * (w - u - l + v))),
    "una_pair": ({"beta": 0.3}, lambda w, l, u, v, n, m: -_log_sigmoid(0.3 * (w - u - l + v))),
    "ipo": ({"beta": 0.3}, lambda w, l, u, v, n, m: (w - u - l + v - 1 / 0.6) ** 2),
    "ipo by length": (
        {"beta": 0.3, **_by_length},
        lambda w, l, u, v, n, m: ((w - u) / n - (l - v) / m - 1 / 0.6) ** 2,
    ),
    "slic": ({"delta": 2.0, "sft_weight": 0.1}, lambda w, l, u, v, n, m: max(0, 2 - w + l) - 0.1 * w),
    "simpo": (
        {"beta": 2.5, "gamma": 0.4, **_by_length},
        lambda w, l, u, v, n, m: -_log_sigmoid(2.5 * w / n - 2.5 * l / m - 0.4),
    ),
    "orpo": (
        {"lam": 0.2, **_by_length},
        lambda w, l, u, v, n, m: -w / n - 0.2 * _log_sigmoid(_log_odds(w / n) - _log_odds(l / m)),
    ),
    "rdpo": (
        {"beta": 0.3, "alpha": 0.05, **_by_length},
        lambda w, l, u, v, n, m: -_log_sigmoid(0.3 * (w - u - l + v) + 0.05 * (n - m)),
    ),
    "hinge": ({"beta": 0.3}, lambda w, l, u, v, n, m: max(0, 1 - 0.3 * (w - u - l + v))),
    "sigmoid_norm": (
        {"beta": 5.0, **_by_length},
        lambda w, l, u, v, n, m: -_log_sigmoid(5 * ((w - u) / n - (l - v) / m)),
    ),
    "dpo forward_kl": (
        {"beta": 0.3, "divergence": "forward_kl"},
        lambda w, l, u, v, n, m: -_log_sigmoid(0.3 * (math.exp(v - l) - math.exp(u - w))),
    ),
    "hinge js_divergence": (
        {"beta": 0.3, "divergence": "js_divergence"},
        lambda w, l, u, v, n, m: max(0, 1 - 0.3 * (_log_sigmoid(w - u) - _log_sigmoid(l - v))),
    ),
    "sigmoid_norm alpha_divergence": (
        {"beta": 5.0, "divergence": "alpha_divergence", "divergence_alpha": 0.4, **_by_length},
        lambda w, l, u, v, n, m: (
            -_log_sigmoid(5 * ((math.exp(-0.6 * (w - u)) - 1) / n - (math.exp(-0.6 * (l - v)) - 1) / m) / -0.6)
        ),
    ),
    "ipo forward_kl": (
        {"beta": 0.3, "divergence": "alpha_divergence", "divergence_alpha": 0.0},
        lambda w, l, u, v, n, m: (math.exp(v - l) - math.exp(u - w) - 1 / 0.6) ** 2,
    ),
    "dpo smoothed": (
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda w, l, u, v, n, m: -0.8 * _log_sigmoid(0.3 * (w - u - l + v)) - 0.2 * _log_sigmoid(0.3 * (l - v - w + u)),
    ),
    "robust": (
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda w, l, u, v, n, m: (
            (-0.8 * _log_sigmoid(0.3 * (w - u - l + v)) + 0.2 * _log_sigmoid(0.3 * (l - v - w + u))) / 0.6
        ),
    ),
    "exo_pair": (
        {"beta": 0.3, "epsilon": 0.1},
        lambda w, l, u, v, n, m: sum(
            _sigmoid(x) * (_log_sigmoid(x) - math.log(q))
            for x, q in ((0.3 * (w - u - l + v), 0.9), (0.3 * (l - v - w + u), 0.1))
        ),
    ),
    "sppo_hard": ({"beta": 0.3}, lambda w, l, u, v, n, m: (w - u - 1 / 0.6) ** 2 + (l - v + 1 / 0.6) ** 2),
    "bco_pair": ({"beta": 0.3}, lambda w, l, u, v, n, m: -_log_sigmoid(0.3 * (w - u)) - _log_sigmoid(0.3 * (v - l))),
    "apo_zero": ({"beta": 0.3}, lambda w, l, u, v, n, m: _sigmoid(0.3 * (u - w)) + _sigmoid(0.3 * (l - v))),
    "apo_down": ({"beta": 0.3}, lambda w, l, u, v, n, m: _sigmoid(0.3 * (w - u)) + _sigmoid(0.3 * (l - v - w + u))),
    "discopop": (
        {"beta": 0.3, "tau": 0.4},
        lambda w, l, u, v, n, m: (
            -_sigmoid(-0.75 * (w - u - l + v)) * _log_sigmoid(0.3 * (w - u - l + v))
            + _sigmoid(0.75 * (w - u - l + v)) * math.exp(-0.3 * (w - u - l + v))
        ),
    ),
    "cpo": (
        {"beta": 0.3, "nll_weight": 0.5, **_by_length},
        lambda w, l, u, v, n, m: -_log_sigmoid(0.3 * (w - l)) - 0.5 * w / n,
    ),
    "nca": (
        {"beta": 0.3},
        lambda w, l, u, v, n, m: (
            -_log_sigmoid(0.3 * (w - u)) - 0.5 * (_log_sigmoid(-0.3 * (w - u)) + _log_sigmoid(-0.3 * (l - v)))
        ),
    ),
}


@pytest.mark.parametrize("case", PAIRED)
def test_paired_equations(case):
    name = case.split()[0]
    options, equation = PAIRED[case]
    vectors = _vectors()
    sides = vectors if OBJECTIVES[name].reference else vectors[:2]
    out = LOSSES[name](*sides, **options)
    expected = [equation(*numbers) for numbers in zip(*(x.tolist() for x in (*vectors, *LENGTHS)), strict=True)]
    assert torch.allclose(out.per_example, _f64(expected), rtol=1e-12)
    assert math.isclose(float(out.loss), sum(expected) / 5, rel_tol=1e-12)
    assert torch.equal(out.labels, torch.tensor([True] * 5 + [False] * 5))
    assert torch.equal(out.logps, torch.cat(vectors[:2]))
    ranked = (out.rewards[:5] > out.rewards[5:]).double().mean()
    assert float(out.metrics["rewards/accuracies"]) == float(ranked)
    leaves = [v.requires_grad_() for v in sides[:2]]
    assert torch.autograd.gradcheck(lambda w, l: LOSSES[name](w, l, *sides[2:], **options).loss, leaves)


def test_every_objective_has_its_equation_here():
    named = {*UNPAIRED, *(case.split()[0] for case in PAIRED), "bnf", "sft", "aot", "aot_unpaired"}
    assert named == set(OBJECTIVES)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("aot", lambda w, l, u, v: u - v, lambda w, l, u, v: w - l), ("aot_unpaired", lambda w, l, u, v: l - v, lambda w, l, u, v: w - u)],
)  # fmt: skip
def test_aot_compares_what_it_has_sorted(name, low, high):
    vectors = _vectors(7)
    out = LOSSES[name](*vectors, beta=0.3, label_smoothing=0.2)
    gaps = [0.3 * (a - b) for a, b in zip(sorted(high(*vectors).tolist()), sorted(low(*vectors).tolist()), strict=True)]
    expected = [-0.8 * _log_sigmoid(gap) - 0.2 * _log_sigmoid(-gap) for gap in gaps]
    assert torch.allclose(out.per_example, _f64(expected), rtol=1e-12)
    assert math.isclose(float(out.loss), sum(expected) / 7, rel_tol=1e-12)
    shuffled = LOSSES[name](
        *(vector[torch.tensor([3, 1, 6, 0, 2, 5, 4])] for vector in vectors), beta=0.3, label_smoothing=0.2
    )
    assert torch.equal(shuffled.per_example, out.per_example)
    assert not torch.allclose(out.loss, losses.dpo_loss(*vectors, beta=0.3, label_smoothing=0.2).loss)
    leaves = [v.requires_grad_() for v in vectors[:2]]
    assert torch.autograd.gradcheck(lambda w, l: LOSSES[name](w, l, *vectors[2:], beta=0.3).loss, leaves)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["dpo", "ipo", "robust", "exo_pair", "hinge", "sigmoid_norm", "discopop"])
def test_no_nan_under_any_divergence(name, divergence):
    """Log-ratios of ±1,000 nats, where e^1000 is infinite."""
    far = torch.tensor([-1e3, 1e3, 1e3, -1e3, 0.0])
    w, l = far.clone().requires_grad_(), -far.clone().requires_grad_()
    l = l.detach().requires_grad_()
    by = {"chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1]} if name == "sigmoid_norm" else {}
    out = LOSSES[name](w, l, torch.zeros(5), torch.zeros(5), divergence=divergence, **by)
    out.loss.backward()
    assert w.grad.isfinite().all()
    assert l.grad.isfinite().all()
    assert not out.per_example.isnan().any()


def test_sft_is_the_mean_over_tokens_of_thumbs_up():
    logps = _vectors(count=1)[0].requires_grad_()
    lengths = LENGTHS[0]
    out = losses.sft_loss(logps, LABELS, lengths)
    assert torch.allclose(out.loss, -(logps * LABELS).sum() / (lengths * LABELS).sum())
    nobody = losses.sft_loss(logps, torch.zeros(5, dtype=torch.bool), lengths)
    nobody.loss.backward()
    assert float(nobody.loss.detach()) == 0.0
    assert torch.equal(logps.grad, torch.zeros(5).double())


@pytest.mark.parametrize("name", ["bco", "bce", "kto", "una_binary_mse", "una_binary_bce", "una_score", "una_reward"])
def test_class_mean_is_the_sum_of_the_two_class_means(name):
    logps, ref = _vectors(count=2)
    feedback = LABELS if OBJECTIVES[name].data == "labels" else SCORES
    options = {"kl": 0.5} if name == "kto" else {}
    weight = torch.rand(5).double()
    out = LOSSES[name](logps, ref, feedback, reduction="class_mean", sample_weight=weight, **options)
    cost = out.per_example * weight
    assert torch.allclose(out.loss, cost[LABELS].mean() + cost[~LABELS].mean())
    one_class = torch.ones(5, dtype=torch.bool) if feedback is LABELS else torch.ones(5).double()
    alone = LOSSES[name](logps, ref, one_class, reduction="class_mean", **options)
    assert torch.allclose(alone.loss, alone.per_example.mean())


# ---- BNF


def _literal_bnf(logits, ref_logits, targets, labels, lengths):
    """Eq. 4 to 6 as printed, with a target distribution over the vocabulary."""
    pi, ref = logits.softmax(-1), ref_logits.softmax(-1)
    costs = []
    for row, label in enumerate(labels.tolist()):
        total = 0.0
        for t in range(int(lengths[row])):
            y = int(targets[row, t])
            p, p_ref = pi[row, t].detach(), ref[row, t]
            given = torch.clamp(p[y] / p_ref[y], max=1.0)
            target = p * (1 - given) / (1 - p[y])
            target[y] = given
            assert math.isclose(float(target.sum()), 1.0, rel_tol=1e-12)
            total = total + (target * pi[row, t].log()).sum()
        costs.append(-(1 if label else -1) / lengths[row] * total)
    return torch.stack(costs)


@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["flat", "peaked"])
def test_bnf_is_equations_4_to_6_with_a_vocabulary_sized_target(scale):
    torch.manual_seed(0)
    b, t, v = 4, 6, 23
    logits = (torch.randn(b, t, v).double() * scale).requires_grad_()
    ref_logits = logits.detach() + torch.randn(b, t, v).double()
    targets = torch.randint(0, v, (b, t))
    targets[:, :3] = logits[:, :3].argmax(-1)
    labels, lengths = torch.tensor([True, False, True, False]), torch.tensor([6, 4, 1, 6])
    mask = torch.arange(t) < lengths[:, None]

    log_pi = logits.log_softmax(-1)
    logps = log_pi.gather(-1, targets[..., None])[..., 0]
    ref_logps = ref_logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    out = losses.bnf_loss(logps, ref_logps, labels, mask=mask, entropy=entropy)
    expected = _literal_bnf(logits, ref_logits, targets, labels, lengths)
    assert torch.allclose(out.per_example, expected, rtol=1e-6, atol=0)
    (ours,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.mean(), logits, retain_graph=True)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    packed = losses.bnf_loss(
        logps[mask], ref_logps[mask], labels,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), entropy=entropy[mask],
    )  # fmt: skip
    assert torch.allclose(packed.per_example, out.per_example, rtol=1e-12)
    # without the entropy only the value changes
    bare = losses.bnf_loss(logps, ref_logps, labels, mask=mask)
    assert not torch.allclose(bare.loss, out.loss)
    assert torch.allclose(torch.autograd.grad(bare.loss, logits)[0], ours, rtol=1e-12)


def test_the_bnf_gradient_has_equation_9s_two_branches():
    """Full strength where the policy already exceeds the reference, the odds ratio where it has fallen below."""
    p = _f64([0.6, 0.3, 0.5, 1 - 1e-12])
    ref = _f64([0.5, 0.6, 0.5, 1 - 1e-13])
    w = bnf_weights(p.log(), ref.log())
    assert float(w[0]) == 1.0
    assert math.isclose(float(w[1]), (0.3 / 0.7) / (0.6 / 0.4), rel_tol=1e-12)
    assert float(w[2]) == 1.0
    assert math.isclose(float(w[3]), 0.1, rel_tol=0.02)  # 1 - 1e-13 has three digits left in float64


def test_bnf_weights_at_the_ends():
    minus, zero = -1e4, 0.0
    logps = torch.tensor([zero, -1e-30, minus, minus, zero])
    ref = torch.tensor([zero, zero, zero, -2.0, minus])
    assert bnf_weights(logps, ref).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_log1mexp_is_exact_at_both_ends():
    x = _f64([-1e-300, -1e-9, -0.5, -0.7, -40.0, -700.0])
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert torch.allclose(log1mexp(x), _f64(expected), rtol=1e-14)
    assert float(log1mexp(torch.tensor(0.0))) == -math.inf


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [fused_bco_loss, fused_bnf_loss])
def test_a_fused_loss_compiles_without_graph_breaks(fused, packed):
    hidden, weight, targets = torch.randn(2, 6, 8), torch.randn(50, 8), torch.randint(0, 50, (2, 6))
    targets[:, 0] = -100
    labels, ref = torch.tensor([True, False]), torch.zeros(2) if fused is fused_bco_loss else torch.zeros(2, 6)
    options = {}
    if packed:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        ref = ref if fused is fused_bco_loss else ref.flatten()
        options["cu_seqlens"] = torch.tensor([0, 5, 12])

    def gradients(compiler):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        compiler(lambda h, w: fused(h, w, targets, labels, ref, **options).loss)(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    torch._dynamo.reset()
    compiled = gradients(lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    for ours, eager in zip(compiled, gradients(lambda f: f), strict=True):
        assert torch.allclose(ours, eager, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_fused_bnf_is_bnf_of_materialised_logits(backend):
    b, t, d, v = 3, 7, 16, 200
    hidden, weight = torch.randn(b, t, d), torch.randn(v, d) * 0.4
    targets = torch.randint(0, v, (b, t))
    targets[0, :3] = targets[1, 5:] = -100
    labels, mask = torch.tensor([True, False, True]), targets >= 0
    ref = torch.where(mask, -torch.rand(b, t) * 6, torch.nan)

    def grads(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        out = function(*leaves)
        out.loss.backward()
        return [out.loss.detach(), out.per_example.detach(), *(leaf.grad for leaf in leaves)]

    def materialised(h, w):
        log_pi = (h @ w.T).log_softmax(-1)
        logps = log_pi.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return losses.bnf_loss(logps, ref.to(h.dtype), labels, mask=mask, entropy=-(log_pi.exp() * log_pi).sum(-1))

    truth = grads(materialised, torch.float64)
    for mine, exact in zip(
        grads(lambda h, w: fused_bnf_loss(h, w, targets, labels, ref, backend=backend), torch.float32), truth, strict=True
    ):  # fmt: skip
        assert (mine - exact).norm() <= 2e-6 * exact.norm()
    cu = torch.tensor([0, 7, 14, 21])
    packed = fused_bnf_loss(
        hidden.flatten(0, 1), weight, targets.flatten(), labels, ref.flatten(), cu_seqlens=cu, backend=backend
    )
    assert torch.allclose(packed.per_example.double(), truth[1], rtol=1e-5)


def test_bnf_never_builds_a_tensor_of_the_vocabulary():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    n, v = 64, 5000
    logps = fused_linear_logps(torch.randn(4, 16, 8), torch.randn(v, 8), torch.randint(0, v, (4, 16)))
    with Watch():
        losses.bnf_loss(logps, logps - 1, torch.arange(4) > 1, mask=torch.ones(4, 16, dtype=torch.bool), entropy=-logps)
    assert max(sizes) <= n


# ---- at the edges


def _call(name, w, l=None, labels=LABELS, lengths=None):
    """Any objective on vectors of policy log-probs, reference 0."""
    objective = OBJECTIVES[name]
    lengths = torch.full((len(w),), 7) if lengths is None else lengths
    if name == "bnf":
        return losses.bnf_loss(w[:, None], torch.full_like(w, -1.0)[:, None], labels, mask=torch.ones(len(w), 1).bool())
    if objective.data == "pairs":
        refs = [torch.zeros_like(w)] * 2 if objective.reference else []
        by = {"chosen_lengths": lengths, "rejected_lengths": lengths} if objective.lengths else {}
        return objective.loss(w, l, *refs, **by)
    if name == "sft":
        return losses.sft_loss(w, labels, lengths)
    feedback = labels if objective.data == "labels" else labels.to(w.dtype)
    return objective.loss(w, torch.zeros_like(w), feedback, **({"kl": 0.0} if name == "kto" else {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_nan_at_rewards_of_ten_thousand(name):
    positive = (
        0.0 if name in ("bnf", "orpo", "simpo", "slic", "sft", "cpo") else 1.0
    )  # log-probabilities have no reference
    w = torch.tensor([-1e6, positive * 1e6, -1e6, positive * 1e6, 0.0]).requires_grad_()
    l = torch.tensor([positive * 1e6, -1e6, -1e6, positive * 1e6, 0.0]).requires_grad_()
    out = _call(name, w, l)
    out.loss.backward()
    assert out.per_example.isfinite().all()
    for leaf in (w, l):
        assert leaf.grad is None or leaf.grad.isfinite().all()
    assert w.grad.abs().max() > 0


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.data != "pairs"])
def test_one_class_is_legal(name, up):
    out = _call(name, -torch.rand(5) * 5, labels=torch.full((5,), up))
    assert out.loss.isfinite()
    assert out.metrics["rewards/rejected" if up else "rewards/chosen"].isnan()


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.lengths])
def test_an_empty_completion_is_refused_by_row(name):
    lengths = torch.tensor([3, 1, 0, 5, 2])
    with pytest.raises(ValueError, match=r"lengths\[2\] is 0: an empty completion"):
        _call(name, -torch.rand(5), -torch.rand(5), lengths=lengths)


def test_bnf_refuses_an_empty_completion_by_row():
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        losses.bnf_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([True, False]), mask=mask)


def test_a_shift_moves_una():
    logps, ref = _vectors(count=2)
    shift = RewardShift("fixed", initial=0.4)
    for name in ("una_binary_mse", "una_binary_bce", "una_score", "una_reward"):
        feedback = LABELS if OBJECTIVES[name].data == "labels" else SCORES
        moved = LOSSES[name](logps, ref, feedback, delta=shift)
        assert torch.allclose(moved.loss, LOSSES[name](logps, ref, feedback, delta=0.4).loss, rtol=1e-6)
        assert not torch.allclose(moved.loss, LOSSES[name](logps, ref, feedback).loss)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: losses.kto_loss(*v[:2], LABELS, kl=torch.zeros(5)), ValueError, "one number"),
        (lambda v: losses.kto_loss(*v[:2], LABELS, kl=0.0, desirable_weight=-1.0), ValueError, "desirable_weight"),
        (lambda v: losses.una_score_loss(*v[:2], SCORES * 2), ValueError, r"scores\[0\] is 1.8: outside"),
        (lambda v: losses.una_score_loss(*v[:2], LABELS), TypeError, "scores must be floating"),
        (lambda v: losses.bco_loss(*v[:2], LABELS, reduction="sum"), ValueError, "'sum'"),
        (lambda v: losses.dpo_loss(v[0], v[1][:3], v[2], v[3]), ValueError, r"rejected_logps \[3\]"),
        (lambda v: losses.dpo_loss(*v, beta=0.0), ValueError, "beta"),
        (lambda v: losses.dpo_loss(*v, divergence="kl"), ValueError, "divergence must be one of reverse_kl"),
        (lambda v: losses.dpo_loss(*v, divergence_alpha=math.inf), ValueError, "divergence_alpha must be finite"),
        (lambda v: losses.aot_loss(v[0], v[1][:3], v[2], v[3]), ValueError, r"rejected_logps \[3\]"),
        (lambda v: losses.dpo_loss(v[0], v[1], v[2].clone().requires_grad_(), v[3]), ValueError, "requires grad"),
        (lambda v: losses.ipo_loss(*v, chosen_lengths=LENGTHS[0]), ValueError, "both lengths"),
        (lambda v: losses.simpo_loss(*v[:2], **_by_length, gamma=-1.0), ValueError, "gamma"),
        (lambda v: losses.slic_loss(*v[:2], delta=0.0), ValueError, "delta"),
        (lambda v: losses.orpo_loss(*v[:2], **_by_length, lam=math.nan), ValueError, "lam"),
        (lambda v: losses.orpo_loss(*v[:2], chosen_lengths=LENGTHS[0].double(), rejected_lengths=LENGTHS[1]), TypeError, "chosen_lengths"),
        (lambda v: losses.bnf_loss(v[0], v[1], LABELS), ValueError, "mask"),
        (lambda v: losses.bnf_loss(v[0][None], v[1][None], LABELS, mask=torch.ones(1, 5).bool()), ValueError, "labels"),
        (lambda v: losses.dpo_loss(v[0], v[1] / 0, v[2], v[3]), ValueError, r"rejected_logps\[0\]"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(_vectors())
