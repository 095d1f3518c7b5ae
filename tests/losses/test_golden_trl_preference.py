"""The losses on pairs, and KTO, against what TRL 1.16's own trainers answered on the same log-probs.

tests/golden/trl_1_16_preference.json was recorded by tests/golden/make_trl_dpo.py in an environment of `make venv-peers`.
"""

import json
from pathlib import Path

import pytest
import torch

from bco_fast import losses
from bco_fast.losses.divergence import DIVERGENCES

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden").joinpath("trl_1_16_preference.json").read_text())
LENGTHS = torch.tensor(GOLDEN["lengths"])
CHOSEN_LENGTHS, REJECTED_LENGTHS = LENGTHS.chunk(2)
BY_LENGTH = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}
PAIRS = len(CHOSEN_LENGTHS)
UP, DOWN = torch.ones(PAIRS, dtype=torch.bool), torch.zeros(PAIRS, dtype=torch.bool)


def close(ours, theirs):
    torch.testing.assert_close(ours.detach(), torch.tensor(theirs), atol=1e-6, rtol=1e-6)


def logps():
    """[2 * PAIRS], chosen first: the policy's, which carry the gradient, and the reference's."""
    return torch.tensor(GOLDEN["logps"], requires_grad=True), torch.tensor(GOLDEN["ref_logps"])


OURS = {
    "sigmoid": (losses.dpo_loss, {}),
    "ipo": (losses.ipo_loss, BY_LENGTH),
    "nca_pair": (losses.nca_loss, {}),
    "hinge": (losses.hinge_loss, {}),
    "sigmoid_norm": (losses.sigmoid_norm_loss, BY_LENGTH),
    "robust": (losses.robust_loss, {"label_smoothing": 0.1}),
    "exo_pair": (losses.exo_pair_loss, {"epsilon": 0.1}),
    "aot": (losses.aot_loss, {"label_smoothing": 0.1}),
    "aot_unpaired": (losses.aot_unpaired_loss, {"label_smoothing": 0.1}),
    **{name: (losses.LOSSES[name], {}) for name in ("bco_pair", "apo_zero", "apo_down", "sppo_hard", "discopop")},
}


@pytest.mark.parametrize("golden", GOLDEN["dpo"], ids=lambda g: f"{g['loss_type']}-{g['beta']}")
def test_dpo_trainer(golden):
    policy, ref = logps()
    chosen, rejected = policy.chunk(2)
    if golden["loss_type"] == "sft":
        out = losses.sft_loss(policy, torch.cat([UP, DOWN]), LENGTHS)
        loss, per_pair = out.loss, out.per_example[:PAIRS]
    else:
        function, options = OURS[golden["loss_type"]]
        per_pair = function(chosen, rejected, *ref.chunk(2), beta=golden["beta"], **options).per_example
        loss = per_pair.mean()
    if "losses" in golden:  # not of those that sort the batch
        close(per_pair, golden["losses"])
    close(loss, golden["loss"])
    close(torch.autograd.grad(loss, policy)[0], golden["gradient"])


@pytest.mark.parametrize("golden", [g for g in GOLDEN["dpo"] if g["loss_type"] == "sigmoid"], ids=lambda g: g["beta"])
def test_metrics_of_dpo_trainer(golden):
    policy, ref = logps()
    metrics = losses.dpo_loss(*policy.chunk(2), *ref.chunk(2), beta=golden["beta"]).metrics
    for name in ("rewards/margins", "rewards/accuracies"):
        close(torch.as_tensor(metrics[name], dtype=torch.float32), golden[name])


@pytest.mark.parametrize(
    "golden",
    GOLDEN["divergences"],
    ids=lambda g: f"{g['loss_type']}-{g['f_divergence_type']}-{g['f_alpha_divergence_coef']}",
)
def test_other_divergences_of_dpo_trainer(golden):
    policy, ref = logps()
    function, options = OURS[golden["loss_type"]]
    chosen = {"divergence": golden["f_divergence_type"], "divergence_alpha": golden["f_alpha_divergence_coef"]}
    out = function(*policy.chunk(2), *ref.chunk(2), beta=golden["beta"], **options, **chosen)
    close(out.per_example, golden["losses"])
    close(torch.autograd.grad(out.loss, policy)[0], golden["gradient"])
    if golden["loss_type"] != "ipo":  # whose rewards are those that it compares, means over tokens
        close(out.metrics["rewards/margins"].float(), golden["rewards/margins"])  # of log-ratios, in TRL too


