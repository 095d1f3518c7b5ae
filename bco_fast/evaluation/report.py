"""Runs on one self-contained HTML page, with its plots as PNG and SVG files in a folder beside it.

Reads trainer_state.json (of the run's folder, or of its newest checkpoint while it is still training), run.json and
held_out.jsonl; the page says what is left out because a run lacks it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_path, atomic_text
from .plots import PLOTS, compare
from .readings import READINGS
from .run_reading import ReportError, Run, is_finite, load_run

DPI = 130
"""Of the PNG files."""
SAMPLE_PROMPTS, SAMPLE_STEPS, SAMPLE_CHARACTERS = 16, 5, 1500
"""How much of samples.jsonl a page shows; the steps are the first, the last and some between."""
_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --soft: #555; --line: #ddd }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1320px; margin: 1.5rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, .text { text-align: left } th { border-bottom: 2px solid var(--soft) }
.wide { overflow-x: auto } .plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: .8rem }
figure { margin: 0 } figcaption { padding: .3rem .2rem } img { width: 100%; height: auto; border: 1px solid var(--line) } h2 { margin-top: 2rem; overflow-wrap: anywhere } .note, figcaption { color: var(--soft) }
.said { white-space: pre-wrap; overflow-wrap: anywhere } h4 { margin: 1rem 0 .2rem }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181c; --soft: #a8adb5; --line: #3a3f47 }
  img { filter: invert(.9) hue-rotate(180deg) }
}
"""


def write_report(
    folders: Sequence[str | os.PathLike], output: str | os.PathLike | None = None, *, each: bool = True
) -> dict:
    """Read the runs, write the page and its PNG files.

    Args:
        folders: of runs, at least one.
        output: the page; None for report.html, in the run's folder or, for several runs, in the current one. Plots are
            written to the folder STEM_plots beside it, as RUN-PLOT.png and .svg.
        each: with a section for each run; without, several runs are only compared.

    Returns:
        output, runs, images (paths of the PNG files) and left_out (run -> notes on what is missing and why).

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
        page = _page(runs, output, images, each=each)
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


def _page(runs: list[Run], output: Path, images: list[Path], *, each: bool) -> str:
    parts = []
    if len(runs) > 1:
        shown = [
            _image(figure, output, "all", name, alt, None, images) for name, (figure, alt) in compare(runs).items()
        ]
        parts.append(f'<div class="plots">{"".join(shown)}</div>')
    slugs: set[str] = set()
    for run in runs if each or len(runs) == 1 else ():
        slug = _slug(run.name, slugs)
        shown = []
        for name, (plot, alt) in PLOTS.items():
            if (figure := plot(run)) is not None:
                reading = READINGS[name](run) if name in READINGS else None
                shown.append(_image(figure, output, slug, name, f"{run.name}: {alt}", reading, images))
        notes = [*run.left_out, *([] if shown else ["Nothing was logged yet."])]
        notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
        about = f'<p class="note">{html.escape(_about(run))}</p>'
        parts.append(
            f'<h2>{html.escape(run.name)}</h2>{about}{notes}<div class="plots">{"".join(shown)}</div>{_samples(run)}{_options(run)}'
        )
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


def _image(figure, output: Path, slug: str, name: str, alt: str, reading: str | None, images: list[Path]) -> str:
    folder = output.with_name(f"{output.stem}_plots")
    folder.mkdir(exist_ok=True)
    for form, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": DPI})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, **options)
        figure.set_layout_engine(None)  # the layout is found once
        path = folder / f"{slug}-{name}.{form}"
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    images.append(path)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = "" if reading is None else f"<figcaption>{html.escape(reading)}</figcaption>"
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">{caption}</figure>'


def _about(run: Run) -> str:
    """Model, objective, date and class counts, as far as they are known."""
    record = run.record
    parts = [str(record.get("model") or record.get("architecture") or "unknown model"), run.loss_type]
    for part, name in (("train", "trained on"), ("held_out", "held out")):
        counts = (record.get("data") or {}).get(part)
        if isinstance(counts, dict) and all(is_finite(counts.get(side)) for side in ("up", "down")):
            parts.append(f"{name} {counts['up']:,.0f} thumbs up and {counts['down']:,.0f} down")
    if record.get("date"):
        parts.append(str(record["date"]))
    return " · ".join(parts)


def _auc(run: Run) -> str:
    value = run.last("eval_rewards/auc")
    bounds = run.auc_bounds(value)
    return _number(value, ".3f") + ("" if bounds is None else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]")


def _nats(run: Run, key: str) -> str:
    value = run.last(key)
    return "–" if value is None or run.nats is None else _number(value * run.nats, ".3g")


def _table(runs: Sequence[Run]) -> str:
    def loss_of(objective: str):
        return lambda run: _number(run.last("eval_loss"), ".4g") if run.loss_type == objective else "–"

    # losses of different objectives have different units, so they share no column
    losses = {f"loss of {name}, held out": loss_of(name) for name in dict.fromkeys(run.loss_type for run in runs)}
    columns = {
        "run": lambda run: run.name,
        "model": lambda run: run.record.get("model") or run.record.get("architecture") or "–",
        "data": lambda run: run.data_name or "–",
        "trained rows": lambda run: _number(((run.record.get("data") or {}).get("train") or {}).get("rows"), ",.0f"),
        "objective": lambda run: run.loss_type,
        "β": lambda run: _number(run.record.get("beta"), "g"),
        "learning rate": lambda run: _number((run.record.get("options") or {}).get("learning_rate"), "g"),
        "seed": lambda run: _number((run.record.get("options") or {}).get("seed"), "g"),
        "steps": lambda run: _number(max((line["step"] for line in run.history), default=0), ",.0f") + _of(run),
        "AUC, held out (95 %)": _auc,
        "margin, held out": lambda run: _number(run.last("eval_rewards/margins"), ".3g"),
        "margin, nats": lambda run: _nats(run, "eval_rewards/margins"),
        **losses,
        "δ": lambda run: _number(run.last("eval_delta"), ".3g"),
        "peak memory, MB": lambda run: _number(run.record.get("peak_memory_mb"), ",.0f"),
        "time, s": lambda run: _number(run.record.get("seconds"), ",.0f"),
    }
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell(run)))}</td>" for cell in columns.values()) + "</tr>"
        for run in runs
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _samples(run: Run) -> str:
    """What the model wrote for each sample prompt, before, during and after training."""
    rows: dict[str, list[dict]] = {}
    for sample in run.samples:
        rows.setdefault(json.dumps(sample["prompt"]), []).append(sample)
    if not rows:
        return ""
    parts = []
    for said in list(rows.values())[:SAMPLE_PROMPTS]:
        last = len(said) - 1
        kept = [said[i] for i in sorted({round(k * last / (SAMPLE_STEPS - 1)) for k in range(SAMPLE_STEPS)})]
        lines = "".join(
            f'<tr><td>step {sample["step"]:,}</td><td class="text said">{html.escape(_cut(sample["completion"]))}</td></tr>'
            for sample in kept
        )
        parts.append(
            f'<h4 class="said">{html.escape(_cut(said[0]["text"]))}</h4><div class="wide"><table>{lines}</table></div>'
        )
    left = len(rows) - len(parts)
    more = f'<p class="note">{left} more prompts are in samples.jsonl.</p>' if left else ""
    return f"<h3>Completions of sample prompts</h3>{''.join(parts)}{more}"


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} …"


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
    return f'<details><summary>Options and versions</summary><div class="wide"><table>{rows}</table></div></details>'
