"""What the papers claim, on a model small enough for a CPU: the rows of docs/claims.md.

    python benchmarks/claims.py          results/claims.json and claims_tuning.json
    python benchmarks/claims_page.py     docs/claims.md from them; `make claims` does both

Every case starts from one fine-tuned model (`claims_world`) and runs on seeds 0, 1 and 2. Learning rates are chosen on seed 10,
which is no seed of the results: one for all methods of a claim where the paper has one, one for each method in UNA's tables. No
other number is tuned. claims_page.py writes the page from the rows; a claim that does not show stays on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from collections.abc import Collection, Iterable

import numpy as np
import torch
from claims_world import (
    Method,
    Scale,
    World,
    align,
    completions,
    dataset,
    pairs,
    quality,
    start,
    sum_answer,
    sums_right,
)
from common import RESULTS, save

from bco_fast.data.density_ratio import DensityRatio
from bco_fast.data.embedders import TfidfEmbedder
from bco_fast.data.tokenize import load_feedback
from bco_fast.evaluation.shifts import response_shifts, token_values

SEEDS, TUNING_SEED = (0, 1, 2), 10
GRID = (3e-4, 1e-3, 3e-3)
BETA = 0.5
"""Of every objective with one unless a claim is about β; the completions have about four tokens (`claims_world`)."""
Rates = dict[str, float]


def _tail(log: list[dict], name: str) -> float:
    """Mean over the last quarter of the steps."""
    return mean_of_both([entry[name] for entry in log[-max(len(log) // 4, 1) :]])


def mean_of_both(values: Iterable[float]) -> float:
    """Without the steps whose batch held one class: they have no KL and no error term. NaN if none is left."""
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def _method(loss_type: str, rate: float, **options) -> Method:
    return Method(loss_type, rate, {} if loss_type in ("bnf", "nll+pll") else {"beta": BETA}, **options)


# ---- BCO


BINARY = {"BCO": "bco", "BCE": "bce", "KTO": "kto", "DPO": "dpo"}


def reward_shift(world: World, scale: Scale, seed: int, rates: Rates) -> list[dict]:
    """a: error term, KL and z_ref while the same pairs train BCO, BCE, KTO and DPO."""
    rows, data = [], pairs(world.feedback)
    for name, loss_type in BINARY.items():
        policy, log = align(world, dataset(world, data, loss_type), _method(loss_type, rates["binary"]), scale, seed)
        row = {"method": name, "kl": _tail(log, "kl"), **quality(world, policy, world.held_out, scale, seed)}
        if name in ("BCO", "BCE"):
            row |= {"error_term": _tail(log, "error_term"), "delta": _tail(log, "delta") if name == "BCO" else 0.0}
        if name == "KTO":
            row["z_ref_zero"] = _tail([{"zero": float(entry["z_ref"] == 0)} for entry in log], "zero")
        rows.append(row | {"curve": [entry["kl"] for entry in log[:: max(len(log) // 10, 1)]]})
    return rows


LIKED = ("fruit", "tools", "animals")
RARE = 0.15


def _from_different_prompts(world: World, seed: int) -> list[dict]:
    """Thumbs up mostly of three kinds of prompts, thumbs down mostly of the other three."""
    rng = random.Random(seed)  # noqa: S311
    return [row for row in world.feedback if (row["prompt"].split()[2] in LIKED) == row["label"] or rng.random() < RARE]


def distribution(world: World, scale: Scale, seed: int, rates: Rates) -> list[dict]:
    """b: underlying distribution matching, with δ weighted like the loss or not; both sets of prompts."""
    data = _from_different_prompts(world, seed)
    prompts, labels = [row["prompt"] for row in data], [row["label"] for row in data]
    ratio = DensityRatio(TfidfEmbedder())
    auc = ratio.fit(prompts, labels)
    weights = np.where(labels, 1.0, np.clip(ratio.ratio(prompts), 0.5, 10.0))
    matched = [{**row, "weight": float(weight)} for row, weight in zip(data, weights, strict=True)]
    cases = {
        "BCO": (data, {}),
        "BCO, density ratio": (matched, {}),
        "BCO, density ratio, δ unweighted": (matched, {"weighted_shift": False}),
        "BCO, oversampling": (data, {"oversample": True}),
    }
    rows, sets = [], {}
    for kinds in (True, False):
        sets["liked" if kinds else "disliked"] = [p for p in world.held_out if (p.split()[2] in LIKED) is kinds]
    for name, (these, options) in cases.items():
        made = dataset(world, these, "bco")
        policy, log = align(world, made, _method("bco", rates["binary"], **options), scale, seed)
        found = {side: quality(world, policy, some, scale, seed)["good"] for side, some in sets.items()}
        both = {"good": (found["liked"] + found["disliked"]) / 2, "delta": _tail(log, "delta"), "auc_of_prompts": auc}
        rows.append({"method": name, **{f"good_{side}": value for side, value in found.items()}, **both})
    return rows


def imbalance(world: World, scale: Scale, seed: int, rates: Rates) -> list[dict]:
    """g: nine thumbs up to one thumbs down: nothing, λ, oversampling; δ from both classes alike or pooled."""
    up = [row for row in world.feedback if row["label"]]
    down = [row for row in world.feedback if not row["label"]]
    random.Random(seed).shuffle(down)  # noqa: S311
    data = dataset(world, up + down[: len(up) // 9], "bco")
    rows = []
    for name, options in {"none": {}, "λ": {"balance": True}, "oversampling": {"oversample": True}}.items():
        for balanced in (True, False):
            method = _method("bco", rates["binary"], shift_balanced=balanced, **options)
            policy, log = align(world, data, method, scale, seed)
            case = f"{name}, δ {'balanced' if balanced else 'pooled'}"
            found = quality(world, policy, world.held_out, scale, seed)
            rows.append({"method": case, "delta": _tail(log, "delta"), **found})
    return rows


# ---- BNF


NEAR = {
    "NLL+PLL": ("nll+pll", {}),
    "DPO, β 0.1": ("dpo", {"beta": 0.1}),
    "DPO, β 0.5": ("dpo", {"beta": 0.5}),
    "DPO, β 2": ("dpo", {"beta": 2.0}),
    "SimPO": ("simpo", {"beta": 2.0, "gamma": 1.0}),
    "BNF": ("bnf", {}),
}


@torch.no_grad()
def _log_likelihoods(world: World, model, data: list[dict]) -> np.ndarray:  # [pairs, 2] nats, chosen and rejected
    made = load_feedback(data, world.tokenizer, needs="pairs", max_length=32, progress=False)
    values = token_values(model, made.examples, pad_token_id=world.tokenizer.pad_token_id).logp
    lengths = [int(example.completion_mask.sum()) for example in made.examples]
    return np.array([part.sum() for part in np.split(values, np.cumsum(lengths)[:-1])]).reshape(-1, 2)


def near_pairs(world: World, scale: Scale, seed: int, rates: Rates) -> list[dict]:
    """c, first part: pairs that differ in one token, "3 + 5 = 8" and "3 + 5 = 7"."""
    rng, cut = random.Random(seed), 7 * len(world.sums) // 10  # noqa: S311
    trained, held_out = world.sums[:cut], world.sums[cut:]
    data = [{"prompt": p, "chosen": sum_answer(p), "rejected": sum_answer(p, rng.choice((1, -1)))} for p in trained]
    before, rows = _log_likelihoods(world, world.model, data), []
    for name, (loss_type, settings) in NEAR.items():
        method = Method(loss_type, rates["binary"], settings)
        policy, _ = align(world, dataset(world, data, loss_type), method, scale, seed)
        chosen, rejected = (_log_likelihoods(world, policy, data) - before).mean(0)
        row = {"method": name, "chosen_shift": float(chosen), "rejected_shift": float(rejected)}
        right = {
            "sums_trained": sums_right(world, policy, trained),
            "sums_held_out": sums_right(world, policy, held_out),
        }
        rows.append(row | right)
    return rows


TAXED = {"DPO": "dpo", "IPO": "ipo", "SimPO": "simpo", "BNF": "bnf"}


def alignment_tax(world: World, scale: Scale, seed: int, rates: Rates) -> list[dict]:
    """c, second part: aligned on packing, at three learning rates: what is gained there, what the sums lose, how far the
    log-likelihoods and logits of greedy answers move, and how many tokens move like the tenths that DPO moves most."""
    rows, data, deciles = [], pairs(world.feedback), None
    before = sums_right(world, world.model, world.sums)
    for name, loss_type in TAXED.items():
        settings = {"dpo": {"beta": BETA}, "ipo": {"beta": BETA}, "simpo": {"beta": 2.0, "gamma": 1.0}, "bnf": {}}[
            loss_type
        ]
        made = dataset(world, data, loss_type)
        for rate in GRID:
            policy, _ = align(world, made, Method(loss_type, rate, settings), scale, seed)
            row = {"method": f"{name}, rate {rate:g}", **quality(world, policy, world.held_out, scale, seed)}
            row["sums_lost"] = before - sums_right(world, policy, world.sums)
            if rate == GRID[1]:
                found, tokens = _shifts(world, policy)
                deciles = np.quantile(tokens, [0.1, 0.9]) if deciles is None else deciles  # DPO is the first
                row |= found | {"outer_share": float(np.mean((tokens < deciles[0]) | (tokens >= deciles[1])))}
            rows.append(row)
    return rows


def _shifts(world: World, policy) -> tuple[dict[str, float], np.ndarray]:
    """Policy against reference on the policy's greedy answers: Fig. 3, and the tokens' log-likelihood shifts, nats."""
    made = completions(world, policy, world.held_out, 0, greedy=True)
    rows = [
        {"prompt": p, "completion": c, "label": True} for p, c in zip(world.held_out, made, strict=True) if c.strip()
    ]
    examples = load_feedback(rows, world.tokenizer, max_length=32, progress=False).examples
    ours, theirs = (token_values(m, examples, pad_token_id=world.tokenizer.pad_token_id) for m in (policy, world.model))
    found = response_shifts(ours, theirs, [int(example.completion_mask.sum()) for example in examples])
    names = {"response_logp": "logp_shift", "response_logp_per_token": "logp_shift_per_token", "response_logit_per_token": "logit_shift_per_token", "response_logit_gini": "logit_gini"}  # fmt: skip
    return {short: found[name] or 0.0 for name, short in names.items()}, ours.logp - theirs.logp


RATIOS = (0.0, 0.25, 0.5, 1.0)


def pairing(world: World, scale: Scale, seed: int, rates: Rates) -> list[dict]:
    """d: BNF with some pairs, or none; one side of the others. As many epochs, so fewer steps with fewer rows."""
    rows, data = [], pairs(world.feedback)
    for ratio in RATIOS:
        made = dataset(world, data, "bnf", pairing_ratio=ratio)
        policy, _ = align(world, made, _method("bnf", rates["binary"], steps=len(made) / (2 * len(data))), scale, seed)
        row = {"method": f"{ratio:.0%}", "rows": len(made), **quality(world, policy, world.held_out, scale, seed)}
        rows.append(row | {"sums": sums_right(world, policy, world.sums)})
    return rows


# ---- UNA


UNA = {
    "DPO (UNA-pairwise)": "dpo",
    "KTO": "kto",
    "UNA-binary (MSE)": "una_binary_mse",
    "UNA-binary (BCE)": "una_binary_bce",
    "UNA-score (MSE)": "una_score",
}


def _una_rows(world: World, loss_type: str) -> list[dict]:
    """The same two answers to a prompt, as a pair (or its two thumbs) or with their scores."""
    two = pairs(world.feedback)
    if loss_type != "una_score":
        return two
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "score": score}
        for pair in two
        for side, score in zip(("chosen", "rejected"), pair["scores"], strict=True)
    ]


def una(world: World, scale: Scale, seed: int, rates: Rates) -> list[dict]:
    """e: the same answers as pairs, thumbs and graded scores, each method at its own learning rate."""
    rows = []
    for name, loss_type in UNA.items():
        made = dataset(world, _una_rows(world, loss_type), loss_type)
        policy, log = align(world, made, _method(loss_type, rates[name]), scale, seed)
        rows.append({"method": name, "kl": _tail(log, "kl"), **quality(world, policy, world.held_out, scale, seed)})
    return rows


# ---- all of it


CLAIMS = {
    "a": reward_shift, "b": distribution, "c1": near_pairs, "c2": alignment_tax, "d": pairing, "e": una, "g": imbalance,
}  # fmt: skip


def tune(scale: Scale) -> tuple[Rates, list[dict]]:
    """Learning rates with the highest mean score of completions on the tuning seed."""
    world, rows = start(TUNING_SEED, scale), []
    for loss_type in dict.fromkeys([*BINARY.values(), *UNA.values()]):
        made = dataset(world, _una_rows(world, loss_type), loss_type)
        for rate in GRID:
            policy, _ = align(world, made, _method(loss_type, rate), scale, TUNING_SEED)
            found = quality(world, policy, world.held_out, scale, TUNING_SEED)
            rows.append({"case": f"{loss_type}, rate {rate:g}", "loss_type": loss_type, "rate": rate, **found})

    def best(methods: Collection[str]) -> float:
        return max(
            GRID, key=lambda rate: sum(r["score"] for r in rows if r["loss_type"] in methods and r["rate"] == rate)
        )

    return {"binary": best(BINARY.values())} | {name: best([loss_type]) for name, loss_type in UNA.items()}, rows


def run(scale: Scale, seeds: tuple[int, ...], rates: Rates, claims: Collection[str] = tuple(CLAIMS)) -> list[dict]:
    rows = []
    for seed in seeds:
        world = start(seed, scale)
        base = {
            "sums": sums_right(world, world.model, world.sums),
            **quality(world, world.model, world.held_out, scale, seed),
        }
        rows.append({"case": f"start, seed {seed}", "claim": "start", "method": "fine-tuned", "seed": seed, **base})
        for claim in claims:
            measure, begin = CLAIMS[claim], time.process_time()
            made = measure(world, scale, seed, rates)
            spent = round(time.process_time() - begin, 1)
            for row in made:
                rows.append({"case": f"{claim}, {row['method']}, seed {seed}", "claim": claim, "seed": seed, **row})
            print(f"seed {seed}, {claim}: {len(made)} cases, {spent} s of processor", flush=True)
    return [_rounded(row) for row in rows]


def _rounded(row: dict) -> dict:
    def short(value):
        return (
            [short(v) for v in value]
            if isinstance(value, list)
            else round(value, 5)
            if isinstance(value, float)
            else value
        )

    return {name: short(value) for name, value in row.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--claims", nargs="+", choices=CLAIMS, help="measure only these, with the stored learning rates"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scale, begin = Scale(), time.perf_counter()
    if options.claims:
        (settings,) = [
            row for row in json.loads((RESULTS / "claims.json").read_text())["rows"] if row["claim"] == "settings"
        ]
        for seed in SEEDS:
            save("claims", run(scale, (seed,), settings["rates"], options.claims), keys=("case",))
        return
    rows: list[dict] = []
    rates, tuning = tune(scale)
    save("claims_tuning", [_rounded(row) for row in tuning])
    print(rates, flush=True)
    for seed in SEEDS:
        rows += run(scale, (seed,), rates)
        spent = {"processor_s": round(time.process_time()), "wall_s": round(time.perf_counter() - begin)}
        settings = {
            "case": "settings",
            "claim": "settings",
            "rates": rates,
            "scale": dataclasses.asdict(scale),
            **spent,
        }
        save("claims", [settings, *rows])


if __name__ == "__main__":
    main()
