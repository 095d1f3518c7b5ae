"""Rows that say the same again, and texts that were judged both ways."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .rows import FeedbackRow

logger = logging.getLogger("bco_fast")


class Repeats(NamedTuple):
    again: list[str]
    """Places of rows that repeat an earlier one."""
    both: list[str]
    """Places at which a text has got thumbs up and thumbs down for the first time."""


def find_repeats(rows: Sequence[FeedbackRow]) -> Repeats:
    """Compares prompt, completions and score."""
    seen: dict[int, int] = {}  # hash of the text (and score) -> 1 for thumbs up, 2 for thumbs down, 3 for both
    found = Repeats([], [])
    for row in rows:
        sides = (side if isinstance(side, str) else json.dumps(side, sort_keys=True) for side in row.completions)
        text = hash((row.prompt_text, *sides, None if math.isnan(row.score) else row.score))
        thumb = 1 if row.label or len(row.completions) == 2 else 2
        before = seen.get(text, 0)
        seen[text] = before | thumb
        if before & thumb:
            found.again.append(row.where)
        elif before:
            found.both.append(row.where)
    return found


def warn_of_repeats(rows: Sequence[FeedbackRow]) -> None:
    """Log how many there are."""
    again, both = map(len, find_repeats(rows))
    if again or both:
        logger.warning("%d rows repeat an earlier one, and %d texts have both thumbs up and thumbs down", again, both)
