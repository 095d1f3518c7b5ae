"""BCO and BCE are what the paper prints, and the drop-in gives the gradients of materialised logits."""

import math

import pytest
import torch
from heads import relative_error

from bco_fast import LossOutput, RewardShift, bce_loss, bco_loss, fused_bco_loss, fused_linear_logps, sequence_logps
from bco_fast.losses.metrics import auc, unpaired_metrics, unpaired_sums


def _batch(n=8, scale=3.0):
    logps = (torch.randn(n) * scale - 50).double().requires_grad_()
    ref = (logps.detach() + torch.randn(n).double() * scale).detach()
    return logps, ref, torch.arange(n) % 3 == 0


def test_bco_is_equation_8():
    logps, ref, labels = _batch()
    out = bco_loss(logps, ref, labels, beta=0.3, delta=0.7)
    expected = []
    for lp, rf, up in zip(logps.tolist(), ref.tolist(), labels.tolist(), strict=True):
        r = 0.3 * (lp - rf)
        expected.append(-math.log(1 / (1 + math.exp(-(r - 0.7)))) if up else -math.log(1 / (1 + math.exp(r - 0.7))))
    assert torch.allclose(out.per_example, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(out.loss, torch.tensor(expected).double().mean())
    assert torch.allclose(out.rewards, 0.3 * (logps - ref))
    assert not out.rewards.requires_grad
    assert not out.logps.requires_grad
    assert out.per_example.requires_grad


def test_bce_is_bco_without_shift():
    logps, ref, labels = _batch()
    assert torch.equal(bce_loss(logps, ref, labels).loss, bco_loss(logps, ref, labels, delta=0.0).loss)
    assert not torch.equal(bce_loss(logps, ref, labels).loss, bco_loss(logps, ref, labels, delta=1.0).loss)


def test_the_gradient_is_that_of_equation_8():
    logps, ref, labels = _batch()
    assert torch.autograd.gradcheck(lambda x: bco_loss(x, ref, labels, beta=0.5, delta=0.2).loss, [logps])
    (grad,) = torch.autograd.grad(bco_loss(logps, ref, labels, beta=0.5, delta=0.2).loss, logps)
    r = 0.5 * (logps.detach() - ref) - 0.2
    expected = torch.where(labels, -0.5 * torch.sigmoid(-r), 0.5 * torch.sigmoid(r)) / len(r)
    assert torch.allclose(grad, expected, rtol=1e-12)


def test_no_nan_at_rewards_of_ten_thousand():
    logps = torch.tensor([1e5, -1e5, 1e5, -1e5], requires_grad=True)
    out = bco_loss(logps, torch.zeros(4), torch.tensor([True, True, False, False]))
    out.loss.backward()
    assert out.loss.isfinite()
    assert logps.grad.isfinite().all()


def test_sample_weights_multiply_costs_before_the_mean():
    logps, ref, labels = _batch()
    weight = torch.rand(8).double()
    out = bco_loss(logps, ref, labels, sample_weight=weight)
    assert torch.allclose(out.loss, (out.per_example * weight).mean())


@pytest.mark.parametrize("up", [True, False])
def test_a_batch_of_one_class_is_legal(up):
    logps, ref, _ = _batch()
    out = bco_loss(logps, ref, torch.full((8,), up))
    assert out.loss.isfinite()
    assert math.isnan(out.metrics["rewards/rejected" if up else "rewards/chosen"])
    assert math.isfinite(out.metrics["rewards/chosen" if up else "rewards/rejected"])


def test_metrics_by_hand():
    r, logps = torch.tensor([1.0, 3.0, -1.0, 2.0]), torch.tensor([-5.0, -7.0, -9.0, -11.0])
    labels = torch.tensor([True, True, False, False])
    m = {k: float(v) for k, v in unpaired_metrics(unpaired_sums(r, logps, labels, 1.5)).items()}
    assert m["rewards/chosen"] == 2.0
    assert m["rewards/rejected"] == 0.5
    assert m["rewards/margins"] == 1.5
    assert m["rewards/accuracies"] == 0.5  # 1.0 < delta and 2.0 > delta are wrong
    assert (m["logps/chosen"], m["logps/rejected"]) == (-6.0, -10.0)
    expected = (math.exp(0.5) + math.exp(-1.5)) / 2 + (math.exp(-2.5) + math.exp(0.5)) / 2
    assert math.isclose(m["error_term"], expected)


def test_sums_add_up_over_micro_batches():
    r, logps, labels = torch.randn(12), torch.randn(12), torch.rand(12) > 0.5
    whole = unpaired_sums(r, logps, labels, 0.1)
    parts = sum(unpaired_sums(r[i : i + 4], logps[i : i + 4], labels[i : i + 4], 0.1) for i in (0, 4, 8))
    assert torch.allclose(whole, parts)


def test_auc_counts_pairs():
    rewards = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.4, -1.0])
    labels = torch.tensor([False, True, False, True, False, True])
    pairs = [(u > d) + 0.5 * (u == d) for u in rewards[labels].tolist() for d in rewards[~labels].tolist()]
    assert math.isclose(auc(rewards, labels), sum(pairs) / len(pairs))
    assert math.isnan(auc(rewards, torch.ones(6, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": torch.tensor([1, 0])}, TypeError, "labels must be a bool tensor"),
        ({"labels": [True, False]}, TypeError, "labels must be a bool tensor.*list"),
        ({"labels": torch.tensor([1.0, 0.0])}, TypeError, "labels must be a bool tensor"),
        ({"logps": torch.tensor([1, 2])}, TypeError, "logps must be floating point"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps \[3\]"),
        ({"logps": torch.zeros(2, 2)}, ValueError, "logps"),
        ({"ref_logps": torch.tensor([0.0, math.nan])}, ValueError, r"ref_logps\[1\]"),
        ({"logps": torch.tensor([math.inf, 0.0])}, ValueError, r"logps\[0\]"),
        ({"ref_logps": torch.zeros(2, requires_grad=True)}, ValueError, "requires grad"),
        ({"beta": 0.0}, ValueError, "beta"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"beta": math.nan}, ValueError, "beta"),
        ({"sample_weight": torch.tensor([1.0, -1.0])}, ValueError, r"sample_weight\[1\]"),
        ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight"),
        (
            {"logps": torch.zeros(0), "ref_logps": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.bool)},
            ValueError,
            "empty",
        ),
    ],
    ids=str,
)
def test_bad_input_is_named(changes, error, message):
    good = {"logps": torch.zeros(2), "ref_logps": torch.zeros(2), "labels": torch.tensor([True, False])}
    with pytest.raises(error, match=message):
        bco_loss(**(good | changes))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_fused_bco_loss_has_the_gradients_of_materialised_logits(packed, backend):
    b, t, d, v = 4, 9, 32, 300
    lengths = torch.tensor([9, 4, 7, 1])
    hidden, weight = torch.randn(b, t, d), torch.randn(v, d) * 0.3
    targets = torch.randint(0, v, (b, t))
    inside = torch.arange(t) < lengths[:, None]
    targets[~inside] = -100
    targets[0, :3] = -100
    labels, ref = torch.tensor([True, False, False, True]), torch.full((b,), -30.0)

    def materialised(h, w):
        log_probs = torch.log_softmax(h @ w.T, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        logps = torch.where(targets >= 0, log_probs, 0.0).sum(1)
        return bco_loss(logps, ref.to(logps), labels, beta=0.2, delta=0.4)

    def fused(h, w):
        if not packed:
            return fused_bco_loss(h, w, targets, labels, ref, beta=0.2, delta=0.4, backend=backend)
        cu = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
        return fused_bco_loss(
            h[inside], w, targets[inside], labels, ref, beta=0.2, delta=0.4, cu_seqlens=cu, backend=backend
        )

    results = {}
    for name, function, dtype in (("truth", materialised, torch.float64), ("plain", materialised, torch.float32), ("ours", fused, torch.float32)):  # fmt: skip
        leaves = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight)]
        out = function(*leaves)
        out.loss.backward()
        results[name] = (out.loss.detach(), out.per_example.detach(), *(leaf.grad for leaf in leaves))
    assert isinstance(out, LossOutput)
    for truth, plain, ours in zip(results["truth"], results["plain"], results["ours"], strict=True):
        assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + 4 * torch.finfo(torch.float32).eps


