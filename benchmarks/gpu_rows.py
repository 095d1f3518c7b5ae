"""A GPU's lines of the README's performance table, from a result of gpu_suite.py; without one there are none.

The lines are written whole, so a test that finds them word for word has compared every number.
"""

# ruff: noqa: RUF001 - the page prints ×
from __future__ import annotations

from collections.abc import Iterator

import charts

SHAPES = ("Llama-3-8B", "Qwen3-8B")
WHAT = {
    ("frozen", "flat"): "frozen (LoRA)",
    ("trainable", "flat"): "trained",
    ("trainable", "likely"): "trained, likely tokens",
}
OURS = ("triton", "sparse", "torch")
SENTENCES = (
    (
        "**No GPU time has been measured yet.** Everything below ran on",
        "Lines that name a GPU ran on it, all else below on",
    ),
    (
        "Their\n  speed on a GPU is unknown until `benchmarks/gpu_suite.py` has run on one.",
        "Their\n  speed is known of the GPUs above only.",
    ),
)
"""What the README says without a GPU's result, and with one."""
LAST = "| KTO step, TRL's reference precomputed |"
"""How the last line of the table begins that is not a GPU's."""


def lines() -> list[str]:
    path = charts.RESULTS / "gpu_suite.json"
    if not path.is_file():
        return []
    gpu = charts.environment_of("gpu_suite")["gpu"].removeprefix("NVIDIA ")
    return list(_lines(gpu, [row for row in charts.rows_of("gpu_suite") if "median_s" in row]))


def _lines(gpu: str, rows: list[dict]) -> Iterator[str]:
    for shape in SHAPES:
        for (mode, logits), what in WHAT.items():
            here = [r for r in rows if (r["shape"], r.get("mode"), r.get("logits")) == (shape, mode, logits)]
            plain = [r for r in here if r["case"] == "plain"]
            ours = sorted((r for r in here if r["case"].startswith(OURS)), key=lambda r: r["median_s"])
            if plain and ours:
                derived = f", derived {1e3 * ours[0]['derived_s']:.1f} ms"
                yield _line(
                    f"{gpu}: lm-head of {shape}, {what}, `{ours[0]['case']}`{derived}", plain[0], ours[0], 1e3, "ms"
                )
    steps = {r["case"]: r for r in rows if r.get("benchmark") == "step"}
    for case, ours in steps.items():
        for peer in (r for name, r in steps.items() if case.startswith("bco_fast") and name != case):
            yield _line(
                f"{gpu}: {ours['shape']} LoRA, reference and two steps, against {peer['case']}", peer, ours, 1.0, "s"
            )


def _line(name: str, baseline: dict, ours: dict, scale: float, unit: str) -> str:
    times = [f"{scale * row['median_s']:.1f} {unit}" for row in (baseline, ours)]
    memory = [f"{row['extra_mb']:.0f} MB" for row in (baseline, ours)]
    ratio = ours["median_s"] / baseline["median_s"]
    return f"| {' | '.join([name, *times, f'{ratio:.2f}×', *memory])} |"


def placed(page: str) -> str:
    """The README with the GPU's lines at the table's end, in place of those of an earlier result."""
    kept, found = page.splitlines(keepends=True), lines()
    end = next(i for i, line in enumerate(kept) if line.startswith(LAST)) + 1
    after = next(i for i, line in enumerate(kept) if i >= end and not line.startswith("|"))
    page = "".join([*kept[:end], *(f"{line}\n" for line in found), *kept[after:]])
    for unmeasured, measured in SENTENCES:
        page = page.replace(unmeasured, measured) if found else page.replace(measured, unmeasured)
    return page
