"""Bring the documentation up to date with the result files: charts, docs/results.md, numbers of README.md and docs/online.md.

    python benchmarks/publish.py

figures.py lists the numbers of the two pages and the row each of them comes from.
"""

from __future__ import annotations

from collections.abc import Iterator

import charts
import figures
import gpu_rows
from charts import CHARTS, DRAWN, ROOT, environment_of, rows_of
from contenders import CONTENDERS, LOGITS
from counts import MODELS
from long_context import CASES

TABLES = ROOT / "docs" / "results.md"
MODES = {"frozen": "frozen head", "trainable": "trained head"}


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def ran_on(rows: list[dict]) -> str:
    """Machine and dates of the rows, which can come from several runs."""
    measured = [row["measured"] for row in rows if "measured" in row]
    dates = sorted({m["date"] for m in measured})
    return f"{', '.join(sorted({m['cpu'] for m in measured}))}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


class Missing:
    """Why contenders have no result, as notes under a table."""

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
    """Table of one shape: processor time relative to plain PyTorch, and extra memory."""
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
    title += f". Plain PyTorch with a trained head takes {plain['processor_s']:.2f} s on {plain['logits']} logits."
    present = {row["contender"] for row in here}
    body = [[name, *(cell(name, *column) for column in columns)] for name in CONTENDERS if name in present]
    return [title, "", *markdown(["", *(f"{MODES[mode]}, {logits}" for mode, logits in columns)], body), ""]