def test_the_drop_in_observes_only_where_it_trains():
    hidden, weight, targets = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 3))
    labels, ref = torch.tensor([True, False]), torch.full((2,), -8.0)
    shift = RewardShift(update="micro", mode="batch")
    fused_bco_loss(hidden, weight, targets, labels, ref, delta=shift)
    assert float(shift.value) == 0.0
    with torch.no_grad():
        fused_bco_loss(hidden.requires_grad_(), weight, targets, labels, ref, delta=shift)
    assert float(shift.value) == 0.0
    out = fused_bco_loss(hidden, weight, targets, labels, ref, delta=shift)
    assert math.isclose(float(shift.value), float(out.rewards.mean()), rel_tol=1e-5)
    assert math.isclose(float(out.metrics["delta"]), float(shift.value))


def test_sequence_logps_sums_and_means():
    values = torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
    assert torch.allclose(sequence_logps(values), values.sum(1))
    assert torch.allclose(sequence_logps(values, mask=mask), (values * mask).sum(1))
    assert torch.allclose(sequence_logps(values, mask=mask, reduction="mean"), (values * mask).sum(1) / mask.sum(1))
    flat, cu = values[mask], torch.tensor([0, 2, 7, 8])
    assert torch.allclose(sequence_logps(flat, cu_seqlens=cu), (values * mask).sum(1))
    assert torch.allclose(sequence_logps(flat, cu_seqlens=cu, reduction="mean"), (values * mask).sum(1) / mask.sum(1))
    assert torch.equal(sequence_logps(flat, cu_seqlens=torch.tensor([0, 0, 8])), torch.stack([flat.new_zeros(()), sequence_logps(flat[None])[0]]))  # fmt: skip
    assert torch.autograd.gradcheck(
        lambda x: sequence_logps(x, cu_seqlens=cu, reduction="mean"), [flat.double().requires_grad_()]
    )


