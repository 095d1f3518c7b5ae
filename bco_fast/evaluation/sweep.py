"""Runs over options and seeds as one table, with means over the seeds and their intervals, and as plots.

    results.csv     one line for each run: its options, state and held-out figures
    settings.csv    one line for each setting: means over its seeds, with the half width of their 95 % interval
    results.md      the same for people, and every run that failed
    plots/          AUC, margin and loss over the option with the most values, as PDF and SVG

All figures are of held-out rows, from the evaluation after training. Losses of different objectives have different units, so
each objective has a column of its own.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import atomic_path, atomic_text, make_folder
from .run_reading import ReportError, Run, is_finite, load_run
from .sweep_plots import FIGURES, draw

# Student's t: the 97.5 % quantile at 1, 2, ... degrees of freedom; beyond them it is within 2 % of the last one
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    name: str
    folder: Path
    options: Mapping[str, str]
    """What distinguishes its setting: the options with several values, as they were given."""
    seed: int
    problem: str = ""
    """Why it has no result; empty if it is done."""


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean, Student's; None for one value."""
    if len(values) < 2:
        return None
    return _STUDENT[min(len(values), len(_STUDENT) + 1) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def figures(run: Run) -> dict[str, float]:
    """The held-out figures of a run, as far as it has them."""
    held_out = run.record.get("held_out")
    found = held_out if isinstance(held_out, dict) else {}
    auc, margin, loss = (found.get(f"eval_{name}") for name in ("rewards/auc", "rewards/margins", "loss"))
    nats = margin * run.nats if is_finite(margin) and run.nats is not None else None
    named = {"auc": auc, "margin": margin, "margin_nats": nats, f"loss of {run.loss_type}": loss}
    return {name: value for name, value in named.items() if is_finite(value)}


def describe(run: Run) -> dict[str, object]:
    """Model, data and the options that every comparison must name."""
    record, options = run.record, run.record.get("options") or {}
    data = record.get("data") or {}
    counts = data.get("train") or {}
    return {
        "model": record.get("model") or record.get("architecture"),
        "data": run.data_name,
        "trained_rows": counts.get("rows"),
        "held_out_rows": (data.get("held_out") or {}).get("rows"),
        "loss_type": run.loss_type,
        "beta": record.get("beta"),
        "learning_rate": options.get("learning_rate"),
        "steps": record.get("step"),
    }


def collect(planned: Sequence[Planned]) -> tuple[list[dict], dict[str, Run]]:
    """One row for each run, and the runs that have one."""
    rows, runs = [], {}
    for plan in planned:
        row: dict[str, object] = {"run": plan.name, "state": "failed" if plan.problem else "done"}
        row |= {"seed": plan.seed, **plan.options}
        if not plan.problem:
            try:
                run = runs[plan.name] = load_run(plan.folder)
            except ReportError as error:
                row |= {"state": "failed", "problem": str(error)}
            else:
                found = figures(run)
                bounds = run.auc_bounds(found.get("auc"))
                row |= {name: value for name, value in describe(run).items() if name not in row}
                row |= found
                row |= {} if bounds is None else dict(zip(("auc_low", "auc_high"), bounds, strict=True))
                row |= {"seconds": run.record.get("seconds"), "peak_memory_mb": run.record.get("peak_memory_mb")}
        else:
            row["problem"] = plan.problem
        rows.append(row)
    return rows, runs


def by_setting(planned: Sequence[Planned], rows: Sequence[dict]) -> list[dict]:
    """One row for each setting: how many of its runs are done, and each figure's values, mean and half interval."""
    settings: dict[tuple, dict] = {}
    for plan, row in zip(planned, rows, strict=True):
        key = tuple(plan.options.items())
        setting = settings.setdefault(key, {"options": dict(plan.options), "runs": 0, "done": 0, "values": {}})
        setting["runs"] += 1
        setting["done"] += row["state"] == "done"
        for name, value in row.items():
            if name in FIGURES or name.startswith("loss of "):
                setting["values"].setdefault(name, []).append(value)
    for setting in settings.values():
        setting["mean"] = {name: statistics.mean(values) for name, values in setting["values"].items()}
        setting["half"] = {name: interval(values) for name, values in setting["values"].items()}
    return list(settings.values())


def write_results(folder: Path, planned: Sequence[Planned]) -> tuple[str, dict[str, Run]]:
    """Write all the files; -> the table in Markdown, and the runs that are done."""
    rows, runs = collect(planned)
    settings = by_setting(planned, rows)
    _write_csv(folder / "results.csv", rows)
    _write_csv(folder / "settings.csv", [_flat(setting) for setting in settings])
    text = markdown(settings, rows)
    with atomic_text(folder / "results.md") as file:
        file.write(text + "\n")
    make_folder(folder / "plots")
    for name, figure in draw(settings).items():
        for form in ("pdf", "svg"):
            with atomic_path(folder / "plots" / f"{name}.{form}") as temporary:
                dates = {"CreationDate": None} if form == "pdf" else {"Date": None}
                figure.savefig(temporary, format=form, metadata=dates)
    return text, runs


def _flat(setting: Mapping) -> dict:
    row = dict(setting["options"]) | {"runs": setting["runs"], "done": setting["done"]}
    for name, mean in setting["mean"].items():
        row |= {name: mean, f"{name} ±": setting["half"][name]}
    return row


def _write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_text(path) as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)


def markdown(settings: Sequence[Mapping], rows: Sequence[Mapping]) -> str:
    """The table of settings, above it what all runs have in common, and below it the runs that failed."""
    options = list(dict.fromkeys(name for setting in settings for name in setting["options"]))
    losses = sorted({name for setting in settings for name in setting["mean"] if name.startswith("loss of ")})
    shown = [name for name in (*FIGURES, *losses) if any(name in setting["mean"] for setting in settings)]
    head = [*(options or ["setting"]), "runs", *(FIGURES.get(name, name) for name in shown)]
    lines = [_common(rows, options), "", _line(head), _line(["---"] * len(head))]
    for setting in settings:
        cells = [setting["options"][name] for name in options] or ["all"]
        cells.append(f"{setting['done']}" + (f" of {setting['runs']}" if setting["done"] < setting["runs"] else ""))
        lines.append(_line([*cells, *(_cell(setting, name) for name in shown)]))
    if not shown:
        lines += ["", "No run has held-out figures yet."]
    failed = [row for row in rows if row["state"] == "failed"]
    if failed:
        lines += ["", _line(["run that failed", "why"]), _line(["---", "---"])]
        lines += [_line([row["run"], row["problem"]]) for row in failed]
    return "\n".join(lines)


def _common(rows: Sequence[Mapping], options: Sequence[str]) -> str:
    """Model, data, objective, β, learning rate, rows and steps, as far as they are no columns of the table; the seeds."""
    parts = []
    for name in ("model", "data", "loss_type", "beta", "learning_rate", "trained_rows", "held_out_rows", "steps"):
        values = list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))
        if name not in options and values:
            parts.append(f"{name.replace('_', ' ')} {', '.join(values)}")
    seeds = ", ".join(map(str, dict.fromkeys(row["seed"] for row in rows)))
    parts.append(f"seeds {seeds}; held-out figures as mean ± half of the 95 % interval over the seeds")
    return "; ".join(parts)


def _cell(setting: Mapping, name: str) -> str:
    if name not in setting["mean"]:
        return "n/a"
    mean, half = setting["mean"][name], setting["half"][name]
    digits = ".3f" if name == "auc" else ".4g" if name.startswith("loss") else ".3g"
    return f"{mean:{digits}}" + ("" if half is None else f" ± {half:.2g}")


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
