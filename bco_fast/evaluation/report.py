"""Runs on one self-contained HTML page, with its plots as PNG files beside it.

Reads trainer_state.json (of the run's folder, or of its newest checkpoint while it is still training), run.json and
held_out.jsonl; the page says what is left out because a run lacks it.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_path, atomic_text
from .plots import PLOTS, compare
from .run_reading import ReportError, Run, is_finite, load_run

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1320px; margin: 1.5rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, .text { text-align: left } th { border-bottom: 2px solid #666 }
.wide { overflow-x: auto } .plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: .8rem }
img { width: 100%; height: auto; border: 1px solid #e5e5e5 } h2 { margin-top: 2rem; overflow-wrap: anywhere } .note { color: #555 }
"""


def write_report(folders: Sequence[str | os.PathLike], output: str | os.PathLike | None = None) -> dict:
    """Read the runs, write the page and its PNG files.

    Args:
        folders: of runs, at least one.
        output: the page; None for report.html, in the run's folder or, for several runs, in the current one. Plots are
            written beside it as STEM-RUN-PLOT.png.

    Returns:
        output, runs, images (paths) and left_out (run -> notes on what is missing and why).

    Raises:
        ReportError: a folder is not a run, or the page cannot be written.
    """
    runs = [load_run(folder) for folder in folders]
    if not runs:
        raise ReportError("no run given")
    _tell_apart(runs)
    if output is None:
        output = runs[0].folder / "report.html" if len(runs) == 1 else "report.html"
    output = Path(output)
    if output.is_dir():
        raise ReportError(f"{output} is a folder; name a file")
    images: list[Path] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        page = _page(runs, output, images)
        with atomic_text(output) as file:
            file.write(page)
    except OSError as error:
        raise ReportError(f"{output}: {error.strerror or error}") from None
    return {
        "output": str(output),
        "runs": len(runs),
        "images": [str(image) for image in images],
        "left_out": {run.name: run.left_out for run in runs if run.left_out},
    }


def _tell_apart(runs: list[Run]) -> None:
    """Runs whose folders have the same name get the parent's name as a prefix, then a number if that is not enough."""
    for rename in (
        lambda run, i: f"{run.folder.resolve().parent.name}/{run.name}",
        lambda run, i: f"{run.name} ({i + 1})",
    ):
        names = [run.name for run in runs]
        for i, run in enumerate(runs):
            if names.count(names[i]) > 1:
                run.name = rename(run, i)


def _page(runs: list[Run], output: Path, images: list[Path]) -> str:
    parts = []
    if len(runs) > 1:
        shown = [_image(figure, output, "all", name, alt, images) for name, (figure, alt) in compare(runs).items()]
        parts.append(f'<div class="plots">{"".join(shown)}</div>')
    slugs: set[str] = set()
    for run in runs:
        slug = _slug(run.name, slugs)
        figures = {name: (plot(run), f"{run.name}: {alt}") for name, (plot, alt) in PLOTS.items()}
        shown = [_image(f, output, slug, name, alt, images) for name, (f, alt) in figures.items() if f is not None]
        notes = [*run.left_out, *([] if shown else ["Nothing was logged yet."])]
        notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
        parts.append(f'<h2>{html.escape(run.name)}</h2>{notes}<div class="plots">{"".join(shown)}</div>{_options(run)}')
    title = html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><title>bco_fast: {title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{_table(runs)}{''.join(parts)}</body></html>\n"
    )


def _slug(name: str, taken: set[str]) -> str:
    slug = base = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:60] or "run"
    number = 1
    while slug.lower() in taken or slug == "all":
        number += 1
        slug = f"{base}-{number}"
    taken.add(slug.lower())
    return slug


def _image(figure, output: Path, slug: str, name: str, alt: str, images: list[Path]) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    path = output.with_name(f"{output.stem}-{slug}-{name}.png")
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    images.append(path)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _table(runs: Sequence[Run]) -> str:
    columns = {
        "run": lambda run: run.name,
        "objective": lambda run: run.loss_type,
        "β": lambda run: _number(run.record.get("beta"), "g"),
        "steps": lambda run: _number(max((line["step"] for line in run.history), default=0), ",.0f") + _of(run),
        "AUC, held out": lambda run: _number(run.last("eval_rewards/auc"), ".3f"),
        "margin, held out": lambda run: _number(run.last("eval_rewards/margins"), ".3g"),
        "margin, training": lambda run: _number(run.last("rewards/margins"), ".3g"),
        "loss": lambda run: _number(run.last("loss"), ".4g"),
        "δ": lambda run: _number(run.last("delta"), ".3g"),
        "peak memory, MB": lambda run: _number(run.record.get("peak_memory_mb"), ",.0f"),
        "time, s": lambda run: _number(run.record.get("seconds"), ",.0f"),
        "trained rows": lambda run: _number(((run.record.get("data") or {}).get("train") or {}).get("rows"), ",.0f"),
    }
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell(run)))}</td>" for cell in columns.values()) + "</tr>"
        for run in runs
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _number(value, form: str) -> str:
    return format(value, form) if is_finite(value) else "–"


def _of(run: Run) -> str:
    last = run.record.get("max_steps")
    return f" of {last:,.0f}" if is_finite(last) and last > 0 else ""


def _options(run: Run) -> str:
    options, versions = run.record.get("options"), run.record.get("versions")
    if not isinstance(options, dict) or not options:
        return ""
    versions = {f"{name} (version)": v for name, v in versions.items()} if isinstance(versions, dict) else {}
    rows = "".join(
        f'<tr><td>{html.escape(str(name))}</td><td class="text">{html.escape(str(value))}</td></tr>'
        for name, value in {"model": run.record.get("model"), **options, **versions}.items()
    )
    return f"<details><summary>Options and versions</summary><table>{rows}</table></details>"
