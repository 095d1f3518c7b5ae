"""What the papers claim of their losses, checked on the functions that are here."""

import math

import pytest
import torch

from bco_fast import RewardShift, losses
from bco_fast.losses.metrics import unpaired_metrics, unpaired_sums


def _rewards(kind, n=4000):
    """(chosen, rejected); "adverse": every combination of sizes from 1e-8 to 1e4, of both signs, pairs that are the wrong
    way round among them."""
    if kind == "adverse":
        sizes = torch.logspace(-8, 4, 30, dtype=torch.float64)
        values = torch.cat([-sizes, torch.zeros(1, dtype=torch.float64), sizes])
        chosen, rejected = torch.meshgrid(values, values, indexing="ij")
        return chosen.reshape(-1), rejected.reshape(-1)
    generator = torch.Generator().manual_seed({"random": 1, "far": 2, "equal": 3}[kind])
    r = torch.randn(2, n, generator=generator, dtype=torch.float64) * {"random": 3.0, "far": 200.0, "equal": 0.0}[kind]
    return r[0], r[1]


@pytest.mark.parametrize("delta", [0.0, 1.7, -30.0])
@pytest.mark.parametrize("kind", ["random", "far", "equal", "adverse"])
def test_bce_bounds_dpo_from_above_with_any_shift(kind, delta):
    """Theorems 1 and 3 of arXiv 2404.04656: -log σ(r_w - δ) - log σ(δ - r_l) > -log σ(r_w - r_l), pair by pair."""
    chosen, rejected = _rewards(kind)
    zeros, up = torch.zeros_like(chosen), torch.ones_like(chosen, dtype=torch.bool)
    bce = (
        losses.bco_loss(chosen, zeros, up, beta=1.0, delta=delta).per_example
        + losses.bco_loss(rejected, zeros, ~up, beta=1.0, delta=delta).per_example
    )
    dpo = losses.dpo_loss(chosen, rejected, zeros, zeros, beta=1.0).per_example
    assert (bce >= dpo * (1 - 4 * torch.finfo(torch.float64).eps)).all()
    # The gap is log1p(error / (1 + e^-(r_w - r_l))); below the resolution of the costs themselves it cannot be seen.
    error = torch.exp(-(chosen - delta)) + torch.exp(rejected - delta)
    gap = torch.log1p(error / (1 + torch.exp(rejected - chosen)))
    visible = gap > 8 * torch.finfo(torch.float64).eps * (1 + dpo)
    assert (bce[visible] > dpo[visible]).all()
    assert visible.any()


def test_the_gap_is_the_error_term():
    """Theorem 1's proof: BCE - DPO = log(1 + gap), and gap <= e^-(r_w - δ) + e^(r_l - δ), the error term that is logged."""
    chosen, rejected = _rewards("random")
    zeros, up = torch.zeros_like(chosen), torch.ones_like(chosen, dtype=torch.bool)
    for delta in (0.0, 0.8):
        bce = (
            losses.bco_loss(chosen, zeros, up, beta=1.0, delta=delta).per_example
            + losses.bco_loss(rejected, zeros, ~up, beta=1.0, delta=delta).per_example
        )
        dpo = losses.dpo_loss(chosen, rejected, zeros, zeros, beta=1.0).per_example
        error = torch.exp(-(chosen - delta)) + torch.exp(rejected - delta)
        inside = 1 + error + torch.exp(rejected - chosen)  # the product of the two BCE factors, multiplied out
        assert torch.allclose(bce, torch.log(inside), rtol=1e-9)
        assert torch.allclose(bce - dpo, torch.log1p(error / (1 + torch.exp(rejected - chosen))), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("r_w", "r_l"), [(1.0, -2.0), (0.3, 0.3), (-4.0, 5.0), (40.0, 30.0)])
