"""docs/claims.md from the rows of claims.py: tables with intervals, and for each claim whether it shows.

    python benchmarks/claims_page.py

An interval is Student's for the mean of the seeds, 95 %; of a difference, for the seeds' paired differences. With three seeds it
is 2.5 sample deviations wide to each side, so only large effects exclude 0.
"""

# ruff: noqa: RUF001 - the page prints − and ∣

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import RESULTS, ROOT

from bco_fast.evaluation.sweep import interval as half_width

PAGE = ROOT / "docs" / "claims.md"


class Statement(NamedTuple):
    """`more` has more of `field` than `less`; without `less`, more than `than`."""

    text: str
    field: str
    more: str
    less: str | None = None
    than: float = 0.0


class Section(NamedTuple):
    claim: str
    title: str
    says: str
    columns: dict[str, str]
    """field -> head of its column"""
    statements: Sequence[Statement]


RATES = ("0.0003", "0.001", "0.003")

SECTIONS = (
    Section(
        "a",
        "The reward shift (BCO, Fig. 3 and 4)",
        "The same pairs train BCO, BCE, KTO and DPO with one β and one learning rate. Error term, KL and z_ref are means over the "
        "last quarter of the steps; KL is App. B's −½(r₊ + r₋)/β. The paper: BCO's error term is smaller than BCE's; BCO and DPO "
        "reach a high KL, BCE and KTO a low one; z_ref collapses to 0.",
        {"error_term": "error term", "kl": "KL, nats", "z_ref_zero": "steps with z_ref = 0", "good": "good completions", "score": "score"},
        (
            Statement("BCO's error term is smaller than BCE's (Fig. 3)", "error_term", "BCE", "BCO"),
            Statement("BCO's KL is larger than BCE's (Fig. 4a)", "kl", "BCO", "BCE"),
            Statement("BCO's KL is larger than KTO's (Fig. 4a)", "kl", "BCO", "KTO"),
            Statement("DPO's KL is larger than BCE's (Fig. 4a)", "kl", "DPO", "BCE"),
            Statement("z_ref is 0 in more than nine tenths of the late steps (Fig. 4b)", "z_ref_zero", "KTO", than=0.9),
            Statement("BCO's completions are better than BCE's (Fig. 1)", "good", "BCO", "BCE"),
            Statement("BCO's completions are better than KTO's (Fig. 1)", "good", "BCO", "KTO"),
        ),
    ),
    Section(
        "b",
        "Underlying distribution matching (BCO, first version)",
        "Thumbs up come mostly from three kinds of prompts, thumbs down mostly from the other three (15 % of the rest is kept). "
        "Density ratios weigh the thumbs down. The claim: with them, thumbs from different prompts do no harm. Shares of good "
        "completions are given for both sets of held-out prompts.",
        {"good_liked": "good, liked kinds", "good_disliked": "good, disliked kinds", "good": "mean of both", "delta": "δ"},
        (
            Statement("Density ratios help", "good", "BCO, density ratio", "BCO"),
            Statement("They help more than oversampling", "good", "BCO, density ratio", "BCO, oversampling"),
            Statement("δ is better weighted like the loss", "good", "BCO, density ratio", "BCO, density ratio, δ unweighted"),
        ),
    ),
    Section(
        "c1",
        "Near-identical pairs (BNF, §2)",
        'Pairs of sums that differ in the last token, "3 + 5 = 8" and "3 + 5 = 7". Shifts are mean changes of log-likelihood from the '
        "start, nats per completion. The paper: the log-likelihood of both sides collapses without a contrastive loss, and DPO "
        "fails with its usual β; BNF is stable.",
        {"chosen_shift": "chosen, shift", "rejected_shift": "rejected, shift", "sums_trained": "right, trained", "sums_held_out": "right, held out"},
        (
            Statement("Under NLL+PLL the chosen side falls below BNF's", "chosen_shift", "BNF", "NLL+PLL"),
            Statement("Under DPO with β 0.1 the chosen side falls below BNF's", "chosen_shift", "BNF", "DPO, β 0.1"),
            Statement("A larger β protects the chosen side under DPO", "chosen_shift", "DPO, β 2", "DPO, β 0.1"),
            Statement("SimPO moves the rejected side further than BNF", "rejected_shift", "BNF", "SimPO"),
            Statement("BNF keeps more sums that it was not aligned on right than DPO with β 0.1", "sums_held_out", "BNF", "DPO, β 0.1"),
        ),
    ),
    Section(
        "c2",
        "Alignment tax, learning rate, shifts (BNF, Table 4, §5.1, Fig. 3 and 4)",
        "Aligned on packing; the sums stand for reasoning. Lost sums are the share answered right before, minus after. Shifts are "
        "those of the policy's greedy answers against the reference, at the middle rate. The paper: BNF pays the lowest tax, has "
        "the smallest log-likelihood shift, a larger logit shift than DPO and IPO, and the most even logit shifts (lowest Gini). In "
        "the outer tenths of DPO's token shifts, BNF has fewer tokens and SimPO more.",
        {
            "good": "good completions", "sums_lost": "sums lost", "logp_shift": "∣Δ logp∣, nats", "logp_shift_per_token": "per token",
            "logit_shift_per_token": "∣Δ logit∣ per token", "logit_gini": "Gini", "outer_share": "in DPO's outer tenths",
        },
        (
            *(Statement(f"BNF loses fewer sums than {peer}, rate {rate}", "sums_lost", f"{peer}, rate {rate}", f"BNF, rate {rate}") for rate in RATES for peer in ("DPO", "SimPO")),
            *(Statement(f"BNF's log-likelihood shift is smaller than {peer}'s (Fig. 3a)", "logp_shift", f"{peer}, rate 0.001", "BNF, rate 0.001") for peer in ("DPO", "IPO", "SimPO")),
            *(Statement(f"BNF's logit shift is larger than {peer}'s (Fig. 3e)", "logit_shift_per_token", "BNF, rate 0.001", f"{peer}, rate 0.001") for peer in ("DPO", "IPO")),
            *(Statement(f"BNF's Gini coefficient is lower than {peer}'s (Fig. 3f)", "logit_gini", f"{peer}, rate 0.001", "BNF, rate 0.001") for peer in ("DPO", "IPO", "SimPO")),
            Statement("BNF has fewer tokens in DPO's outer tenths than DPO (Fig. 4)", "outer_share", "DPO, rate 0.001", "BNF, rate 0.001"),
            Statement("SimPO has more tokens in DPO's outer tenths than DPO (Fig. 4)", "outer_share", "SimPO, rate 0.001", "DPO, rate 0.001"),
        ),
    ),
    Section(
        "d",
        "Pairing ratios (BNF, Table 6)",
        "A share of the pairs keeps both sides, the others lose one; one number of epochs for all. The paper: more pairs, better "
        "answers; without any, BNF still improves on the start and keeps the reasoning.",
        {"rows": "rows", "good": "good completions", "score": "score", "sums": "sums right"},
        (
            Statement("All pairs are better than none", "good", "100%", "0%"),
            Statement("No pairs are better than the start", "good", "0%", "start"),
            Statement("No pairs keep more sums right than all pairs", "sums", "0%", "100%"),
        ),
    ),
    Section(
        "e",
        "Graded scores, thumbs and pairs (UNA, Tables 1 to 3)",
        "The same two answers to each prompt: as a pair, as two thumbs, with their graded scores. Most scores are above 0.5, so "
        "una_score wants positive rewards of poor answers too. Each method has its own learning "
        "rate. The paper: thumbs by UNA beat DPO and KTO, and graded scores beat thumbs.",
        {"good": "good completions", "score": "score", "kl": "KL, nats"},
        (
            Statement("UNA-score is better than UNA-binary (MSE)", "score", "UNA-score (MSE)", "UNA-binary (MSE)"),
            Statement("UNA-score is better than DPO", "score", "UNA-score (MSE)", "DPO (UNA-pairwise)"),
            Statement("UNA-binary (MSE) is better than KTO", "score", "UNA-binary (MSE)", "KTO"),
            Statement("UNA-binary (BCE) is better than DPO", "score", "UNA-binary (BCE)", "DPO (UNA-pairwise)"),
        ),
    ),
    Section(
        "g",
        "Nine thumbs up to one thumbs down (BCO, App. C)",
        "Nothing, λ by class sizes, or oversampling of the rarer class; δ the midpoint of both classes (Eq. 7) or the pooled mean. The "
        "paper balances by oversampling, without which training may be unstable.",
        {"good": "good completions", "score": "score", "delta": "δ"},
        (
            Statement("Oversampling is better than nothing, δ balanced", "good", "oversampling, δ balanced", "none, δ balanced"),
            Statement("λ is better than nothing, δ balanced", "good", "λ, δ balanced", "none, δ balanced"),
            Statement("A balanced δ is better than a pooled one, without balancing", "good", "none, δ balanced", "none, δ pooled"),
        ),
    ),
)  # fmt: skip

