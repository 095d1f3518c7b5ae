"""The documentation's charts, drawn from the result files; publish.py writes them to docs/charts/.

Plain SVG without a library: a transparent background, and colours that are legible on light and dark pages. Drawing is
deterministic, so a test can compare the committed charts with the result files.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, CHARTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "charts"
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 196, 84, 52
STYLE = (
    "text{font:13px system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif;fill:#57606a}"
    ".title{font-size:15px;font-weight:600}.small{font-size:12px}"
    ".grid{stroke:#8b949e;stroke-opacity:.3}.axis{stroke:#8b949e}"
    "@media (prefers-color-scheme:dark){text{fill:#adbac7}}"
)
# Okabe and Ito's colours, which colour-blind readers tell apart. LOSES: ours, where plain PyTorch is faster.
OURS, OURS_TOO, LOSES = "#009e73", "#0072b2", "#d55e00"
THEIRS = ("#e69f00", "#cc79a7", "#56b4e9", "#8b949e", "#d55e00", "#b3a800")
DASHED = 'stroke-dasharray="5 4"'


def environment_of(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["environment"]


def rows_of(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}" {more}/>'


def svg(title: str, subtitle: str, parts: list[str], height: float = HEIGHT) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" width="{WIDTH}">'
    words = [text(16, 22, title, kind="title"), text(16, 41, subtitle, kind="small")]
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *words, *parts, "</svg>\n"])


def ticks(low: float, high: float, *, base: float, log: bool) -> list[float]:
    if log:
        first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
        return [base**e for e in range(first, last + 1)]
    step = 10 ** math.floor(math.log10(high))
    step = next(s for s in (step / 5, step / 2, step) if high / s <= 6)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def shown(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


class Box(NamedTuple):
    """A plot's area, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


Lines = dict[str, tuple[list[tuple[float, float]], str, bool]]
"""name: points, colour, dashed"""


def plot(
    box: Box,
    lines: Lines,
    *,
    x_label: str,
    y_label: str,
    log_y: bool,
) -> list[str]:
    """Lines over a base-2 logarithmic x axis; their names are listed at the right."""
    xs = [x for points, _, _ in lines.values() for x, _ in points]
    ys = [y for points, _, _ in lines.values() for _, y in points]
    x_ticks = ticks(min(xs), max(xs), base=2, log=True)
    y_ticks = ticks(min(ys), max(ys), base=10, log=log_y)
    scale_y = math.log if log_y else float

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(x_ticks[0])) / (math.log(x_ticks[-1]) - math.log(x_ticks[0]))
        up = (scale_y(y) - scale_y(y_ticks[0])) / (scale_y(y_ticks[-1]) - scale_y(y_ticks[0]))
        return box.left + across * (box.right - box.left), box.bottom - up * (box.bottom - box.top)

    parts = []
    for tick in y_ticks:
        _, y = at(x_ticks[0], tick)
        parts += [
            line(box.left, y, box.right, y, "grid"),
            text(box.left - 8, y + 4, shown(tick), anchor="end", kind="small"),
        ]
    for tick in x_ticks:
        x, y = at(tick, y_ticks[0])
        words = f"{tick // 1024:.0f}k" if tick >= 1024 else f"{tick:g}"
        parts += [line(x, y, x, y + 5, "axis"), text(x, y + 20, words, anchor="middle", kind="small")]
    parts.append(line(box.left, box.bottom, box.right, box.bottom, "axis"))
    parts.append(text((box.left + box.right) / 2, box.bottom + 40, x_label, anchor="middle", kind="small"))
    parts.append(text(box.left - 48, box.top - 18, y_label, kind="small"))
    ends = []
    for name, (points, colour, dashed) in lines.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in sorted(points)))
        style = f'fill="none" stroke="{colour}" stroke-width="2.2" {DASHED if dashed else ""}'
        parts.append(f'<polyline points="{path}" {style}/>')
        for point in points:
            x, y = at(*point)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>')
        ends.append((at(*max(points))[1], name, colour))
    return parts + names_at_right(box, sorted(ends))


