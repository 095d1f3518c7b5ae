"""Feedback as text: one validated row per record, with a named complaint about each bad one.

    {"prompt": "What is 2 + 2?", "completion": "4", "label": true}             thumbs up or down
    {"prompt": "What is 2 + 2?", "completion": "4", "score": 0.9}              score in [0, 1]
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}               a pair
    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "label": true}

A prompt or completion is a string or chat messages. `weight` (>= 0, default 1) multiplies a row's cost, `tools` goes to
the chat template, `kto_tag` counts as label where there is none, further columns are allowed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .chat import Message, as_tools, conversation
from .sources import FeedbackError, Flaw, open_source, shortened

logger = logging.getLogger("bco_fast")

COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "label", "kto_tag", "score", "weight", "tools")
_SHOWN = 5

Needs = Literal["labels", "scores", "rewards", "pairs"]
"""What an objective reads: label; score in [0, 1]; score of any scale; chosen and rejected."""


@dataclass(frozen=True, slots=True)
class FeedbackRow:
    """One validated row, still text: a prompt with one judged completion, or with a chosen and a rejected one."""

    prompt: str | tuple[Message, ...]
    """A string; of a chat, all messages but the last."""
    completions: tuple[str, ...] | tuple[Message, ...]
    """One, or chosen and rejected; of a chat, each an assistant message."""
    label: bool
    weight: float
    where: str
    """file:line, or row number."""
    score: float = math.nan
    tools: tuple[dict, ...] | None = None

    @property
    def completion(self) -> str | Message:
        return self.completions[0]

    @property
    def prompt_text(self) -> str:
        """What tells prompts apart: the string, or the messages as JSON."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True)


class Complaints:
    """Counts bad rows; at the end one error that names the first, or a warning that counts what was skipped."""

    def __init__(self, on_bad_row: str):
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row must be 'error' or 'skip', not {on_bad_row!r}")
        self.skip = on_bad_row == "skip"
        self.count = 0
        self.first: list[str] = []

    def add(self, where: str, reason: str | Flaw) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {' '.join(str(reason).split())}")

    def settle(self, good: int) -> None:
        if self.count and not self.skip:
            more = f" (and {self.count - 1} more bad rows)" if self.count > 1 else ""
            raise FeedbackError(f"{self.first[0]}{more}; on_bad_row=skip leaves such rows out")
        for complaint in self.first:
            logger.warning("skipped %s", complaint)
        if self.count > len(self.first):
            logger.warning("skipped %d bad rows in all", self.count)
        if not good:
            raise FeedbackError(f"no usable row{f': {self.first[0]}' if self.first else ''}")


def read_rows(
    source: str | os.PathLike | Iterable[Mapping],
    *,
    needs: Needs = "labels",
    on_bad_row: str = "error",
    columns: str | Mapping[str, str] | None = None,
    score_scale: str | tuple[float, float] | None = None,
) -> list[FeedbackRow]:
    """Read and validate feedback.

    Args:
        source: a file (JSON Lines, a JSON array, CSV, Parquet), a name on the Hub (owner/dataset or
            owner/dataset:split, the split being train by default), or an iterable of dicts (a `datasets.Dataset` is
            one). See docs/feedback.md.
        needs: what the objective reads. "labels" takes pairs too; `unpair` makes thumbs of them.
        on_bad_row: "error" raises at the end of reading and names the first bad row; "skip" leaves bad rows out,
            counts and logs them.
        columns: what columns are called in the source where it is not our name: {"completion": "response"} or
            "completion=response,label=kto_tag".
        score_scale: what counts as 0 and as 1 in the score column, as (1, 5) or "1,5"; scores beyond are refused. For
            needs="scores" only. Default: (0, 1).

    Raises:
        FeedbackError: the source cannot be read or has no usable row, or a row is bad and on_bad_row is "error".
        ValueError: an option cannot be understood.
    """
    complaints = Complaints(on_bad_row)
    renamed = _columns(columns)
    reader = _Reader(needs, _scale(score_scale, needs))
    stream = open_source(source, {*COLUMNS, *renamed.values()})
    rows: list[FeedbackRow] = []
    try:
        for where, record in stream.records:
            try:
                if isinstance(record, Flaw):
                    raise record
                if not isinstance(record, Mapping):
                    raise Flaw(f"a row must be an object, not {type(record).__name__}")
                named = _renamed(record, renamed, stream.columns)
                rows.append(reader.row(named if stream.typed else _typed(named), where, stream.columns))
            except Flaw as flaw:
                complaints.add(where, flaw)
    except OSError as error:
        raise FeedbackError(f"{source}: {error.strerror or error}") from None
    complaints.settle(len(rows))
    return rows


