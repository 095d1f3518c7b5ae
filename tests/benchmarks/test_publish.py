"""The documentation quotes only what a result file holds, and its tables and charts are what the result files give."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402

PAGES = {name: ((ROOT / name).read_text(), rules) for name, rules in figures.PAGES.items()}
every_page = pytest.mark.parametrize(("page", "rules"), PAGES.values(), ids=PAGES)


@every_page
def test_every_measured_number_is_in_a_result_file(page, rules):
    assert figures.differences(page, rules) == []
    assert figures.unquoted(page, rules) == []
    assert "<!--" not in page


@every_page
def test_a_number_changed_in_one_place_is_found(page, rules):
    """On the page, any digit of any number; in a result file, any cell."""
    for found, cells in figures.quoted(page, rules):
        for i, cell in enumerate(cells, 1):
            start, stop = found.span(i)
            for at in (n for n in range(start, stop) if page[n].isdigit()):
                changed = page[:at] + str((int(page[at]) + 1) % 10) + page[at + 1 :]
                (difference,) = figures.differences(changed, rules)
                assert cell.case in difference
                assert figures.refreshed(changed, rules) == page


def test_a_cell_changed_in_a_result_file_is_found(monkeypatch):
    page, rules = PAGES["README.md"]
    rows = {}

    def changed_rows(name):
        if name not in rows:
            rows[name] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        return rows[name]

    monkeypatch.setattr(figures, "_rows", changed_rows)
    cells = {cell for _, its_cells in rules for cell in its_cells}
    assert len(cells) > 40
    for cell in cells:
        (row,) = [row for row in changed_rows(cell.file) if row["case"] == cell.case]
        kept = row[cell.field]
        row[cell.field] = kept * 1.5
        assert any(f"{cell.file}, {cell.case}, {cell.field}" in line for line in figures.differences(page, rules)), cell
        row[cell.field] = kept


@pytest.mark.parametrize(
    "claim",
    [
        "It is 3x faster.", "It takes 0.4 of its time.", "It needs 80 MB.", "It runs at 9,000 tokens/s.", "It saves 40 %.",
        "The error is 2 nats.", "A step takes 3 s.", "Half: 0.5.", "| 1.69 s | 0.44 of it |", "It is 2 times as fast.", "It fits 128k tokens.", "It changes by -3 %.",
    ],
)  # fmt: skip
def test_a_claim_without_a_row_is_refused(claim):
    page, rules = PAGES["README.md"]
    assert figures.unquoted(f"{page}\n{claim}\n", rules)


@pytest.mark.parametrize(
    "harmless", ["`0.5 s`", "TRL 1.12", "[2404.04656](https://arxiv.org/abs/2404.04656)", "N = 5", "Qwen2.5-0.5B"]
)
def test_code_versions_and_papers_are_no_measurements(harmless):
    page, rules = PAGES["README.md"]
    assert figures.unquoted(f"{page}\n{harmless}\n", rules) == []


def test_a_sentence_that_is_gone_or_is_there_twice_is_named():
    page, rules = PAGES["README.md"]
    with pytest.raises(LookupError, match="0 times: The demo itself"):
        figures.differences(page.replace("The demo itself", "The demo"), rules)
    with pytest.raises(LookupError, match="2 times"):
        figures.differences(page + page, rules)


def test_the_readme_names_the_machine_of_its_rows():
    page, rules = PAGES["README.md"]
    machine, torch = re.search(r"Everything below ran\s+on an? (.+?) with PyTorch (\d+\.\d+)", page).groups()
    section = page.index("## Performance")
    files = {cell.file for found, cells in figures.quoted(page, rules) if found.start() > section for cell in cells}
    assert len(files) >= 7
    for name in files:
        environment = json.loads((RESULTS / f"{name}.json").read_text())["environment"]
        assert all(word in environment["cpu"] for word in machine.split()), name
        assert environment["torch"].startswith(f"{torch}."), name
        assert environment["gpu"] is None, f"{name} has a GPU; the README says that none was measured"


def test_the_page_of_results_has_every_contender():
    """The committed page is what the result files give; `python benchmarks/publish.py` makes it so."""
    import publish
    from contenders import CONTENDERS

    page = (ROOT / "docs" / "results.md").read_text()
    assert page == publish.tables()
    for name in CONTENDERS:
        assert f"| {name} |" in page
    rows = json.loads((RESULTS / "head_peers.json").read_text())["rows"]
    assert all(row["error"] in page for row in rows if "error" in row and row["part"] == "time")


@pytest.mark.parametrize(
    ("name", "page"), [("memory", "README.md"), *((name, "docs/results.md") for name in ("time", "step", "growth"))]
)
def test_every_point_of_a_chart_is_a_row(name, page):
    """The committed drawing is what the result files give; `python benchmarks/publish.py` makes it so."""
    import charts

    drawn = (ROOT / "docs" / "charts" / f"{name}.svg").read_text()
    assert drawn == charts.DRAWN[name]()
    assert f"charts/{name}.svg" in (ROOT / page).read_text()
    assert "prefers-color-scheme:dark" in drawn


def test_a_chart_follows_its_rows(monkeypatch, tmp_path):
    import charts

    for file in RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "head_peers.json"
    result = json.loads(path.read_text())
    row = next(
        r for r in result["rows"] if r.get("processor_s") and r["contender"] == "bco_fast" and r["logits"] == "peaked"
    )
    row["processor_s"] *= 1.5
    path.write_text(json.dumps(result))
    monkeypatch.setattr(charts, "RESULTS", tmp_path)
    assert charts.DRAWN["time"]() != (ROOT / "docs" / "charts" / "time.svg").read_text()
