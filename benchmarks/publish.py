"""What the documentation takes from the result files: the charts, the figures of README.md and docs/online.md, docs/results.md.

    python benchmarks/publish.py

A figure of a page is what stands before a mark `<!-- file; case; field -->`; it keeps its number of decimals.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from charts import CHARTS, DRAWN, ROOT, rows_of
from contenders import CONTENDERS, LOGITS
from counts import MODELS
from long_context import CASES

PAGES, TABLES = (ROOT / "README.md", ROOT / "docs" / "online.md"), ROOT / "docs" / "results.md"
FIGURE = re.compile(r"([\d.]+)(<!-- (\w+); ([^;]+); (\w+) -->)")
MODES = {"frozen": "frozen head", "trainable": "trained head"}


def refreshed(page: str) -> str:
    """The page with its marked figures as the result files have them."""
    rows_of_file = functools.cache(rows_of)

    def figure(found: re.Match) -> str:
        old, mark, name, case, field = found.groups()
        row = next(row for row in rows_of_file(name) if row["case"] == case)
        return f"{row[field]:.{len(old.partition('.')[2])}f}{mark}"

    return FIGURE.sub(figure, page)


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def ran_on(rows: list[dict]) -> str:
    """Machine and dates of rows that may be of several runs."""
    measured = [row["measured"] for row in rows if "measured" in row]
    dates = sorted({m["date"] for m in measured})
    return f"{', '.join(sorted({m['cpu'] for m in measured}))}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


class Missing:
    """Why contenders have no figure, as notes under a table."""

    def __init__(self) -> None:
        self.notes: dict[str, list[str]] = {}

    def cell(self, row: dict) -> str:
        names = self.notes.setdefault(row["error"], [])
        if row["contender"] not in names:
            names.append(row["contender"])
        return f"[{list(self.notes).index(row['error']) + 1}]"

    def lines(self) -> list[str]:
        return [f"{i}. {', '.join(names)}: `{why}`" for i, (why, names) in enumerate(self.notes.items(), 1)]


def head_times(rows: list[dict], shape: str, dtype: str, missing: Missing) -> list[str]:
    """One shape's table: processor time over plain PyTorch's, and extra memory."""
    here = [r for r in rows if (r["part"], r["shape"], r["dtype"]) == ("time", shape, dtype)]
    if not here:
        return []

    def cell(contender: str, mode: str, logits: str) -> str:
        row = next((r for r in here if (r["contender"], r["mode"], r["logits"]) == (contender, mode, logits)), None)
        if row is None:
            return ""
        if "error" in row:
            return missing.cell(row)
        return f"{row['ratio_to_plain']:.2f}, {row['extra_mb']:.0f} MB"

    columns = [(mode, logits) for mode in MODES for logits in LOGITS]
    size = here[0]
    plain = next(r for r in here if r["contender"] == "PyTorch" and r["mode"] == "trainable")
    title = f"**{shape}**, {dtype}: N = {size['N']}, D = {size['D']}, V = {size['V']}"
    title += "" if size["softcap"] is None else f", softcap {size['softcap']:g}"
    title += f"; plain PyTorch with a trained head took {plain['processor_s']:.2f} s on {plain['logits']} logits."
    present = {row["contender"] for row in here}
    body = [[name, *(cell(name, *column) for column in columns)] for name in CONTENDERS if name in present]
    return [title, "", *markdown(["", *(f"{MODES[mode]}, {logits}" for mode, logits in columns)], body), ""]


def head_section() -> Iterator[str]:
    rows = rows_of("head_peers")
    yield "## The lm-head against its peers"
    yield ""
    yield (
        "Forward and backward with a frozen head (LoRA) and with a trained one. A cell is the processor time over plain "
        "PyTorch's in the same contest, and the memory beyond the inputs, gradients included; below 1 is faster. Shapes "
        f"marked /4 have a quarter of the model's D and V. One core, {ran_on(rows)}."
    )
    yield ""
    missing = Missing()
    for dtype in ("float32", "bfloat16"):
        for shape in dict.fromkeys(r["shape"] for r in rows):
            yield from head_times(rows, shape, dtype, missing)
    yield "No figure:"
    yield ""
    yield from missing.lines()
    yield ""
    yield "### Errors in bfloat16"
    yield ""
    yield (
        "Nats against float64: of a token (root mean square, largest), and the largest of sums over 256 and 4096 tokens. "
        "Who gives no log-probability of a token has no row."
    )
    yield ""
    fields = ["logp_rms_error", "logp_max_error", "sum_256_error", "sum_4096_error"]
    for shape in dict.fromkeys(r["shape"] for r in rows if r["part"] == "errors"):
        for logits in LOGITS:
            here = {
                r["contender"]: r
                for r in rows
                if (r["part"], r["shape"], r["logits"]) == ("errors", shape, logits) and "error" not in r
            }
            if here:
                yield f"**{shape}**, {logits} logits"
                yield ""
                body = [[name, *(f"{here[name][f]:.2g}" for f in fields)] for name in CONTENDERS if name in here]
                yield from markdown(["", "token, rms", "token, max", "256 tokens", "4096 tokens"], body)
                yield ""


def step_section() -> Iterator[str]:
    rows = rows_of("peers_step_lengths")
    row = rows[0]
    lengths = sorted({r["max_length"] for r in rows})
    yield "## A training step by context length"
    yield ""
    yield (
        f"A Llama of {row['parameters'] / 1e6:.0f}M parameters, V = {row['V']}, batch {row['batch']}, float32, AdamW. Tokens "
        f"a second of processor time, peak resident memory. One core, {ran_on(rows)}."
    )
    yield ""
    body = []
    for trainer in dict.fromkeys(r["trainer"] for r in rows):
        by_length = {r["max_length"]: r for r in rows if r["trainer"] == trainer}
        cells = [by_length.get(length) for length in lengths]
        body.append(
            [trainer, *("" if r is None else f"{r['tokens_per_processor_s']}, {r['peak_mb']:.0f} MB" for r in cells)]
        )
    yield from markdown(["", *(f"{length} tokens" for length in lengths)], body)
    yield ""


def context_section() -> Iterator[str]:
    rows = rows_of("long_context")
    measured, predicted = ([r for r in rows if r["predicted"] is kind] for kind in (False, True))
    measured.sort(key=lambda r: list(CASES).index(r["case"].partition(", ")[2]))
    shape = measured[0]
    yield "## The longest context that fits"
    yield ""
    yield (
        f"Two optimizer steps on one sequence of a Llama of {shape['parameters'] / 1e6:.0f}M parameters, V = {shape['V']}, "
        f"float32, within {shape['budget_mb']:.0f} MB of resident memory; {ran_on(measured)}. Predicted: counted bytes at "
        "the length found."
    )
    yield ""

    def found(r: dict) -> list[str]:
        name = r["case"].partition(", ")[2]
        if "error" in r:
            return [name, f"`{r['error']}`", "", ""]
        longest = f"{r['longest']}{'' if r['too_long'] else ' or more'}"
        guess = f"{r['predicted_mb']:.0f} MB" if "predicted_mb" in r else ""
        return [name, longest, f"{r['peak_mb']:.0f} MB" if r["peak_mb"] else "", guess]

    yield from markdown(["", "tokens", "at the peak", "predicted"], [found(r) for r in measured])
    yield ""
    yield (
        f"Predicted for a GPU of {predicted[0]['budget_gb']:.0f} GB in bfloat16, a twentieth of it left to the allocator; "
        "**not measured**. Offloaded: the layers' checkpoints wait in host memory."
    )
    yield ""
    body = [
        [r["case"].removeprefix("predicted: "), f"{r['longest'] // 1024}k", f"{r['64k_gb']} GB", f"{r['256k_gb']} GB"]
        for r in predicted
    ]
    yield from markdown(["", "tokens that fit", "at 64k tokens", "at 256k tokens"], body)
    yield ""


def growth_section() -> Iterator[str]:
    fits = [r for r in rows_of("growth") if "fit" in r]
    yield "## Growth with tokens and vocabulary"
    yield ""
    yield "![Time and memory of the head against tokens and vocabulary, logarithmic](charts/growth.svg)"
    yield ""
    yield "Fitted exponents p of x^p: 1 is linear, 0 is flat. Memory is that beyond inputs, results and gradients."
    yield ""
    body = [
        [
            f"{r['contender']}, {MODES[r['mode']]}",
            r["fit"],
            f"{r['time_exponent']:.2f}",
            f"{r['memory_exponent']:.2f}",
            f"{r['largest_extra_mb']:.0f} MB",
        ]
        for r in fits
    ]
    yield from markdown(["", "along", "time", "memory", "most"], body)
    yield ""


def tables() -> str:
    lines = [
        "# Results",
        "",
        "Written by `benchmarks/publish.py` from the rows of [`benchmarks/results/`](../benchmarks/results); what is measured and "
        "how is in [benchmarks.md](benchmarks.md). Where we lose, the row stays. Models are those of "
        f"[`counts.py`](../benchmarks/counts.py): {', '.join(MODELS)}.",
        "",
    ]
    for section in (head_section, step_section, context_section, growth_section):
        lines += section()
    return "\n".join(lines)


def main() -> None:
    CHARTS.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        (CHARTS / f"{name}.svg").write_text(draw())
        print(CHARTS / f"{name}.svg")
    TABLES.write_text(tables())
    for page in PAGES:
        page.write_text(refreshed(page.read_text()))
    print(TABLES, *PAGES, sep="\n")


if __name__ == "__main__":
    main()