# ---- options


def _columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """{our name: theirs}."""
    if not columns:
        return {}
    if isinstance(columns, str):
        parts = [part.strip() for part in columns.split(",") if part.strip()]
        if not all(re.fullmatch(r"[^=]+=[^=]+", part) for part in parts):
            raise ValueError(f"columns must read ours=theirs,ours=theirs, not {columns!r}")
        pairs = [tuple(map(str.strip, part.split("="))) for part in parts]
    else:
        pairs = list(columns.items())
    for ours, _ in pairs:
        if ours not in COLUMNS:
            near = difflib.get_close_matches(ours, COLUMNS, n=1)
            raise ValueError(
                f"columns: {ours!r} is none of {', '.join(COLUMNS)}{f'; did you mean {near[0]!r}?' if near else ''}"
            )
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"columns names a column twice: {columns!r}")
    return dict(pairs)


def _scale(scale: str | tuple[float, float] | None, needs: Needs) -> tuple[float, float]:
    if scale is None:
        return 0.0, 1.0
    if needs != "scores":
        raise ValueError(f"score_scale is for objectives that read a score in [0, 1], not for {needs}")
    try:
        low, high = map(float, scale.split(",") if isinstance(scale, str) else scale)
    except (TypeError, ValueError):
        raise ValueError(f"score_scale must be two numbers as in 1,5, not {scale!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"score_scale must rise, as 1,5 does, not {scale!r}")
    return low, high


def _renamed(record: Mapping, renamed: Mapping[str, str], found: Sequence[str] | None) -> Mapping:
    if not renamed:
        return record
    for ours, theirs in renamed.items():
        if theirs not in record:
            raise Flaw(f"column {theirs!r}, which is to be {ours}, is missing (found: {shortened(found or record)})")
    theirs = set(renamed.values())
    rest = {name: value for name, value in record.items() if name not in theirs}
    return rest | {ours: record[name] for ours, name in renamed.items()}


_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _typed(record: Mapping[str, str]) -> dict:
    """A row of CSV, where label and numbers are text; what is neither stays text, which is then refused."""
    record = dict(record)
    if not record.get("chosen") and not record.get("rejected"):  # a single completion in a table that also has pairs
        record.pop("chosen", None)
        record.pop("rejected", None)
    for name in ("label", "kto_tag"):
        if name in record:
            record[name] = _TRUTH.get(record[name].lower(), record[name])
    for name in ("score", "weight"):
        if name in record and _NUMBER.fullmatch(record[name]):
            record[name] = float(record[name])
    return record


# ---- one record


@dataclass(frozen=True)
class _Reader:
    needs: Needs
    scale: tuple[float, float]

    def row(self, record: Mapping, where: str, found: Sequence[str] | None = None) -> FeedbackRow:
        """
        Raises:
            Flaw: the record cannot be trained on.
        """
        pair = self.needs == "pairs" or (self.needs == "labels" and _is_pair(record))
        scored = self.needs in ("scores", "rewards")
        names = _text_columns(record, pair)
        chat = any(isinstance(record.get(name), (list, tuple)) for name in ("prompt", *names))
        required = [*names] if pair else [*names, "score" if scored else _label_column(record)]
        if not chat or record.get("prompt") is not None:
            required.insert(0, "prompt")
        for name in required:
            if name not in record:
                raise Flaw(f"column {name!r} is missing (found: {shortened(found or record)})")
        prompt, completions = (_chat if chat else _strings)(record, names)
        if pair and completions[0] == completions[1]:
            raise Flaw("chosen and rejected are the same")
        score = self._score(record["score"]) if scored else math.nan
        label = True if pair else score > 0.5 if scored else _label(record)
        weight = record.get("weight", 1.0)
        if not _is_number(weight) or weight < 0:
            raise Flaw(f"weight must be a number >= 0, not {_short(weight)}")
        tools = as_tools(record.get("tools")) if chat else None
        return FeedbackRow(prompt, completions, label, float(weight), where, score, tools)

    def _score(self, score) -> float:
        low, high = self.scale
        if self.needs == "rewards":
            low, high = -math.inf, math.inf
        if not _is_number(score) or not low <= score <= high:
            bounds = f" in [{low:g}, {high:g}]" if self.needs == "scores" else ""
            raise Flaw(f"score must be a number{bounds}, not {_short(score)}")
        return float(score) if self.needs == "rewards" else (score - low) / (high - low)


def _is_pair(record: Mapping) -> bool:
    """A table may hold pairs and single completions, with null where a column does not apply."""
    return record.get("chosen") is not None or record.get("rejected") is not None


def _text_columns(record: Mapping, pair: bool) -> tuple[str, ...]:
    if pair:
        return "chosen", "rejected"
    whole = isinstance(record.get("messages"), (list, tuple)) and record.get("completion") is None
    return ("messages",) if whole else ("completion",)


def _checked(value, name: str) -> str:
    if not isinstance(value, str):
        raise Flaw(f"{name} must be a string or a list of messages, not {type(value).__name__}")
    if name != "prompt" and not value.strip():
        raise Flaw(f"{name} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Flaw(f"{name} has a lone surrogate, which is no text") from None
    return value


def _strings(record: Mapping, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    return _checked(record["prompt"], "prompt"), tuple([_checked(record[name], name) for name in names])


def _chat(record: Mapping, names: Sequence[str]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    prompt = None if names == ("messages",) else record.get("prompt")
    for name, value in (("prompt", prompt), *((name, record[name]) for name in names)):
        if value is not None and not isinstance(value, (list, tuple)):
            _checked(value, name)
    sides = [conversation(prompt, record[name], name) for name in names]
    if any(context != sides[0][0] for context, _ in sides):
        raise Flaw("chosen and rejected differ before their last message")
    return sides[0][0], tuple([last for _, last in sides])


def _label_column(record: Mapping) -> str:
    return "kto_tag" if "kto_tag" in record and "label" not in record else "label"


def _label(record: Mapping) -> bool:
    name = _label_column(record)
    label, tag = record[name], record.get("kto_tag", record[name])
    if not isinstance(label, bool):
        raise Flaw(f"{name} must be true or false, not {_short(label)}")
    if isinstance(tag, bool) and tag is not label:
        raise Flaw(f"label is {_short(label)} and kto_tag is {_short(tag)}")
    return label


def _is_number(value) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _short(value) -> str:
    if isinstance(value, int) and abs(value) >> 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- rows


def unpair(rows: Iterable[FeedbackRow], pairing_ratio: float = 1.0) -> list[FeedbackRow]:
    """Pairs as thumbs up and thumbs down, taking turns; other rows as they are.

    Args:
        pairing_ratio: share of the pairs that keep both sides; of the others one side, drawn at random, is left out
            (arXiv 2410.04834, Table 6). The draw hangs on the pair's text only.
    """
    if not 0 <= pairing_ratio <= 1:
        raise ValueError(f"pairing_ratio must be in [0, 1], not {pairing_ratio}")
    return [side for row in rows for side in (_sides(row, pairing_ratio) if len(row.completions) == 2 else [row])]


def _sides(pair: FeedbackRow, pairing_ratio: float) -> list[FeedbackRow]:
    sides = [
        replace(pair, completions=(side,), label=up) for side, up in zip(pair.completions, (True, False), strict=True)
    ]
    text = json.dumps([pair.prompt, *pair.completions]).encode()
    draw = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"bco_fast.pairing").digest(), "little")
    return sides if (draw >> 1) < pairing_ratio * 2**63 else [sides[draw & 1]]


def split_by_prompt(
    rows: Sequence[FeedbackRow], fraction: float, seed: int = 0
) -> tuple[list[FeedbackRow], list[FeedbackRow]]:
    """(training, held-out) rows. All rows of a prompt fall on one side, by a hash of its text: no leak, any order."""
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, not {fraction}")

    def held_out(row: FeedbackRow) -> bool:
        digest = hashlib.blake2b(row.prompt_text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
        return int.from_bytes(digest, "little") < fraction * 2**64

    parts: tuple[list, list] = ([], [])
    for row in rows:
        parts[held_out(row)].append(row)
    if not parts[0] or not parts[1]:
        raise FeedbackError(
            f"holding out {fraction} of {len(rows)} rows by prompt leaves one side empty; give a file of held-out rows"
        )
    return parts
