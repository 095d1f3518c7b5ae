"""δ is the midpoint of the class means (BCO Eq. 7), moves once an optimizer step, and survives a restart."""

import itertools
import json
import math

import pytest
import ranks
import torch

from bco_fast import RewardShift
from bco_fast.losses import OBJECTIVES
from bco_fast.losses.metrics import unpaired_sums


def _observe(shift, up, down):
    shift.observe(torch.tensor([*up, *down]), torch.tensor([True] * len(up) + [False] * len(down)))


def test_the_midpoint_weighs_both_classes_the_same():
    """80 / 20 data: the pooled mean would be pulled to the larger class."""
    shift = RewardShift("batch")
    _observe(shift, [1.0] * 8, [-1.0] * 2)
    assert float(shift.value) == 0.0
    shift.step()
    assert float(shift.value) == 0.0
    pooled = RewardShift("batch", balanced=False)
    _observe(pooled, [1.0] * 8, [-1.0] * 2)
    pooled.step()
    assert math.isclose(float(pooled.value), 0.6, rel_tol=1e-6)


def test_weights_count_as_repeated_rows_do():
    """A weight of 3 is three rows, in δ and in every logged mean; a weight of 0 is no row, whatever its reward."""
    rewards, labels = torch.tensor([1.0, 2.0, -1.0, float("inf")]), torch.tensor([True, True, False, False])
    times, finite = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1, 2, 2])
    for options in ({"mode": "ema"}, {"mode": "cumulative"}, {"mode": "batch", "balanced": False}):
        weighted, repeated = RewardShift(**options), RewardShift(**options)
        for scale in (1.0, 2.0):
            weighted.observe(rewards * scale, labels, times)
            repeated.observe(rewards[finite] * scale, labels[finite])
            weighted.step()
            repeated.step()
            assert float(weighted.value) == float(repeated.value) != 0
    sums = unpaired_sums(rewards, rewards, labels, 0.1, weight=times)
    assert torch.allclose(sums, unpaired_sums(rewards[finite], rewards[finite], labels[finite], 0.1), rtol=1e-12)
    small = RewardShift("batch")  # weights below 1 are no smaller a mean
    small.observe(torch.tensor([4.0, 2.0]), torch.tensor([True, False]), torch.tensor([0.25, 0.01]))
    small.step()
    assert float(small.value) == 3.0


def test_an_objective_counts_rows_as_its_costs_do():
    """`weight` times λ, in δ and in the metrics of `Objective.run`."""
    labels, r = torch.tensor([True, True, False]), torch.tensor([1.0, 4.0, -2.0])
    batch = {
        "cu_completions": torch.arange(4), "label": labels, "ref_logps": torch.zeros(3), "score": torch.zeros(3),
        "weight": torch.tensor([1.0, 2.0, 1.0]),
    }  # fmt: skip
    shift = RewardShift("batch")
    out = OBJECTIVES["bco"].run(r, batch, {"beta": 1.0}, shift=shift, observe=True, class_weights=(1.0, 5.0))
    shift.step()
    assert float(shift.value) == (3.0 - 2.0) / 2
    metrics = {name: float(value) for name, value in out.metrics.items()}
    assert metrics["rewards/chosen"] == 3.0
    assert metrics["rewards/accuracies"] == 1.0
    assert math.isclose(metrics["error_term"], (math.exp(-1) + 2 * math.exp(-4)) / 3 + math.exp(-2), rel_tol=1e-9)
    wrong = OBJECTIVES["bco"].run(-r, batch, {"beta": 1.0}, shift=RewardShift("fixed"), class_weights=(1.0, 5.0))
    assert float(wrong.metrics["rewards/accuracies"]) == 0.0
    half = OBJECTIVES["bco"].run(r.abs(), batch, {"beta": 1.0}, shift=RewardShift("fixed"), class_weights=(1.0, 5.0))
    assert float(half.metrics["rewards/accuracies"]) == 3 / 8


def test_trls_shift_takes_no_weights():
    trls = RewardShift("cumulative", balanced=False, update="micro")
    trls.observe(torch.tensor([1.0, 3.0]), torch.tensor([True, False]), torch.tensor([5.0, 1.0]))
    assert float(trls.value) == 2.0


def test_ema_moves_each_class_mean():
    shift = RewardShift("ema", decay=0.9)
    _observe(shift, [2.0], [0.0])
    shift.step()
    assert float(shift.value) == 1.0
    _observe(shift, [4.0], [0.0])
    shift.step()
    assert math.isclose(float(shift.value), (0.9 * 2 + 0.1 * 4) / 2, rel_tol=1e-6)


