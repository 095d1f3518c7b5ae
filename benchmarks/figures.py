"""The measured numbers of README.md and docs/online.md, each tied to a row of benchmarks/results/.

A rule quotes a piece of a page with {} for every measured number, and names the cell each number is: result file, case,
field. publish.py writes the numbers into the pages. The tests refuse a number that differs from its cell, and a number
with a unit outside code that no rule quotes. A rule without {} quotes a number that is a setting, not a measurement.
"""

# ruff: noqa: RUF001 - the pages print ×
from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import gpu_rows
from charts import rows_of

NUMBER = r"(\d+(?:,\d{3})*(?:\.\d+)?)"
UNIT = r"(?:s|ms|[kKMG]i?B|tokens?|nats|percent|points?|seconds?|minutes?|hours?|h|x|times|of\s+(?:it|its|the|plain|TRL)\b)\b|[×%]"
MEASUREMENT = re.compile(rf"(?<![\w.,^=§])(?<![\w^]-)(?:\d+(?:,\d{{3}})*\.\d+|\d[\d,.]*k?(?=\s?(?:{UNIT})))")
"""A number with a unit, or with a decimal point."""
VERSION = re.compile(r"(?:TRL|PyTorch|Python|Triton|Transformers)(?: ≥)? \d[\d.]*\d|\d{4}\.\d{5}")
"""Of a package, or of a paper on arXiv."""
CODE = re.compile(r"^```.*?^```|`[^`\n]+`|(?<=\])\([^)]*\)|<!--.*?-->", re.DOTALL | re.MULTILINE)


class Cell(NamedTuple):
    file: str
    case: str
    field: str
    scale: float = 1.0

    def value(self) -> float:
        (row,) = [row for row in _rows(self.file) if row["case"] == self.case]
        return row[self.field] * self.scale


_rows = functools.cache(rows_of)


def cells(file: str, *places: str) -> list[Cell]:
    """Cells of one file, each as "case: field"; cases hold commas and colons, fields neither."""
    return [Cell(file, *place.rsplit(": ", 1)) for place in places]


Rules = list[tuple[str, list[Cell]]]


def table_row(name: str, baseline: list[Cell], ours: list[Cell], ratio: Cell) -> tuple[str, list[Cell]]:
    """A line of the README's table; baseline and ours are time and memory."""
    text = f"| {name} | {{}} s | {{}} s | {{}}× | {{}} MB | {{}} MB |"
    return text, [baseline[0], ours[0], ratio, baseline[1], ours[1]]


def head_row(name: str, file: str, plain: str, ours: str) -> tuple[str, list[Cell]]:
    both = (cells(file, f"{case}: median_s", f"{case}: extra_mb") for case in (plain, ours))
    return table_row(name, *both, Cell(file, ours, "ratio_to_plain"))


def step_row(name: str, peer: str, ours: str) -> tuple[str, list[Cell]]:
    both = (cells("peers_step", f"{case}: median_s", f"{case}: peak_mb") for case in (peer, ours))
    return table_row(name, *both, Cell("peers_step", peer, "ours_time_ratio"))


QWEN, PEAKED = "time, Qwen2.5-0.5B", "peaked, float32, bco_fast"
ERRORS = "errors, Qwen2.5-0.5B, forward, peaked, bfloat16"