def head_section() -> Iterator[str]:
    rows = rows_of("head_peers")
    yield "## lm-head"
    yield ""
    yield "![Time of the lm-head, forward and backward, at Qwen2.5-0.5B's sizes](charts/time.svg)"
    yield ""
    yield (
        "Forward and backward with a frozen head (LoRA) and with a trained one. A cell holds the processor time relative to "
        "plain PyTorch in the same run (below 1 is faster), and the memory beyond the inputs, gradients included. Shapes "
        f"marked /4 have a quarter of the model's D and V. One core, {ran_on(rows)}."
    )
    yield ""
    missing = Missing()
    for dtype in ("float32", "bfloat16"):
        for shape in dict.fromkeys(r["shape"] for r in rows):
            yield from head_times(rows, shape, dtype, missing)
    yield "No result:"
    yield ""
    yield from missing.lines()
    yield ""
    yield "### Errors in bfloat16"
    yield ""
    yield (
        "CPU arithmetic, no GPU. Errors in nats against float64: per token (root mean square and largest), and the largest "
        "error of sums over 256 and 4096 tokens. Contenders that return no per-token log-probability are left out."
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
    yield "## Training step by sequence length"
    yield ""
    yield "![Tokens per second of a training step by sequence length](charts/step.svg)"
    yield ""
    yield (
        f"A Llama with {row['parameters'] / 1e6:.0f}M parameters, V = {row['V']}, batch {row['batch']}, float32, AdamW. A cell "
        f"holds tokens per second of processor time and peak resident memory. One core, {ran_on(rows)}."
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
    switches = [r for r in rows if "switch" in r]
    measured, predicted = ([r for r in rows if r["predicted"] is kind and "switch" not in r] for kind in (False, True))
    measured.sort(key=lambda r: list(CASES).index(r["case"].partition(", ")[2]))
    shape = measured[0]
    yield "## Longest context that fits"
    yield ""
    yield (
        f"Two optimizer steps on one sequence, a Llama with {shape['parameters'] / 1e6:.0f}M parameters, V = {shape['V']}, "
        f"float32, within {shape['budget_mb']:.0f} MB of resident memory; {ran_on(measured)}. The prediction counts bytes at "
        "the length that was found. bco_fast ran with the switches of its row in `long_context.json`; full training with "
        "`BCO_FAST_CPU_MATMUL=mkl`, since oneDNN keeps compiled products."
    )
    yield ""

    def found(r: dict) -> list[str]:
        name = r["case"].partition(", ")[2]
        if "error" in r:
            return [name, f"`{r['error']}`", "", ""]
        longest = f"{r['longest']}{'' if r['too_long'] else ' or more'}"
        guess = f"{r['predicted_mb']:.0f} MB" if "predicted_mb" in r else ""
        return [name, longest, f"{r['peak_mb']:.0f} MB" if r["peak_mb"] else "", guess]

    yield from markdown(["", "tokens", "peak memory", "predicted"], [found(r) for r in measured])
    yield ""
    yield (
        f"Predicted, **not measured**, for a GPU with {predicted[0]['budget_gb']:.0f} GB in bfloat16, with a twentieth of the "
        "memory reserved for the allocator: gradient checkpointing, `layer_chunk_tokens` 2048, rank-32 LoRA. Offloaded: activation "
        "checkpoints are kept in host memory, the last column at 1M tokens."
    )
    yield ""
    body = [
        [r["case"].removeprefix("predicted: "), f"{r['longest'] // 1024}k"]
        + [f"{r[at]} GB" for at in ("64k_gb", "256k_gb", "1m_gb", "1m_host_gb")]
        for r in predicted
    ]
    header = ["", "tokens that fit", "at 64k tokens", "at 256k tokens", "at 1M tokens", "host memory"]
    yield from markdown(header, body)
    yield ""
    yield (
        f"What each switch costs and leaves: a LoRA micro-batch of {switches[0]['tokens']} tokens on the CPU, processor time relative "
        "to no switch, the fastest of several turns; activations at the fullest moment, counted. Host memory is the CPU's own here, "
        "so its copies run alone; the model has four layers."
    )
    yield ""
    body = [[r["switch"], f"{r['time_ratio']:.2f}", f"{r['kb_a_token']:.1f} KB"] for r in switches]
    yield from markdown(["", "time", "memory a token"], body)
    yield ""


def growth_section() -> Iterator[str]:
    fits = [r for r in rows_of("growth") if "fit" in r]
    yield "## Growth with tokens and vocabulary"
    yield ""
    yield "![Time and memory of the head against tokens and vocabulary, logarithmic](charts/growth.svg)"
    yield ""
    yield (
        "Exponents p of a fit x^p: 1 is linear, 0 is constant. Memory excludes inputs, results and gradients; the last column "
        "is the most that was used."
    )
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
    yield from markdown(["", "varied", "time", "memory", "largest memory"], body)
    yield ""


def shared_section() -> Iterator[str]:
    everything = sorted(rows_of("shared_prompts"), key=lambda r: (r["case"].count(","), r["case"]))  # BCO first
    rows = [r for r in everything if r["case"].endswith(", shared")]
    yield "## Shared prompts and judged turns"
    yield ""
    yield (
        "A training step of `FeedbackTrainer` with every prompt computed once, relative to the same step with prompts repeated "
        "(packed, without a mask of all pairs): processor time, peak memory beyond what the process held before the first step, "
        f"and the reference's tokens per second. BCO where no objective is named. A small Llama, float32, {ran_on(rows)}."
    )
    yield ""
    body = [
        [
            r["case"].removesuffix(", shared"),
            *(f"{r[name]:.2f}" if name in r else "" for name in ("time_ratio", "memory_ratio", "fill_ratio")),
        ]
        for r in rows
    ]
    yield from markdown(["prompt + completions, tokens", "time", "memory", "reference"], body)
    yield ""
    peers = [r for r in everything if "trl_time_ratio" in r and not r["case"].endswith("TRL 1.16")]
    trainers = " and ".join(f"`{name}Trainer`" for name in dict.fromkeys(r["case"].split(",")[0] for r in peers))
    yield (
        f"The same steps relative to TRL 1.16's {trainers} on the same rows, with TRL's reference precomputed; {ran_on(peers)}. On this CPU TRL's head scores the prompts too. KTO's mismatched completions continue the "
        "prompts of the training pass; *apart*, they share prompts among themselves."
    )
    yield ""
    body = [[r["case"], *(f"{r[f'trl_{name}_ratio']:.2f}" for name in ("time", "memory"))] for r in peers]
    yield from markdown(["objective, prompt + completions", "time", "memory"], body)
    yield ""


def gpu_section() -> Iterator[str]:
    """Of a result that `gpu_suite.py --out` wrote and somebody copied to results/; nothing before."""
    if not (charts.RESULTS / "gpu_suite.json").is_file():
        return
    where = environment_of("gpu_suite")
    rows = [r for r in rows_of("gpu_suite") if r.get("benchmark") != "growth"]
    yield "## On a GPU"
    yield ""
    yield (
        f"{where['gpu']}, PyTorch {where['torch']}, Triton {where['triton']}, {where['date']}. Forward and backward in "
        "milliseconds and, for ours, what the GPU's measured matmul and copy rates allow; memory beyond the inputs. Steps and "
        "contexts are whole runs of a model with random weights: the reference and two optimizer steps."
    )
    yield ""
    missing = Missing()

    def kind(r: dict) -> tuple[str, str, str]:
        return r["shape"], r.get("mode", ""), r.get("logits", "")  # a part that was not finished has no mode

    for shape, mode, logits in dict.fromkeys(map(kind, rows)):
        body = []
        for r in (r for r in rows if kind(r) == (shape, mode, logits)):
            if "error" in r:
                cells = [missing.cell({**r, "contender": r["case"]}), "", ""]
            elif "median_s" not in r:
                cells = [f"did not fit: {r['why']}" if "why" in r else "did not fit", "", ""]
            else:
                derived = f"{1e3 * r['derived_s']:.1f}" if "derived_s" in r else ""
                cells = [f"{1e3 * r['median_s']:.1f}", derived, f"{r['extra_mb']:.0f} MB"]
            body.append([r["case"], *cells])
        yield ", ".join(filter(None, [f"**{shape}**", MODES.get(mode, mode), logits and f"{logits} logits"]))
        yield ""
        yield from markdown(["", "ms", "derived ms", "memory"], body)
        yield ""
    yield from missing.lines()
    yield ""
    fits = [r for r in rows_of("gpu_suite") if r.get("benchmark") == "growth" and "time_exponent" in r]
    if fits:
        yield "Exponents p of a fit x^p in tokens N and vocabulary V: 1 is linear, 0 is constant."
        yield ""
        body = [[r["case"], *(f"{r[f'{name}_exponent']:.2f}" for name in ("time", "memory"))] for r in fits]
        yield from markdown(["", "time", "memory"], body)
        yield ""


def tables() -> str:
    measured = (charts.RESULTS / "gpu_suite.json").is_file()
    lines = [
        "# Results",
        "",
        "`benchmarks/publish.py` writes this page from [`benchmarks/results/`](../benchmarks/results). "
        "[benchmarks.md](benchmarks.md) explains what is measured and how. Rows where bco_fast loses are kept. "
        f"{'' if measured else 'No GPU has been measured yet. '}Models are those of [`counts.py`](../benchmarks/counts.py): {', '.join(MODELS)}.",
        "",
    ]
    for section in (gpu_section, head_section, step_section, shared_section, context_section, growth_section):
        lines += section()
    return "\n".join(lines)


def main() -> None:
    CHARTS.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        (CHARTS / f"{name}.svg").write_text(draw())
        print(CHARTS / f"{name}.svg")
    TABLES.write_text(tables())
    for name, rules in figures.PAGES.items():
        page = ROOT / name
        text = gpu_rows.placed(page.read_text()) if name == "README.md" else page.read_text()
        page.write_text(figures.refreshed(text, rules))
        print(page)
    print(TABLES)


if __name__ == "__main__":
    main()