def test_cumulative_is_the_mean_of_everything():
    shift = RewardShift("cumulative", balanced=False, update="micro")
    seen = []
    for batch in ([1.0, 2.0], [5.0], [-3.0, 0.5, 4.0]):
        seen += batch
        shift.observe(torch.tensor(batch), torch.zeros(len(batch), dtype=torch.bool))
        assert math.isclose(float(shift.value), sum(seen) / len(seen), rel_tol=1e-6)


def test_step_sees_whole_optimizer_steps_whatever_the_accumulation():
    rewards, labels = torch.randn(8), torch.arange(8) % 2 == 0
    values = []
    for size in (1, 2, 4, 8):
        shift = RewardShift()
        for _ in range(3):
            for i in range(0, 8, size):
                before = shift.value.clone()
                shift.observe(rewards[i : i + size], labels[i : i + size])
                assert torch.equal(shift.value, before)
            shift.step()
        values.append(float(shift.value))
    assert max(values) - min(values) < 1e-7
    assert values[0] != 0.0


def test_an_absent_class_keeps_its_mean_and_an_unseen_one_is_left_out():
    shift = RewardShift("ema", decay=0.5)
    _observe(shift, [4.0], [])
    shift.step()
    assert float(shift.value) == 4.0
    _observe(shift, [], [-2.0])
    shift.step()
    assert float(shift.value) == 1.0
    _observe(shift, [6.0], [])
    shift.step()
    assert float(shift.value) == (5.0 - 2.0) / 2


def test_fixed_never_moves():
    shift = RewardShift("fixed", initial=0.25)
    _observe(shift, [4.0], [1.0])
    shift.step()
    assert float(shift.value) == 0.25


def test_one_infinite_reward_does_not_poison_the_other_class():
    shift = RewardShift("batch")
    _observe(shift, [math.inf], [1.0])
    shift.step()
    assert float(shift._state[0, 1]) == 1.0


def test_state_survives_json_in_the_middle_of_a_step():
    shift, twin = RewardShift(), RewardShift()
    _observe(shift, [1.0, 2.0], [0.5])
    shift.step()
    _observe(shift, [3.0], [])
    twin.load_state_dict(json.loads(json.dumps(shift.state_dict())))
    for s in (shift, twin):
        _observe(s, [], [-1.0])
        s.step()
    assert torch.equal(shift.value, twin.value)
    with pytest.raises(ValueError, match="decay"):
        RewardShift(decay=0.5).load_state_dict(shift.state_dict())


def test_gradient_never_flows_into_it():
    shift = RewardShift(update="micro")
    shift.observe(torch.ones(2, requires_grad=True), torch.tensor([True, False]))
    assert not shift.value.requires_grad


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: RewardShift("mean"), ValueError),
        (lambda: RewardShift(update="always"), ValueError),
        (lambda: RewardShift(decay=1.0), ValueError),
        (lambda: RewardShift(decay=math.nan), ValueError),
        (lambda: RewardShift().observe(torch.ones(2), torch.ones(2)), TypeError),
        (lambda: RewardShift().observe(torch.ones(2), torch.tensor([True])), ValueError),
    ],
)
def test_refuses(build, error):
    with pytest.raises(error):
        build()


SETTINGS = list(itertools.product(("ema", "cumulative", "batch", "fixed"), (True, False), ("step", "micro")))


def _values(parts):
    """δ in every mode after each of two optimizer steps of two micro-batches; `parts` are this rank's rows of them."""
    rewards = torch.tensor([1.0, 4.0, -2.0, 0.5, 3.0, -1.0])
    labels = torch.tensor([True, True, False, False, True, False])
    out = []
    for mode, balanced, update in SETTINGS:
        shift = RewardShift(mode, 0.7, balanced, update, initial=0.25)
        for step in range(2):
            for rows in parts:
                shift.observe(rewards[rows] * (step + 1), labels[rows])
            shift.step()
            out.append(float(shift.value))
    return out


def _values_of_rank(rank, world):
    return _values([[[0, 1], [4]], [[2], [3, 5]]][rank])


def test_ranks_share_one_value(tmp_path):
    """In every mode; rank 1 never sees a thumbs up, and both ranks end with the δ of all rows."""
    first, second = ranks.run(_values_of_rank, 2, tmp_path)
    alone = _values([[0, 1, 2], [4, 3, 5]])
    assert first == second
    assert torch.allclose(torch.tensor(first), torch.tensor(alone), rtol=1e-6)
    assert len(set(alone)) > 8  # the settings differ