README: Rules = [
    (
        "Within {} MB, a LoRA step fits {} tokens; TRL's `BCOTrainer` fits {}. With all weights trained it is {} tokens "
        "against {}.",
        cells(
            "long_context",
            "small, bco_fast, LoRA: budget_mb",
            "small, bco_fast, LoRA: longest",
            "small, TRL 1.12 BCO, LoRA: longest",
            "small, bco_fast, full: longest",
            "small, TRL 1.12 BCO, full: longest",
        ),
    ),
    (
        "With a prompt of 1024 tokens and four completions of 128, a training step takes {}× the time and {}× the memory.",
        cells("shared_prompts", "1024 + 4 x 128, shared: time_ratio", "1024 + 4 x 128, shared: memory_ratio"),
    ),
    ("The demo itself takes {} s on two CPU cores", cells("demo", "seed 0: seconds")),
    (
        "completions that deserve thumbs up {}% {}% reward margin 0.00 {} AUC of the reward 0.50 {} [{}, {}]",
        [
            Cell("demo", "seed 0", "good_before", scale=100),
            Cell("demo", "seed 0", "good_after", scale=100),
            *cells("demo", "seed 0: held_out_margin", "seed 0: held_out_auc", "seed 0: auc_low", "seed 0: auc_high"),
        ],
    ),
    (
        "N = {} tokens, D = {}, V = {}, forward and backward",
        cells("head_cpu", "plain: N", "plain: D", "plain: V"),
    ),
    (
        "V = {}, batch {} of real feedback, {} tokens each",
        cells("peers_step", "bco_fast BCO: V", "bco_fast BCO: batch", "bco_fast BCO: max_length"),
    ),
    head_row("lm-head, frozen (LoRA), against PyTorch with stored logits", "head_cpu", "plain frozen", "ours frozen"),
    head_row("lm-head, trained", "head_cpu", "plain", "ours"),
    head_row(
        "lm-head, trained, peaked logits, `sparse_tolerance=2**-7`", "head_sparse", "peaked, plain", "peaked, tau 2^-7"
    ),
    table_row(
        "`FeedbackTrainer` step, against a bare PyTorch loop",
        cells("train_step", "bare loop: median_s", "bare loop: peak_mb"),
        cells("train_step", "FeedbackTrainer: median_s", "FeedbackTrainer: peak_mb"),
        Cell("train_step", "FeedbackTrainer", "ratio_to_bare"),
    ),
    step_row("BCO step, against TRL 1.12 `BCOTrainer`", "TRL 1.12 BCO", "bco_fast BCO"),
    step_row("BCO step, TRL's reference precomputed", "TRL 1.12 BCO, precomputed", "bco_fast BCO"),
    step_row("KTO step, against TRL 1.16 `KTOTrainer`", "TRL 1.16 KTO", "bco_fast KTO"),
    step_row("KTO step, TRL's reference precomputed", "TRL 1.16 KTO, precomputed", "bco_fast KTO"),
    (
        "it takes {}× the time of plain PyTorch; a frozen one takes {}×",
        cells("head_peers", *(f"{QWEN}, {mode}, {PEAKED}: ratio_to_plain" for mode in ("trainable", "frozen"))),
    ),
    (
        "it keeps {} of the blocks, with a relative error of {} in the hidden states' gradient",
        cells("head_sparse", "peaked, tau 2^-7: rho", "peaked, tau 2^-7: error_d_hidden"),
    ),
    ("takes {}× the time of plain PyTorch.", cells("head_sparse", "flat, tau 2^-7: ratio_to_plain")),
    (
        "log-probability of {} tokens is off by {} nats. PyTorch, which rounds the logits to bfloat16, is off by {} nats",
        cells("head_peers", *(f"{ERRORS}, {what}" for what in ("bco_fast: N", "bco_fast: sum_4096_error")))
        + cells("head_peers", f"{ERRORS}, PyTorch: sum_4096_error"),
    ),
    (
        "It fills at {} tokens/s; TRL 1.16 precomputes {} tokens/s",
        cells("cache", "ours: tokens_per_s", "TRL 1.16.0, batches of 32: tokens_per_s"),
    ),
    ("A million cached rows open and are looked up in {} s.", cells("cache", "a million rows: open_and_lookup_s")),
    ("the cache works again in {} s.", cells("cache", "after a crash: recovery_s")),
    (
        "an 8B model with LoRA at a million tokens, offloaded, needs {} GB of an H200's {} GB and {} GB of host memory",
        cells(
            "long_context",
            *(f"predicted: Llama-3-8B, LoRA, offloaded: {name}" for name in ("1m_gb", "budget_gb", "1m_host_gb")),
        ),
    ),
]


def rloo_row(method: str, name: str, setting: str) -> tuple[str, list[Cell]]:
    seeds = [f"{method}, seed {seed}" for seed in range(3)]
    text = f"| {name} | {setting} | {{}} · {{}} · {{}} | {{}} · {{}} · {{}} | {{}} s | {{}} MB |"
    places = [f"{seed}: {field}" for field in ("reward", "kl") for seed in seeds]
    return text, cells("online_rloo", *places, f"{seeds[2]}: step_median_s", f"{seeds[2]}: peak_mb")


def ppo_row(method: str, name: str, rate: str) -> tuple[str, list[Cell]]:
    seeds = [f"{method}, seed {seed}" for seed in range(3)]
    thrice = "{} · {} · {}"
    text = f"| {name} | {rate} | {thrice} | {thrice} | {thrice} | {{}} ms | {{}} MB | {{}} MB | {{}} MB |"
    places = [f"{seed}: {field}" for field in ("reward", "model_reward", "kl") for seed in seeds]
    return text, cells("online_ppo", *places, *(f"{seeds[2]}: {field}" for field in ("ms_per_token", "before_mb", "peak_mb", "models_mb")))  # fmt: skip


