"""Thumbs as product logs write them, by a stated mapping; and files that would lose a class.

    up=1,down=-1        up=👍,down=👎        up=4|5,down=1|2,ignore=3

No value is guessed: in one log 1 is the best rating, in another the worst.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from .sources import FeedbackError, RowError, as_number

logger = logging.getLogger("bco_fast")

_THUMBS = {"up": True, "down": False, "ignore": None}
_LOST_SHARE, _LOST_ROWS = 0.1, 5
"""Leaving out more than this share of a class, and at least so many rows, changes what is learned."""

FEW = 20

Labels = Mapping[str, bool | None]
"""Value, as `_word` writes it -> thumbs up, thumbs down, or None for a row to leave out."""


def parse_labels(given: str | Mapping[str, object] | None) -> Labels | None:
    """The mapping of `up=1,down=-1`, or of {"up": [1], "down": [-1]}.

    Raises:
        ValueError: it cannot be read, lacks up or down, or gives one value two meanings.
    """
    if given is None:
        return None
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",")]
        named = [(name.strip(), value.split("|")) for name, _, value in parts]
    else:
        named = [(name, value if isinstance(value, (list, tuple)) else [value]) for name, value in given.items()]
    names = [name for name, _ in named]
    words = [(_word(value), _THUMBS.get(name)) for name, values in named for value in values]
    if not {"up", "down"} <= set(names) <= _THUMBS.keys() or not all(word for word, _ in words):
        raise ValueError(f"labels must read up=VALUE|VALUE,down=VALUE,ignore=VALUE, not {given!r}")
    if len(dict(words)) < len(words) or len(set(names)) < len(names):
        raise ValueError(f"labels gives a value or a thumb twice: {given!r}")
    return dict(words)


def thumb(value, labels: Labels) -> bool | None:
    """Of one value. Raises `RowError` if the mapping does not have it."""
    words = [_word(value), *({True: ["1"], False: ["0"]}[value] if isinstance(value, bool) else [])]  # CSV's 1 is true
    found = next((word for word in words if word in labels), None)
    if found is None:
        raise RowError(f"label {str(value)[:40]!r} is none of those in labels: {', '.join(labels)}")
    return labels[found]


def _word(value) -> str:
    """Numbers alike however they are written (1, 1.0, "1"), and words in any case."""
    value = as_number(value.strip()) if isinstance(value, str) else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    return str(value).strip().casefold()


def label_column(record: Mapping) -> str:
    return "kto_tag" if "kto_tag" in record and "label" not in record else "label"


def label_of(record: Mapping, hint: str = "") -> bool:
    """Thumbs up or down, from `label` or `kto_tag`. Raises `RowError`, which ends with the hint."""
    name = label_column(record)
    label, tag = record.get(name), record.get("kto_tag", record.get(name))
    if not isinstance(label, bool):
        raise RowError(f"{name} must be true or false, not {short(label)}{hint}")
    if isinstance(tag, bool) and tag is not label:
        raise RowError(f"label is {short(label)} and kto_tag is {short(tag)}")
    return label


def short(value) -> str:
    if isinstance(value, int) and abs(value) >> 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_classes(kept: Sequence[bool], lost: Mapping[bool | None, int], first: str) -> None:
    """Refuse to leave out so many rows that a class is missing or much smaller.

    Args:
        kept: the labels of the rows that stay.
        lost: how many rows of each label are left out; None where the label itself is bad, which may be either.
        first: the place and reason of the first of them.

    Raises:
        FeedbackError: says how many rows of which class.
    """
    stay, gone = Counter(kept), Counter(lost)
    out = {up: gone[up] + gone[None] for up in (True, False)}
    names = {True: "up", False: "down"}
    for up, name in names.items():
        if not stay[up] and (gone[up] or out[up] >= _LOST_ROWS):
            raise FeedbackError(
                f"no thumbs {name} would be left with on_bad_row=skip: {gone.total()} rows are bad, the first {first}"
            )
    for up, name in names.items():
        if out[up] >= _LOST_ROWS and out[up] > _LOST_SHARE * (stay[up] + out[up]):
            raise FeedbackError(
                f"up to {out[up]} of {stay[up] + out[up]} thumbs {name} would be left out with on_bad_row=skip, more than a tenth: "
                f"mend the rows, or take them out of the file. The first: {first}"
            )


def log_classes(name: str, labels: Sequence[bool]) -> None:
    """Say how many rows of each class there are, and warn where they are few."""
    counts = Counter(labels)
    logger.info("%s: %d thumbs up, %d thumbs down", name, counts[True], counts[False])
    if 0 < min(counts[True], counts[False]) < FEW:
        logger.warning("%s: with fewer than %d of a class, accuracies and AUC say little", name, FEW)