def test_the_error_term_is_smallest_midway(r_w, r_l):
    """Theorem 4: e^-(r_w - δ) + e^(r_l - δ) over δ has its minimum at (r_w + r_l) / 2."""
    delta = torch.tensor((r_w + r_l) / 2, dtype=torch.float64)
    rewards = torch.tensor([r_w, r_l], dtype=torch.float64)

    def error(shift):
        sums = unpaired_sums(rewards, rewards, torch.tensor([True, False]), shift)
        return float(unpaired_metrics(sums)["error_term"])

    best = error(delta)
    assert all(error(delta + step) > best for step in (-1.0, -0.1, -1e-3, 1e-3, 0.1, 1.0))
    shift = RewardShift("batch")
    shift.observe(rewards, torch.tensor([True, False]))
    shift.step()
    assert math.isclose(float(shift.value), float(delta), rel_tol=1e-6, abs_tol=1e-7)


@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_over_a_batch_the_error_term_is_smallest_at_the_paper_s_shift(spread):
    """Theorem 4 in expectation: of E₊[e^-(r - δ)] + E₋[e^(r - δ)] the minimum is δ* = ½ log(E₋[e^r] / E₊[e^-r]), and where
    both classes scatter alike around their means that is (E₊[r] + E₋[r]) / 2, Eq. 7."""
    scatter = torch.randn(500, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * spread
    scatter = torch.cat([scatter, -scatter])
    rewards = torch.cat([1.7 + scatter, -0.4 + scatter])
    up = torch.arange(2000) < 1000

    def error(delta):
        return float(unpaired_metrics(unpaired_sums(rewards, rewards, up, delta))["error_term"])

    shift = RewardShift("batch")
    shift.observe(rewards, up)
    shift.step()
    delta = float(shift.value)
    exact = 0.5 * (torch.exp(rewards[~up]).mean() / torch.exp(-rewards[up]).mean()).log()
    assert math.isclose(delta, 0.65, rel_tol=1e-5)
    assert math.isclose(float(exact), 0.65, rel_tol=1e-9)
    grid = torch.linspace(-3, 4, 71, dtype=torch.float64).tolist()
    assert all(error(other) >= error(0.65) for other in grid)
    assert error(0.0) > 1.1 * error(0.65)  # what BCE pays for having no shift


def test_the_gradient_of_bco_over_that_of_kto_is_one_over_sigmoid():
    """Section 4.3: with δ = z = 0 and λ = 1, ∇BCO / ∇KTO = 1 / σ(r) for thumbs up and 1 / σ(-r) for thumbs down."""
    logps = torch.linspace(-8, 8, 33, dtype=torch.float64).requires_grad_()
    zeros = torch.zeros_like(logps)
    for up in (True, False):
        labels = torch.full((33,), up)
        bco = torch.autograd.grad(losses.bce_loss(logps, zeros, labels, beta=1.0).loss, logps)[0]
        kto = torch.autograd.grad(losses.kto_loss(logps, zeros, labels, kl=0.0, beta=1.0).loss, logps)[0]
        r = logps.detach() if up else -logps.detach()
        assert torch.allclose(bco / kto, 1 / torch.sigmoid(r), rtol=1e-9)


def test_bnfs_target_is_a_distribution_and_its_gradient_the_weight():
    """Eq. 6 of arXiv 2410.04834: non-negative, sums to 1; Eq. 8's factor off the target is bnf_weights."""
    torch.manual_seed(0)
    logits = (torch.randn(200, 31, dtype=torch.float64) * 3).requires_grad_()
    ref = (logits.detach() + torch.randn(200, 31, dtype=torch.float64)).softmax(-1)
    y = torch.randint(0, 31, (200,))
    pi = logits.softmax(-1)
    p, p_ref = pi.detach()[torch.arange(200), y], ref[torch.arange(200), y]
    given = (p / p_ref).clamp(max=1)
    target = pi.detach() * ((1 - given) / (1 - p))[:, None]
    target[torch.arange(200), y] = given
    assert (target >= 0).all()
    assert torch.allclose(target.sum(-1), torch.ones(200, dtype=torch.float64), rtol=1e-12)
    w = losses.bnf_weights(p.log(), p_ref.log())
    (grad,) = torch.autograd.grad(-(target * pi.log()).sum(), logits)
    expected = pi.detach() * w[:, None]
    expected[torch.arange(200), y] -= w
    assert torch.allclose(grad, expected, rtol=1e-8, atol=1e-12)
    assert ((w >= 0) & (w <= 1)).all()
    assert (w[p >= p_ref] == 1).all()
    assert (w[p < p_ref] < 1).all()


def test_una_on_pairs_is_dpo():
    """arXiv 2408.15339, section 2: UNA's pairwise loss is DPO's."""
    assert losses.una_pair_loss is losses.dpo_loss


@pytest.mark.parametrize("name", ["una_binary_mse", "una_binary_bce", "una_score", "una_reward"])
def test_una_is_smallest_where_implicit_and_explicit_reward_agree(name):
    """Its claim: the implicit reward fits the explicit one. Gradient 0 there, and none lower around it."""
    score = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    if name.startswith("una_binary"):  # a thumb is approached, not reached
        labels = torch.tensor([True, False, True])
        costs = [
            losses.LOSSES[name](torch.full((3,), x, dtype=torch.float64) * torch.tensor([1, -1, 1]), torch.zeros(3, dtype=torch.float64), labels, beta=1.0).loss
            for x in (-5.0, 0.0, 5.0, 20.0)
        ]  # fmt: skip
        assert costs == sorted(costs, reverse=True)
        return
    at = torch.logit(score) if name == "una_score" else score
    logps = at.clone().requires_grad_()
    out = losses.LOSSES[name](logps, torch.zeros(3, dtype=torch.float64), score, beta=1.0)
    (grad,) = torch.autograd.grad(out.loss, logps)
    assert float(out.loss.detach()) < 1e-30
    assert float(grad.abs().max()) < 1e-15


@pytest.mark.parametrize("name", ["una_binary_mse", "una_binary_bce"])
@pytest.mark.parametrize("share", [0.125, 0.5, 0.875])
def test_a_completion_that_some_like_gets_the_reward_of_its_share(name, share):
    """UNA Eq. 11 and 12: over thumbs up with probability p both costs are smallest at r = logit(p)."""
    labels = torch.arange(8) < 8 * share
    zeros = torch.zeros(8, dtype=torch.float64)

    def cost(r):
        return losses.LOSSES[name](torch.full((8,), r, dtype=torch.float64), zeros, labels, beta=1.0).loss

    best = math.log(share / (1 - share))
    at = torch.full((8,), best, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(losses.LOSSES[name](at, zeros, labels, beta=1.0).loss, at)
    assert abs(float(grad.sum())) < 1e-15
    assert all(cost(best + step) > cost(best) for step in (-3.0, -0.1, -1e-3, 1e-3, 0.1, 3.0))


def test_the_costs_of_a_policy_that_is_its_reference():
    """log 2 for BCO, half for KTO, a quarter for UNA's square, 1/(4β²) for IPO, 2 log 2 for NCA."""
    zeros, up = torch.zeros(4), torch.tensor([True, False, True, False])
    assert math.isclose(float(losses.bco_loss(zeros, zeros, up).loss), math.log(2), rel_tol=1e-6)
    assert math.isclose(float(losses.kto_loss(zeros, zeros, up, kl=0.0).loss), 0.5, rel_tol=1e-6)
    assert math.isclose(float(losses.una_binary_mse_loss(zeros, zeros, up).loss), 0.25, rel_tol=1e-6)
    assert math.isclose(float(losses.ipo_loss(zeros, zeros, zeros, zeros, beta=0.1).loss), 25.0, rel_tol=1e-6)
    assert math.isclose(float(losses.nca_loss(zeros, zeros, zeros, zeros).loss), 2 * math.log(2), rel_tol=1e-6)