ONLINE: Rules = [
    *(
        (
            f"| {seed} | {{}} | {{}} | {{}} | {{}} nats | {{}} s |",
            [
                Cell("demo_online", seed, field)
                for field in ("good_before", "good_offline", "good_online", "online_kl", "seconds")
            ],
        )
        for seed in ("seed 0", "seed 1", "seed 2")
    ),
    ("β is 0.5 and the learning rate 3e-4", []),
    ("100,000 generated tokens", []),
    (
        "The reward before training is {}, {} and {}.",
        cells("online_rloo", *(f"TRL 1.16 RLOO, seed {seed}: reward_before" for seed in range(3))),
    ),
    rloo_row("bco_fast una_score", "una_score", "3e-4, 0.5"),
    rloo_row("bco_fast una_score, new samples each step", "una_score, new samples each step", "1e-3, 0.25"),
    rloo_row("bco_fast una_binary_bce", "una_binary_bce", "1e-3, 0.25"),
    rloo_row("TRL 1.16 RLOO, 8 steps a round", "RLOO, 8 steps a round", "3e-4, 0.05"),
    rloo_row("TRL 1.16 RLOO", "RLOO", "1e-3, 0.01"),
    rloo_row("TRL 1.16 RLOO, its default beta", "RLOO, TRL's default β", "1e-3, 0.05"),
    ("UNA's paper reports 3.5 h against 8 h for PPO", []),
    ("20,000 generated tokens", []),
    (
        "Before training, {}, {} and {} of the completions are good.",
        cells("online_ppo", *(f"TRL 1.12 PPO, seed {seed}: reward_before" for seed in range(3))),
    ),
    ppo_row("bco_fast una_score", "una_score", "3e-4"),
    ppo_row("TRL 1.12 RLOO", "RLOO", "3e-4"),
    ppo_row("TRL 1.12 PPO", "PPO", "3e-4"),
    (
        "Before training, our process holds {} MB and TRL's {} MB",
        cells("online_rloo", "bco_fast una_score, seed 2: before_mb", "TRL 1.16 RLOO, seed 2: before_mb"),
    ),
]

PAGES = {"README.md": README + [(line, []) for line in gpu_rows.lines()], "docs/online.md": ONLINE}


def pattern(text: str) -> re.Pattern:
    """Of a rule's text: white space may break anywhere, {} is a number."""
    pieces = (r"\s+".join(map(re.escape, piece.split(" "))) for piece in text.split("{}"))
    return re.compile(NUMBER.join(pieces))


def quoted(page: str, rules: Rules) -> Iterator[tuple[re.Match, list[Cell]]]:
    """Where each rule is on the page.

    Raises:
        LookupError: a rule is not there, or is there twice.
    """
    for text, its_cells in rules:
        found = list(pattern(text).finditer(page))
        if len(found) != 1:
            raise LookupError(f"the page has {len(found)} times: {text}")
        yield found[0], its_cells


def rounded(cell: Cell, shown: str) -> str:
    """The cell's value as the page writes it: the same decimals, thousands separated or not."""
    return f"{cell.value():{',' if ',' in shown else ''}.{len(shown.partition('.')[2])}f}"


def differences(page: str, rules: Rules) -> list[str]:
    """Numbers of the page that are not what their rows hold."""
    return [
        f"{shown} should be {rounded(cell, shown)}: {cell.file}, {cell.case}, {cell.field}"
        for found, its_cells in quoted(page, rules)
        for shown, cell in zip(found.groups(), its_cells, strict=True)
        if shown != rounded(cell, shown)
    ]


def unquoted(page: str, rules: Rules) -> list[str]:
    """Numbers outside code that look like measurements, and that no rule quotes; each with the text around it."""

    def blank(found: re.Match) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    bare = VERSION.sub(blank, CODE.sub(blank, page))
    covered = [found.span() for found, _ in quoted(page, rules)]
    return [
        page[max(found.start() - 30, 0) : found.end() + 20]
        for found in MEASUREMENT.finditer(bare)
        if not any(start <= found.start() < stop for start, stop in covered)
    ]


def refreshed(page: str, rules: Rules) -> str:
    """The page with its measured numbers as the result files have them."""
    changes = [
        (found.span(i), rounded(cell, found[i]))
        for found, its_cells in quoted(page, rules)
        for i, cell in enumerate(its_cells, 1)
    ]
    for (start, stop), number in sorted(changes, reverse=True):
        page = page[:start] + number + page[stop:]
    return page
