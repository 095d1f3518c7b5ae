"""Rounds of online training on disk: feedback files that also hold what resuming needs."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.prompts import Prompt
from ..files import atomic_text


@dataclass(frozen=True)
class Sampled:
    """One completion of a round, before (reward NaN) or after it was judged."""

    prompt: Prompt
    columns: dict
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: str
    reward: float = math.nan


def write_round(path: Path, rows: Sequence[Sampled], threshold: float) -> None:
    """Write a round as JSONL.

    Args:
        threshold: reward above which a completion counts as thumbs up.
    """
    with atomic_text(path) as file:
        for row in rows:
            record = {**row.columns, "prompt": row.prompt, "completion": row.completion}
            if not math.isnan(row.reward):
                record |= {"label": row.reward > threshold, "reward": row.reward}
            record |= {
                "prompt_ids": row.prompt_ids,
                "completion_ids": row.completion_ids,
                "columns": sorted(row.columns),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_round(path: Path) -> list[Sampled]:
    """Read what `write_round` wrote."""
    rows = []
    # not splitlines: a completion may hold U+2028, which JSON leaves as it is
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        record = json.loads(line)
        columns = {name: record[name] for name in record["columns"]}
        ids = (record["prompt_ids"], record["completion_ids"])
        rows.append(Sampled(record["prompt"], columns, *ids, record["completion"], record.get("reward", math.nan)))
    return rows


@functools.lru_cache(maxsize=4)
def shuffled(seed: str, count: int) -> list[int]:
    """An order of `count` rows. Callers ask once a row, so the last few orders are kept."""
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311 - an order of rows, not a secret
    return order
