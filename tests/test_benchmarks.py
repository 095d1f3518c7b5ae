"""The benchmark programs stay alive, and the README quotes only what a result file holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_gpu_suite_runs_small_on_the_cpu(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--smoke", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert result["environment"]["torch"]
    rows = result["rows"]
    missing = [r for r in rows if "error" in r]
    assert all(
        r["error"].startswith("missing: ") and r["case"] in ("trl", "liger", "cut_cross_entropy") for r in missing
    )
    rows = [r for r in rows if "error" not in r]
    assert {(r["mode"], r["case"]) for r in rows} >= {
        (m, c) for m in ("forward", "trainable", "frozen") for c in ("plain", "torch")
    }
    assert all(r["logp_rms_error"] < 1e-5 and r["median_s"] > 0 for r in rows)
    assert all(r.get("d_hidden_vs_plain", 0) < 1e-4 for r in rows)
    again = subprocess.run(command, capture_output=True, text=True)
    assert json.loads((tmp_path / "gpu_suite.json").read_text())["rows"] == result["rows"], again.stderr


def _close(shown: str, stored: float) -> bool:
    """The README's figure is the file's, rounded to the digits it shows."""
    digits = len(shown.partition(".")[2])
    return round(stored, digits) == float(shown)


def test_every_figure_of_the_readme_has_its_row():
    """A figure is marked `<!-- file; case; field -->` right behind it in the README's source."""
    text = (ROOT / "README.md").read_text()
    marked = re.findall(r"([\d.,]+)\s*[A-Za-z%]*\s*<!-- (\w+); ([^;]+); (\w+) -->", text)
    assert len(marked) >= 8
    for shown, name, case, field in marked:
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        (row,) = [r for r in rows if r["case"] == case.strip()]
        assert _close(shown.replace(",", ""), row[field]), f"README says {shown}, {name} {case} {field} is {row[field]}"
    table = text.partition("## Measured")[2].partition("\n## ")[0]
    bare = re.sub(r"[\d.,]+\s*[A-Za-z%]*\s*<!-- \w+; [^;]+; \w+ -->", "", table)
    rows_of_table = [line for line in bare.splitlines() if line.startswith("|")][2:]
    assert rows_of_table
    assert not re.search(r"\d", "".join(line.split("|", 2)[2] for line in rows_of_table)), "an unmarked figure"