ELSEWHERE = {
    "a": Section(
        "a, real",
        "The reward shift on real feedback",
        "The same with a Llama of 20M parameters and AlpacaEval's prompts, each with two models' answers and a published judgement "
        "(`benchmarks/claims_real.py`; the text is not part of the project, and these rows stay when `make claims` runs without it). "
        "{real}",
        {"error_term": "error term", "delta": "δ", "kl": "KL, nats", "z_ref": "z_ref, nats", "z_ref_zero": "steps with z_ref = 0"},
        (
            Statement("BCO's error term is smaller than BCE's (Fig. 3)", "error_term", "BCE", "BCO"),
            Statement("BCO's KL is larger than BCE's (Fig. 4a)", "kl", "BCO", "BCE"),
            Statement("BCO's KL is larger than KTO's (Fig. 4a)", "kl", "BCO", "KTO"),
            Statement("DPO's KL is larger than BCE's (Fig. 4a)", "kl", "DPO", "BCE"),
            Statement("z_ref is 0 in more than nine tenths of the late steps (Fig. 4b)", "z_ref_zero", "KTO", than=0.9),
        ),
    ),
    "e": Section(
        "f",
        "Online UNA against RLHF (UNA, §4.2, Tables 4 to 6)",
        "`una_score`, TRL's RLOO and TRL's PPO sample from the demo's fine-tuned model and are judged by one reward model, which "
        "TRL's RewardTrainer made from pairs (`benchmarks/online_ppo.py`). {online} Good completions are by the rule, which no method "
        "saw. The paper: UNA is better than RLHF, and takes 3.5 h where PPO takes 8 h, with less memory, as it trains no value model.",
        {
            "good": "good completions", "model_reward": "reward model", "kl": "KL, nats", "ms_per_token": "processor ms a token",
            "peak_mb": "peak, MB", "grown_mb": "over what it held before training", "models_mb": "weights of all models",
        },
        (
            Statement("UNA's completions are better than PPO's", "good", "bco_fast una_score", "TRL 1.12 PPO"),
            Statement("UNA's completions are better than RLOO's", "good", "bco_fast una_score", "TRL 1.12 RLOO"),
            Statement("UNA takes less processor time than PPO", "ms_per_token", "TRL 1.12 PPO", "bco_fast una_score"),
            Statement("UNA takes less processor time than RLOO", "ms_per_token", "TRL 1.12 RLOO", "bco_fast una_score"),
            Statement("UNA's peak memory is lower than PPO's", "peak_mb", "TRL 1.12 PPO", "bco_fast una_score"),
            Statement("UNA's training adds less memory than PPO's", "grown_mb", "TRL 1.12 PPO", "bco_fast una_score"),
            Statement("UNA's training adds less memory than RLOO's", "grown_mb", "TRL 1.12 RLOO", "bco_fast una_score"),
            Statement("The models in memory are smaller than PPO's", "models_mb", "TRL 1.12 PPO", "bco_fast una_score"),
        ),
    ),
}  # fmt: skip
"""By the claim that they follow: sections whose rows are measured by other programs."""