def test_ipo_on_sums():
    policy, ref = logps()
    golden = GOLDEN["ipo_sums"]
    out = losses.ipo_loss(*policy.chunk(2), *ref.chunk(2), beta=golden["beta"])
    close(out.per_example, golden["losses"])
    by_token = losses.ipo_loss(*policy.chunk(2), *ref.chunk(2), beta=golden["beta"], **BY_LENGTH)
    assert (out.per_example - by_token.per_example).abs().min() > 1e-3


@pytest.mark.parametrize("golden", GOLDEN["cpo"], ids=lambda g: f"{g['loss_type']}-{g['beta']}")
def test_cpo_trainer(golden):
    chosen, rejected = logps()[0].chunk(2)
    beta, zeros = golden["beta"], torch.zeros(PAIRS)
    if golden["loss_type"] == "simpo":
        ours = losses.simpo_loss(chosen, rejected, beta=beta, gamma=golden["simpo_gamma"], **BY_LENGTH).per_example
    elif golden["loss_type"] == "hinge":
        ours = beta * losses.slic_loss(chosen, rejected, delta=1 / beta).per_example
    elif golden["loss_type"] == "sigmoid":
        smoothing = golden.get("label_smoothing", 0.0)
        ours = losses.dpo_loss(chosen, rejected, zeros, zeros, beta=beta, label_smoothing=smoothing).per_example
        if not smoothing:
            close(
                losses.cpo_loss(chosen, rejected, beta=beta, nll_weight=0.0, **BY_LENGTH).per_example, golden["losses"]
            )
    else:
        ours = losses.ipo_loss(chosen, rejected, zeros, zeros, beta=beta, **BY_LENGTH).per_example
    close(ours, golden["losses"])


@pytest.mark.parametrize("golden", GOLDEN["orpo"], ids=lambda g: g["beta"])
def test_orpo_trainer(golden):
    chosen, rejected = logps()[0].chunk(2)
    close(losses.orpo_loss(chosen, rejected, lam=golden["beta"], **BY_LENGTH).per_example, golden["losses"])


@pytest.mark.parametrize("golden", GOLDEN["kto"], ids=lambda g: f"{sum(g['labels'])}-of-{len(g['labels'])}")
def test_kto_trainer(golden):
    policy, ref = logps()
    rows, mismatched = golden["rows"], golden["mismatched"]
    kl = (policy - ref)[mismatched].mean()
    labels = torch.tensor(golden["labels"])
    if golden["loss_type"] == "kto":
        weights = {name: golden[name] for name in ("desirable_weight", "undesirable_weight")}
        out = losses.kto_loss(policy[rows], ref[rows], labels, kl=kl, beta=golden["beta"], **weights)
        close(out.metrics["kl"], golden["kl"])
    else:
        weight = torch.where(labels, golden["desirable_weight"], golden["undesirable_weight"])
        out = losses.apo_zero_unpaired_loss(policy[rows], ref[rows], labels, beta=golden["beta"], sample_weight=weight)
    close(out.loss, golden["loss"])
    (gradient,) = torch.autograd.grad(out.loss, policy)
    close(gradient[rows], golden["gradient"])


def test_the_recording_holds_the_cases_it_is_for():
    assert {golden["loss_type"] for golden in GOLDEN["dpo"]} == {*OURS, "sft"}
    kl = [golden["kl"] for golden in GOLDEN["kto"] if golden["loss_type"] == "kto"]
    assert min(kl) == 0  # clamped
    assert max(kl) > 0.1
    assert {sum(g["labels"]) / len(g["labels"]) for g in GOLDEN["kto"]} == {0.0, 0.25, 0.5, 0.75, 1.0}
    policy, ref = logps()
    assert (policy - ref).abs().max() > 20
    assert LENGTHS.min() == 1
    types = {(golden["f_divergence_type"], golden["f_alpha_divergence_coef"]) for golden in GOLDEN["divergences"]}
    assert {name for name, _ in types} == set(DIVERGENCES) - {"reverse_kl"}
    assert ("alpha_divergence", 1.0) in types  # the reverse KL again
    hinges = [golden["losses"] for golden in GOLDEN["dpo"] if golden["loss_type"] == "hinge"]
    assert all(min(values) == 0 < max(values) for values in hinges)
