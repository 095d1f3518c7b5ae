"""Reading the columns of another dataset's record; what all recipes of `convert` share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from .rows import as_text, weight_of
from .sources import RowError, as_number, shortened


class LeftOut(Exception):
    """A valid row that gives no feedback; its argument is the count of `ConvertReport` that it belongs to."""


def column_of(record: Mapping, name: str) -> Any:
    if record.get(name) is None:
        found = shortened(column for column in record if record[column] is not None)
        raise RowError(f"column {name!r} is missing (found: {found})")
    return record[name]


def answer_of(value, name: str) -> str:
    if not as_text(value, name).strip():
        raise LeftOut("empty")
    return value


def number_of(record: Mapping, name: str) -> float:
    """A finite number; in CSV, and in UltraFeedback's ratings, it is text."""
    value = as_number(column_of(record, name))
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an int too large for a float
            number = float(value)
    if not math.isfinite(number):
        raise RowError(f"{name} must be a number, not {str(value)[:40]!r}")
    return number


def messages_of(value, name: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} must be messages, not {type(value).__name__ if value != [] else 'an empty list'}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"{name} must be messages with a role and a content")
        as_text(message.get("content"), f"the content of {name}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def pair_of(prompt, chosen: str, rejected: str) -> dict:
    if chosen == rejected:
        raise LeftOut("no_preference")
    return {"prompt": prompt, "chosen": answer_of(chosen, "chosen"), "rejected": answer_of(rejected, "rejected")}


def with_weight(record: Mapping, row: dict) -> dict:
    return row if record.get("weight") is None else {**row, "weight": weight_of(record)}