def names_at_right(box: Box, ends: list[tuple[float, str, str]]) -> list[str]:
    """Each line's name near its end, moved apart where names would overlap."""
    parts, below = [], box.top - 25.0
    spare = box.bottom - 17.0 * (len(ends) - 1)
    for i, (y, name, colour) in enumerate(ends):
        y = max(min(y, spare + 17 * i), below + 17)
        below = y
        parts.append(f'<rect x="{box.right + 12}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"/>')
        parts.append(text(box.right + 28, y + 4, name.partition("|")[0], kind="small"))
    return parts


def lines_chart(title: str, subtitle: str, lines: Lines, **labels) -> str:
    return svg(title, subtitle, plot(Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), lines, **labels))


class Bar(NamedTuple):
    """One contender: its name, length, colour and the words behind its bar."""

    name: str
    value: float
    colour: str
    words: str


def bars(groups: dict[str, list[Bar]], *, most: float, top: float = 62) -> tuple[list[str], float]:
    """Horizontal bars under their groups' titles, and where they end; bars beyond `most` are cut."""
    parts, y = [], top
    for label, group in groups.items():
        parts.append(text(16, y + 12, label, kind="title"))
        y += 24
        for bar in group:
            width = max(min(bar.value / most, 1) * 300, 1.5)
            parts.append(text(232, y + 12, bar.name, anchor="end", kind="small"))
            parts.append(f'<rect x="240" y="{y}" width="{width:.1f}" height="16" rx="2" fill="{bar.colour}"/>')
            if bar.value > most:  # at full length it would squeeze the others
                parts.append(text(240 + width - 22, y + 12, "//", kind="small"))
            parts.append(text(248 + width, y + 12, bar.words, kind="small"))
            y += 22
        y += 14
    return parts, y


def memory_chart() -> str:
    """The longest sequence whose training step fits the memory budget: one bar for each contender."""
    rows = [r for r in rows_of("long_context") if not r["predicted"] and "switch" not in r]
    names = {
        "bco_fast": "bco_fast",
        "TRL 1.12 BCO": "TRL 1.12 BCOTrainer",
        "TRL 1.16 KTOTrainer": "TRL 1.16 KTOTrainer",
        "PyTorch that stores the logits": "PyTorch, stored logits",
    }
    found = {r["case"]: r for r in rows}
    groups = {}
    for mode, label in (("LoRA", "LoRA"), ("full", "all weights trained")):
        cases = {name: found[f"small, {case}, {mode}"] for case, name in names.items()}
        group = [
            Bar(name, r["longest"], OURS if name == "bco_fast" else THEIRS[3], f"{r['longest']:,} tokens")
            for name, r in cases.items()
        ]
        groups[label] = sorted(group, key=lambda bar: -bar.value)
    row = rows[0]
    parts, bottom = bars(groups, most=max(bar.value for group in groups.values() for bar in group))
    return svg(
        f"Longest context within {row['budget_mb']:.0f} MB",
        f"One training step of a {row['parameters'] / 1e6:.0f}M-parameter Llama, V = {row['V']}, float32, on a CPU; memory beyond the model",
        parts,
        bottom + 6,
    )


