"""Our side of the comparisons with RLOO and PPO stays alive; the peers' environments are not needed for it."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForSequenceClassification, LlamaConfig

from bco_fast.cli.demo import all_prompts

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

    monkeypatch.setattr(online_ppo, "peers_python", lambda package: sys.executable)
    monkeypatch.setattr(online_rloo, "SAMPLES", 1)
    options = argparse.Namespace(seed=0, budget=300, turns=1, fine_tune_steps=2)
    cases = {online_ppo.OURS: (online_ppo.OURS, online_ppo.CASES[online_ppo.OURS])}
    (row,) = online_rloo.measure(cases, options, tmp_path, prepare, online_ppo.Rival, online_ppo.evaluate)
    assert row["steps"] == 8
    assert row["models_mb"] == pytest.approx(3 * row["trained_mb"], rel=0.1)  # the reward model has no lm-head
    assert row["model_reward"] != 0


class Here:
    """Stands in for our method's process: its trainer in this one, for a step."""

    def __init__(self, name, case, world, folder, options):
        self.case, self.folder, self.turns, self.options = case, folder, [], options
        folder.mkdir()
        for shared in ("start", "prompts.json", "reward_model"):
            (folder / shared).symlink_to(world / shared)

    def answer(self):
        pass

    def stop(self):
        pass

    def turn(self):
        import online_ppo

        tokens = []
        case = dataclasses.replace(self.case, steps_per_round=1, learning_rate=0.1)
        trainer = online_ppo.ours(case, self.folder, 0, lambda made: tokens.extend(made) or made)
        trainer.args.max_steps, trainer.args.warmup_steps = 1, 0
        trainer.train()
        trainer.model.save_pretrained(self.folder / "policy")
        return {
            "tokens": sum(map(len, tokens)), "step": 1, "seconds": 1.0, "processor": 1.0, "peak_mb": 2.0, "before_mb": 1.0,
            "versions": {}, **trainer.sizes,
        }  # fmt: skip


def test_the_comparison_with_ppo_fills_its_section(tmp_path, monkeypatch):
    """The smallest version: a step of ours on 8 completions, judged by an untrained reward model; its row stands in for TRL's."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import claims_page
    import online_ppo
    import online_rloo

    monkeypatch.setattr(online_rloo, "SAMPLES", 1)
    monkeypatch.setattr(online_rloo, "STEP_COMPLETIONS", 8)

    def prepare(folder, seed, steps):
        folder.mkdir()
        policy, tokenizer = tiny.model(), tiny.build_tokenizer()
        judge = AutoModelForSequenceClassification.from_config(
            LlamaConfig(**policy.config.to_dict() | {"num_labels": 1})
        )
        for name, model in {"start": policy, "reward_model": judge}.items():
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        prompts = all_prompts()
        (folder / "prompts.json").write_text(json.dumps({"train": prompts[8:24], "held_out": prompts[:8]}))
        (folder / "policy").symlink_to(folder / "start")
        return online_ppo.evaluate(folder, seed)

    options = argparse.Namespace(seed=0, budget=1, turns=1, fine_tune_steps=0)
    cases = {online_ppo.OURS: (online_ppo.OURS, online_ppo.CASES[online_ppo.OURS])}
    (row,) = online_rloo.measure(cases, options, tmp_path, prepare, Here, online_ppo.evaluate)
    assert 8 <= row["generated_tokens"] <= 64
    assert abs(row["kl"]) > 1e-4  # of the policy that was trained, not of the start
    assert row["model_reward"] != 0
    rows = [{**row, "method": name, "ms_per_token": 1.0} for name in online_ppo.CASES]
    part = claims_page.ELSEWHERE["e"]
    text = claims_page.section(claims_page.online_rows(rows), part)
    assert part.title in text
    assert all(f"| {name} |" in text for name in online_ppo.CASES)
    assert claims_page.about_online(rows)


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