def test_sums_of_many_tokens_keep_their_digits():
    values = torch.full((1, 100_000), -0.1)
    exact = values.double().sum()
    assert abs(float(sequence_logps(values)[0]) - float(exact)) <= abs(float(exact)) * 1e-7


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"token_logps": torch.zeros(3)}, ValueError, "without cu_seqlens"),
        ({"token_logps": torch.zeros(3), "cu_seqlens": torch.tensor([0, 2])}, ValueError, "rise from 0 to 3"),
        ({"token_logps": torch.zeros(3), "cu_seqlens": torch.tensor([0, 5, 3])}, ValueError, "rise from 0 to 3"),
        ({"token_logps": torch.zeros(3), "cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens"),
        ({"token_logps": torch.zeros(2, 3), "mask": torch.ones(2, 3)}, TypeError, "mask"),
        ({"token_logps": torch.zeros(2, 3), "mask": torch.ones(3).bool()}, ValueError, "mask"),
        ({"token_logps": torch.zeros(2, 3), "reduction": "max"}, ValueError, "'max'"),
        (
            {
                "token_logps": torch.zeros(2, 3),
                "mask": torch.tensor([[1, 0, 0], [0, 0, 0]]).bool(),
                "reduction": "mean",
            },
            ValueError,
            "sequence 1 has no token",
        ),
    ],
    ids=str,
)
def test_sequence_logps_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        sequence_logps(**kwargs)


def test_composing_is_the_same_as_the_drop_in():
    hidden, weight, targets = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randint(0, 20, (2, 3))
    labels, ref = torch.tensor([True, False]), torch.full((2,), -8.0)
    two_lines = bco_loss(sequence_logps(fused_linear_logps(hidden, weight, targets)), ref, labels, delta=0.1)
    assert torch.equal(two_lines.loss, fused_bco_loss(hidden, weight, targets, labels, ref, delta=0.1).loss)
