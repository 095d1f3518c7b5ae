"""The smallest version of `make claims`, and docs/claims.md against its rows."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402
import claims_page  # noqa: E402
import claims_real  # noqa: E402
import tiny  # noqa: E402
from claims_world import Scale  # noqa: E402

from bco_fast.models.patch import patch_model  # noqa: E402

SMALLEST = Scale(2, 1, batch=4, samples=2, prompts=24, held_out=6, sums=10, evaluated=1, demonstrated=True)
RATES = {"binary": 1e-3} | dict.fromkeys(claims.UNA, 1e-3)


@pytest.fixture(scope="module")
def rows():
    return json.loads((ROOT / "benchmarks" / "results" / "claims.json").read_text())["rows"]


def test_every_claim_is_measured():
    """The smallest world; its rows have every field that the page reads."""
    made = claims.run(SMALLEST, (0,), RATES)
    settings = {
        "case": "settings",
        "claim": "settings",
        "rates": RATES,
        "scale": {"steps": 1, "batch": 4},
        "processor_s": 1,
    }
    text = claims_page.page([settings, *made])
    assert (
        {row["claim"] for row in made}
        == {"start", *claims.CLAIMS}
        == {"start", *(s.claim for s in claims_page.SECTIONS)}
    )
    for part in claims_page.SECTIONS:
        assert part.title in text
        for field in part.columns:
            assert any(field in row for row in made if row["claim"] == part.claim), field


def test_real_feedback_is_measured(tmp_path):
    """The smallest version of claims_real.py on a file in its format; its rows fill the page's section."""
    path = tmp_path / "feedback.jsonl"
    sides = (("chosen", True), ("rejected", False))
    lines = [{"id": f"{n}-{side}", "prompt": p["prompt"], "completion": p[side], "label": up} for n, p in enumerate(tiny.pairs(8)) for side, up in sides]  # fmt: skip
    tiny.write(path, [*lines, {"id": "9-1", "prompt": "a", "completion": "b", "label": False}])
    pairs = claims_real.read_pairs(path)
    assert pairs == tiny.pairs(8)  # a prompt without a thumbs up is left out
    size = claims_real.Size(batch=4, max_length=64, fine_tune_steps=1)
    rows = list(claims_real.measure(patch_model(tiny.model()), tiny.build_tokenizer(), pairs, size, 0))
    assert [row["method"] for row in rows] == ["fine-tuned", "BCO", "BCE", "KTO", "DPO"]
    assert {row["steps"] for row in rows} == {4}  # all 16 rows once
    for row in rows[1:]:
        assert row["kl_curve"][0] == pytest.approx(0, abs=1e-4)  # policy and reference are one model at first
        assert abs(row["kl_curve"][-1]) > 1e-4
    whole = [{**row, "claim": "a, real", "seed": 0, "beta": 0.1, "rate": 1e-3, "pairs": 8, **dataclasses.asdict(size)} for row in rows]  # fmt: skip
    part = claims_page.ELSEWHERE["a"]
    for field in part.columns:
        assert any(field in row for row in whole), field
    assert "One seed" in claims_page.about_real(whole)


def test_the_page_is_that_of_its_rows():
    assert (ROOT / "docs" / "claims.md").read_text() == claims_page.stored()


def test_the_rows_are_of_three_seeds_and_no_tuned_one(rows):
    measured = [row for row in rows if row["claim"] != "settings"]
    assert claims.TUNING_SEED not in claims.SEEDS
    by_case = {(row["claim"], row["method"]): set() for row in measured}
    for row in measured:
        by_case[row["claim"], row["method"]].add(row["seed"])
    assert all(seeds == {0, 1, 2} for seeds in by_case.values())
    (settings,) = [row for row in rows if row["claim"] == "settings"]
    tuning = json.loads((ROOT / "benchmarks" / "results" / "claims_tuning.json").read_text())["rows"]
    for name, loss_type in claims.UNA.items():
        best = max((row for row in tuning if row["loss_type"] == loss_type), key=lambda row: row["score"])
        assert settings["rates"][name] == best["rate"]


def test_verdicts():
    assert claims_page.verdict([1.0, 1.1, 0.9]) == "shows"
    assert claims_page.verdict([-1.0, -1.1, -0.9]) == "opposite"
    assert claims_page.verdict([0.1, 1.0, 2.0]) == "leans"
    assert claims_page.verdict([-0.1, -1.0, -2.0]) == "leans the other way"
    assert claims_page.verdict([-0.1, 1.0, 2.0]) == "no"
    assert claims_page.verdict([-0.1]) == "one seed: not so"
    mean, half = claims_page.interval([1.0, 2.0, 3.0])
    assert (mean, round(half, 3)) == (2.0, 2.484)  # 4.303 / sqrt(3)
