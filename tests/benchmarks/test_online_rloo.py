"""Our side of the comparison with RLOO stays alive; the peer's environment is not needed for it."""

import json
import re
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def test_every_figure_of_the_page_has_its_row():
    """A figure is marked `<!-- file; case; field -->` right behind it, as in the README."""
    page = (BENCHMARKS.parent / "docs" / "online.md").read_text()
    marked = re.findall(r"([\d.]+)<!-- (\w+); ([^;]+); (\w+) -->", page)
    assert len(marked) >= 15
    for shown, name, case, field in marked:
        rows = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["rows"]
        (row,) = [row for row in rows if row["case"] == case]
        digits = len(shown.partition(".")[2])
        assert f"{row[field]:.{digits}f}" == shown, (case, field)
    tables = "".join(line for line in page.partition("## Does it work")[2].splitlines() if line.startswith("| seed"))
    assert not re.search(r"\d", re.sub(r"seed \d|[\d.]+<!--.*?-->", "", tables)), "an unmarked figure"
