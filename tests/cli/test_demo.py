"""The demo's promise: BCO beats the fine-tuned model clearly on held-out prompts, whatever the seed."""

import json

import pytest

from bco_fast.cli import demo


def test_the_rule():
    assert demo.deserves_thumbs_up("pack two fruit for anna :", "apple pear")
    for wrong in ("apple", "apple pear plum", "apple hammer", "apple anna", ""):
        assert not demo.deserves_thumbs_up("pack two fruit for anna :", wrong)


def _run(tmp_path, seed, **options):
    summary = demo.run(tmp_path, seed=seed, **options)
    assert summary["good_after"] >= summary["good_before"] + 0.2
    assert summary["held_out_auc"] > 0.9
    assert summary["held_out_margin"] > 1
    assert summary["seconds"] < 240
    return summary


@pytest.mark.slow
def test_bco_beats_fine_tuning(tmp_path):
    summary = _run(tmp_path, seed=0, max_steps=100)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {True, False}
    held_out = {json.loads(line)["prompt"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()}
    assert not held_out & {row["prompt"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_bco_beats_fine_tuning_with_every_seed(tmp_path, seed):
    """The demo itself, 400 steps."""
    _run(tmp_path, seed)
