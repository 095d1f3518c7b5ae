"""Our side of the comparison with RLOO stays alive; the peer's environment is not needed for it."""

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