def time_chart() -> str:
    """Processor seconds of the head's forward and backward: one bar for each contender."""
    rows = [
        r
        for r in rows_of("head_peers")
        if (r["part"], r["shape"], r["logits"], r["dtype"]) == ("time", "Qwen2.5-0.5B", "peaked", "float32")
    ]
    groups = {}
    for mode, label in (("frozen", "frozen head (LoRA)"), ("trainable", "trained head")):
        group = sorted((r for r in rows if r["mode"] == mode and "processor_s" in r), key=lambda r: r["processor_s"])
        if mode == "frozen":  # there is no backward to be sparse
            group = [r for r in group if "sparse" not in r["contender"]]
        plain = next(r["processor_s"] for r in group if r["contender"] == "PyTorch")
        groups[label] = [
            Bar(
                r["contender"],
                r["processor_s"] / plain,
                THEIRS[3] if not r["contender"].startswith("bco_fast") else OURS if r["processor_s"] < plain else LOSES,
                f"{r['processor_s']:.2f} s, {r['extra_mb']:.0f} MB",
            )
            for r in group
        ]
    row = rows[0]
    parts, bottom = bars(groups, most=2.5)
    return svg(
        "lm-head, forward and backward",
        f"Qwen2.5-0.5B's head, N = {row['N']}, float32, one CPU core: processor time and extra memory",
        parts,
        bottom + 6,
    )


def step_chart() -> str:
    """Tokens per processor second of a training step, by sequence length."""
    rows = rows_of("peers_step_lengths")
    colours = {"bco_fast BCO": OURS, "bco_fast KTO": OURS_TOO}
    peers = iter(THEIRS)
    lines = {}
    for name in dict.fromkeys(r["trainer"] for r in rows):
        points = [(r["max_length"], r["tokens_per_processor_s"]) for r in rows if r["trainer"] == name]
        short = name.replace("precomputed", "cached")
        lines[short] = (points, colours.get(name) or next(peers), "precomputed" in name)
    row = rows[0]
    return lines_chart(
        "Training step by sequence length",
        f"{row['parameters'] / 1e6:.0f}M-parameter Llama, V = {row['V']}, batch {row['batch']}, float32, one CPU core; dashed: reference precomputed",
        lines,
        x_label="sequence length, tokens",
        y_label="tokens per processor second",
        log_y=False,
    )


def growth_chart() -> str:
    """Time and extra memory of the head against tokens and vocabulary, all axes logarithmic, with fitted exponents."""
    rows = rows_of("growth")
    series = {
        ("bco_fast", "frozen"): OURS,
        ("bco_fast", "trainable"): OURS_TOO,
        ("PyTorch", "frozen"): THEIRS[0],
        ("PyTorch", "trainable"): THEIRS[1],
    }
    fitted = {(r["contender"], r["mode"], r["fit"]): r for r in rows if "fit" in r}
    points = [r for r in rows if "fit" not in r]
    parts = []
    for i, (name, mode) in enumerate(series):
        x = 16 + 172 * i
        parts.append(f'<rect x="{x}" y="52" width="10" height="10" fill="{series[name, mode]}"/>')
        parts.append(text(x + 16, 61, f"{name}, {'frozen' if mode == 'frozen' else 'trained'}", kind="small"))
    for i, (field, exponent, label) in enumerate(
        (("min_s", "time_exponent", "seconds"), ("extra_mb", "memory_exponent", "MB beyond inputs and gradients"))
    ):
        for j, (axis, other, words) in enumerate((("N", "V", "tokens N"), ("V", "N", "vocabulary V"))):
            lines = {}
            for (name, mode), colour in series.items():
                line = [r for r in points if (r["contender"], r["mode"], r["axis"]) == (name, mode, axis)]
                fit = fitted[name, mode, axis][exponent]
                lines[f"{axis}^{fit:.2f}|{name}, {mode}"] = [(r[axis], r[field]) for r in line], colour, False
            fixed = next(r[other] for r in points if r["axis"] == axis)
            box = Box(LEFT + 352 * j, 108 + 252 * i, LEFT + 352 * j + 210, 268 + 252 * i)
            parts += plot(box, lines, x_label=f"{words}, {other} = {fixed}", y_label=label, log_y=True)
    row = points[0]
    return svg(
        "lm-head: growth of time and memory",
        f"Forward and backward, D = {row['D']}, float32, one CPU core; labels: fitted exponents",
        parts,
        580,
    )


DRAWN = {"memory": memory_chart, "time": time_chart, "step": step_chart, "growth": growth_chart}
