"""Our side of the comparisons with RLOO and PPO stays alive; the peers' environments are not needed for it."""

import argparse
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_our_side_runs_small(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import online_rloo

    monkeypatch.setattr(online_rloo, "SAMPLES", 1)
    small = ["--budget", "300", "--turns", "1", "--fine-tune-steps", "2", "--cases", online_rloo.OURS]
    online_rloo.main([*small, "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "online_rloo.json").read_text())["rows"]
    assert row["generated_tokens"] >= 300
    assert row["steps"] == 8  # one round is beyond the budget
    assert 0 <= row["reward"] <= 1
    assert abs(row["kl"]) > 1e-4  # the policy that was trained, not the start
    assert 0 < row["step_median_s"] < 60
    assert row["peak_mb"] >= row["before_mb"] > 0


@pytest.mark.slow
def test_our_side_runs_with_a_reward_model(tmp_path, monkeypatch):
    """Of the comparison with PPO; the peer's RewardTrainer is not needed for it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import online_ppo
    import online_rloo
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def prepare(folder, seed, steps):
        online_rloo.prepare(folder, seed, steps)
        AutoModelForSequenceClassification.from_pretrained(folder / "start", num_labels=1).save_pretrained(
            folder / "reward_model"
        )
        AutoTokenizer.from_pretrained(folder / "start").save_pretrained(folder / "reward_model")
        return online_ppo.evaluate(folder, seed)

    monkeypatch.setattr(online_rloo, "SAMPLES", 1)
    options = argparse.Namespace(seed=0, budget=300, turns=1, fine_tune_steps=2)
    cases = {online_ppo.OURS: (online_ppo.OURS, online_ppo.CASES[online_ppo.OURS])}
    (row,) = online_rloo.measure(cases, options, tmp_path, prepare, online_ppo.Rival, online_ppo.evaluate)
    assert row["steps"] == 8
    assert row["models_mb"] == pytest.approx(3 * row["trained_mb"], rel=0.1)  # the reward model has no lm-head
    assert row["model_reward"] != 0


def test_the_settings_against_ppo_are_the_tuned_ones(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import online_ppo

    rows, tuning = (
        json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["rows"]
        for name in ("online_ppo", "online_ppo_tuning")
    )
    best = max(tuning, key=lambda row: row["model_reward"])
    assert {row["seed"] for row in tuning} == {online_ppo.TUNING_SEED}
    assert best["learning_rate"] == online_ppo.CASES[online_ppo.PPO].learning_rate
    assert {(row["method"], row["seed"]) for row in rows} == {(name, seed) for name in online_ppo.CASES for seed in range(3)}  # fmt: skip
    for row in rows:
        case = online_ppo.CASES[row["method"]]
        assert (row["learning_rate"], row["beta"]) == (case.learning_rate, case.beta)
        assert row["generated_tokens"] >= 20_000
