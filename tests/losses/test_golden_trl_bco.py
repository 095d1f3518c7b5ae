"""δ, losses, rewards and gradients of TRL 1.12's BCOTrainer, step by step, from what its own code answered.

tests/golden/trl_1_12_bco.json was recorded by tests/golden/make_trl_bco.py in an environment of `make venv-peers`.
"""

import json
from pathlib import Path

import pytest
import torch

from bco_fast import RewardShift, bco_loss

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden").joinpath("trl_1_12_bco.json").read_text())
BETA, SEQUENCES = GOLDEN["beta"], GOLDEN["sequences"]


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.tensor(theirs), atol=1e-6, rtol=1e-6)


def replay(rows, shift):
    """Our shift and loss on the log-probs of each recorded call; -> (LossOutput, δ, the gradient, the row)."""
    for row in rows:
        logps = torch.tensor(row["logps"], requires_grad=True)
        ref_logps, labels = torch.tensor(row["ref_logps"]), torch.tensor(row["labels"])
        weight = torch.ones(len(labels))
        if "rejected_weight" in row:
            weight[~labels] = torch.tensor(row["rejected_weight"])
        if row["trains"]:  # observe, then use
            shift.observe(BETA * (logps.detach() - ref_logps), labels)
        out = bco_loss(logps, ref_logps, labels, beta=BETA, delta=shift, sample_weight=weight)
        out.loss.backward()
        yield out, shift.value, logps.grad, weight, row


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_the_cumulative_pooled_shift_is_the_former_bco_trainer(sequence):
    shift = RewardShift("cumulative", balanced=False, update="micro")
    for out, delta, gradient, weight, row in replay(SEQUENCES[sequence], shift):
        close(delta, row["delta"])
        close(out.rewards, row["rewards"])
        close(out.per_example.detach() * weight, row["losses"])
        close(out.loss.detach(), row["loss"])
        if "gradient" in row:
            close(gradient, row["gradient"])


def test_the_recording_holds_the_cases_it_is_for():
    """Several optimizer steps of two micro-batches, both classes alone, a short last batch, evaluation, one row."""
    training = [row for row in SEQUENCES["training"] if row["trains"]]
    assert {row["optimizer_step"] for row in training} == set(range(6))
    assert len(training) == 12
    assert {sum(row["labels"]) for row in training if len(row["labels"]) == 4} == {0, 1, 2, 3, 4}
    assert len(training[-1]["labels"]) == 2
    evaluation = [row for row in SEQUENCES["training"] if not row["trains"]]
    assert {row["delta"] for row in evaluation} == {training[-1]["delta"]}
    assert min(len(row["labels"]) for row in SEQUENCES["drawn"]) == 1
    assert max(abs(r) for row in SEQUENCES["drawn"] for r in row["rewards"]) > 15


@pytest.mark.parametrize("options", [{}, {"mode": "cumulative"}, {"mode": "cumulative", "balanced": False}])
def test_no_other_shift_is(options):
    """The agreement above would mean nothing if the paper's δ passed as well."""
    shift = RewardShift(**options)
    worst = 0.0
    for row, (_, delta, *_) in zip(SEQUENCES["drawn"], replay(SEQUENCES["drawn"], shift), strict=True):
        worst = max(worst, abs(float(delta) - row["delta"]))
        shift.step()
    assert worst > 0.1


def test_the_weights_are_the_clamped_density_ratio():
    """TRL's underlying distribution matching: thumbs down weigh p / (1 - p), clamped, with p the share of thumbs up."""
    ratio = GOLDEN["density_ratio"]
    assert (ratio["min"], ratio["max"]) == (0.5, 10.0)
    probabilities, weights = [], []
    for row in SEQUENCES["matched"]:
        probabilities += row.get("prob_desirable", [])
        weights += row.get("rejected_weight", [])
    p = torch.tensor(probabilities)
    close((p / (1 - p)).clamp(ratio["min"], ratio["max"]), weights)
    assert min(weights) == ratio["min"]
    assert max(weights) == ratio["max"]
    assert any(ratio["min"] < w < ratio["max"] for w in weights)