HEAD = """# What the papers claim, seen on a CPU

Written by `benchmarks/claims_page.py` from [`claims.json`](../benchmarks/results/claims.json); `make claims` measures and writes
both. Unless a section says otherwise, it runs on one fine-tuned Llama of {parameters} with two skills (packing, and sums of two
digits) and a rule that judges. Completions have four to six tokens. So this page shows mechanisms, not the papers' scores: a claim about chat at 8B
may hold there and not here, and the other way round.

Numbers are means over seeds {seeds} with 95 % intervals of the mean. Learning rates were chosen on another seed
([`claims_tuning.json`](../benchmarks/results/claims_tuning.json)); nothing else was tuned. A claim "shows" if the interval of the
seeds' paired differences excludes 0, it "leans" that way if all seeds agree but the interval includes 0; "no" says that the seeds
disagree, "opposite" that the other way round shows. The start, before alignment: {start}.
"""


def values_of(rows: Sequence[dict], claim: str, method: str, field: str) -> list[float]:
    """By seed."""
    found = {
        row["seed"]: row[field] for row in rows if row["claim"] == claim and row["method"] == method and field in row
    }
    return [found[seed] for seed in sorted(found)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width; infinite for a single seed."""
    half = half_width(values)
    return statistics.mean(values), math.inf if half is None else half


def shown(values: Sequence[float]) -> str:
    mean, half = interval(values)
    digits = 0 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 3
    mean = mean + 0.0 if round(mean, digits) else 0.0
    return f"{mean:.{digits}f}" if half in (0, math.inf) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def verdict(differences: Sequence[float]) -> str:
    mean, half = interval(differences)
    if len(differences) == 1:
        return "one seed: so" if mean > 0 else "one seed: not so"
    if abs(mean) > half:
        return "shows" if mean > 0 else "opposite"
    agree = min(differences) > 0 or max(differences) < 0
    return ("leans" if mean > 0 else "leans the other way") if agree else "no"


def _differences(rows: Sequence[dict], claim: str, statement: Statement) -> list[float]:
    more = values_of(rows, claim, statement.more, statement.field)
    if statement.less is None:
        return [value - statement.than for value in more]
    at_start = statement.less == "start"
    less = values_of(rows, *(("start", "fine-tuned") if at_start else (claim, statement.less)), statement.field)
    return [a - b for a, b in zip(more, less, strict=True)]


def section(rows: Sequence[dict], part: Section) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows if row["claim"] == part.claim))
    lines = [f"## {part.title}", "", part.says, "", f"| | {' | '.join(part.columns.values())} |", "|---" * (1 + len(part.columns)) + "|"]  # fmt: skip
    for method in methods:
        cells = [values_of(rows, part.claim, method, field) for field in part.columns]
        lines.append(f"| {method} | {' | '.join(shown(values) if values else '' for values in cells)} |")
    lines += ["", "| claim | difference | seen |", "|---|---|---|"]
    for statement in part.statements:
        found = _differences(rows, part.claim, statement)
        lines.append(f"| {statement.text} | {shown(found)} | {verdict(found)} |")
    return "\n".join(lines) + "\n"


def about_real(rows: Sequence[dict]) -> str:
    """The sentences on the rows of claims_real.py."""
    row, seeds = rows[-1], len({row["seed"] for row in rows})
    nats = statistics.mean(row["nats_per_token"] for row in rows if "nats_per_token" in row)
    return (
        f"The model is fine-tuned on the text for {row['fine_tune_steps']} steps from random weights, after which a token costs "
        f"{nats:.1f} nats, then trained for "
        f"{row['steps']} steps of {row['batch']} completions, each of {min(row['steps'] * row['batch'] // 2, row['pairs'])} of the "
        f"{row['pairs']} pairs once, with β "
        f"{row['beta']:g}, a learning rate of {row['rate']:g}, and embeddings and lm-head as they are; rows are cut to "
        f"{row['max_length']} tokens. Nothing was tuned. Such a model writes no sense, so only the curves are compared: error term, δ, "
        "KL and z_ref are means over the last quarter of the steps."
        + (" One seed, so there are no intervals." if seeds == 1 else "")
    )


def curves(rows: Sequence[dict], fields: dict[str, str]) -> str:
    """How fields go over training: first, middle and last of the stored stretches, means over the seeds."""
    lines = ["| over training | first | middle | last |", "|---|---|---|---|"]
    for field, name in fields.items():
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [row[f"{field}_curve"] for row in rows if row["method"] == method and f"{field}_curve" in row]
            if found:
                places = [[curve[i] for curve in found] for i in (0, len(found[0]) // 2, -1)]
                lines.append(f"| {name}, {method} | {' | '.join(shown(values) for values in places)} |")
    return "\n" + "\n".join(lines) + "\n"


def online_rows(rows: Sequence[dict]) -> list[dict]:
    """Of online_ppo.py, as rows of this page."""
    return [
        {
            "claim": "f", "method": row["method"], "seed": row["seed"], "good": row["reward"],
            "grown_mb": row["peak_mb"] - row["before_mb"],
            **{name: row[name] for name in ("model_reward", "kl", "ms_per_token", "peak_mb", "models_mb")},
        }
        for row in rows
    ]  # fmt: skip


def about_online(rows: Sequence[dict]) -> str:
    """The sentences on the rows of online_ppo.py."""
    good = statistics.mean(row["reward_before"] for row in rows)
    tokens = min(row["generated_tokens"] for row in rows)
    rates = ", ".join(
        f"{method} {next(row for row in rows if row['method'] == method)['learning_rate']:g}"
        for method in dict.fromkeys(row["method"] for row in rows)
    )
    return (
        f"Each generates {tokens // 1000},000 tokens or a round more, {rows[0]['completions_per_step']} completions a step, and "
        f"{good:.3f} of the completions are good before. PPO makes four passes over each step's samples and trains a value model; UNA "
        f"and RLOO see each sample once. Learning rates: {rates} (PPO's is the best of three on seed 10, the others' those of "
        "`online_rloo.py`). All run in one environment with one thread; peak memory is of the process, and most of it are libraries."
    )


def _seconds(rows: Sequence[dict], field: str) -> float:
    """Of all seeds: the largest value of a seed's rows is that of all of them."""
    return sum(max(row[field] for row in rows if row["seed"] == seed) for seed in {row["seed"] for row in rows})


def page(rows: Sequence[dict], real: Sequence[dict] = (), online: Sequence[dict] = ()) -> str:
    (settings,) = [row for row in rows if row["claim"] == "settings"]
    measured = [row for row in rows if row["claim"] != "settings"]
    seeds = sorted({row["seed"] for row in measured})
    start = {field: shown(values_of(measured, "start", "fine-tuned", field)) for field in ("good", "score", "sums")}
    said = f"{start['good']} of the completions are good, their mean score is {start['score']}, and {start['sums']} of the sums are right"
    head = HEAD.format(parameters="two layers of 64 dimensions", seeds=", ".join(map(str, seeds)), start=said)
    rates = ", ".join(f"{name}: {rate:g}" for name, rate in settings["rates"].items() if name != "binary")
    spent = [(f"on one small model {settings['processor_s'] / 60:.0f}", True)]
    spent += [(f"on real feedback {_seconds(real, 'processor_s') / 60:.0f}", real)]
    spent += [(f"online {_seconds(online, 'whole_processor_s') / 60:.0f}", online)]
    times = ", ".join(text for text, there in spent if there)
    tail = (
        f"\nSettings: {settings['scale']['steps']} steps of {settings['scale']['batch']} completions, AdamW, linear schedule; learning "
        f"rate {settings['rates']['binary']:g} of 3e-4, 1e-3 and 3e-3, in UNA's tables {rates}. β is 0.5 unless a row says otherwise. Minutes of processor "
        f"time: {times}. `make claims` runs two programs at a time, one thread each.\n"
    )
    told = {"a": real and about_real(real), "e": online and about_online(online)}
    others = {"a": [row for row in real if "kl" in row], "e": online_rows(online)}
    parts = []
    for part in SECTIONS:
        parts.append(section(measured, part))
        if others.get(part.claim):
            more = ELSEWHERE[part.claim]
            more = more._replace(says=more.says.format(real=told[part.claim], online=told[part.claim]))
            parts.append(section(others[part.claim], more))
    if real:
        parts[1] += curves(real, {"error_term": "error term", "kl": "KL, nats", "z_ref": "z_ref, nats"})
    return head + "\n" + "\n".join(parts) + tail


def stored() -> str:
    """The page of the committed results."""
    files = (RESULTS / f"{name}.json" for name in ("claims", "claims_real", "online_ppo"))
    return page(*(json.loads(file.read_text())["rows"] for file in files))


def write(target: Path = PAGE) -> None:
    target.write_text(stored())


if __name__ == "__main__":
    write()
