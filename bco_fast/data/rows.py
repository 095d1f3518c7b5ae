"""Feedback as text: one validated row per record; each bad row is named with its place and the reason.

    {"prompt": "What is 2 + 2?", "completion": "4", "label": true}             thumbs up or down
    {"prompt": "What is 2 + 2?", "completion": "4", "score": 0.9}              score in [0, 1]
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}               a pair
    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "label": true}
    {"messages": [{"role": "user", ...}, {"role": "assistant", ..., "label": true}, ...]}       a thumb on each turn, `turns`

A prompt or completion is a string or chat messages. `weight` (>= 0, default 1) multiplies the row's cost, `tools` and
the variables in `chat_template_kwargs` are passed to the chat template, `kto_tag` is the label where there is no `label`. A row with images, video or audio is refused;
other columns are ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .chat import Message, as_tools, as_variables, conversation, sides_of
from .labels import check_classes, label_column, label_of, parse_labels, short, thumb
from .repeats import warn_of_repeats
from .sources import FeedbackError, RowError, as_record, one_line, open_source, shortened
from .turns import split_turns

logger = logging.getLogger("bco_fast")

COLUMNS = (
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "label",
    "kto_tag",
    "score",
    "weight",
    "tools",
    "chat_template_kwargs",
)

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns that a row of text does not have, or has empty. Left out in silence, they would leave a prompt about nothing."""

LARGEST_WEIGHT = 3.4028234663852886e38
"""Of float32, in which losses are weighted."""

LABEL_HINT = "; labels up=VALUE,down=VALUE says what other values mean"

Needs = Literal["labels", "scores", "rewards", "pairs", "texts"]
"""What is read: label; score in [0, 1]; score of any scale; chosen and rejected; or, for `shifts`, a completion, whose label may
be missing."""


@dataclass(frozen=True, slots=True)
class FeedbackRow:
    """One validated row, still text: a prompt with one judged completion, or with a chosen and a rejected one."""

    prompt: str | tuple[Message, ...]
    """A string; of a chat, all messages before the completions."""
    completions: tuple[str, ...] | tuple[Message | tuple[Message, ...], ...]
    """One, or chosen and rejected; of a chat, each an assistant message, or several messages where a pair parts earlier."""
    label: bool
    weight: float
    where: str
    """file:line, or row number."""
    score: float = math.nan
    tools: tuple[dict, ...] | None = None
    group: str = ""
    """Equal for the judged turns of one chat, empty for other rows."""
    template_variables: dict | None = None
    """Of a chat, what its chat template reads beside messages and tools."""

    @property
    def completion(self) -> str | Message:
        return self.completions[0]

    @property
    def prompt_text(self) -> str:
        """The identity of the prompt: the string, the messages as JSON, or the chat whose turn this is."""
        return self.group or (self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True))


class BadRows:
    """Collects bad rows, then raises one error that names the first or logs what was skipped.

    Args:
        on_bad_row: "error" or "skip"; None: an error, from a reader that cannot skip.
    """

    def __init__(self, on_bad_row: str | None):
        if on_bad_row not in ("error", "skip", None):
            raise ValueError(f"on_bad_row must be 'error' or 'skip', not {on_bad_row!r}")
        self.skip = on_bad_row == "skip"
        self.hint = "; on_bad_row=skip leaves such rows out" if on_bad_row else ""
        self.count = 0
        self.first: list[str] = []
        self.labels: Counter[bool | None] = Counter()

    def add(self, where: str, reason: str | RowError, label: bool | None = None) -> None:
        self.count += 1
        self.labels[label] += 1
        if len(self.first) < 5:
            self.first.append(f"{where}: {one_line(reason)}")

    def settle(self, good: int, labels: Sequence[bool] | None = None) -> None:
        """Raise or log.

        Args:
            good: rows that can be used.
            labels: theirs, where leaving out rows must not take a class away (`check_classes`).
        """
        if self.count and not self.skip:
            more = f" (and {self.count - 1} more bad rows)" if self.count > 1 else ""
            raise FeedbackError(f"{self.first[0]}{more}{self.hint}")
        for skipped in self.first:
            logger.warning("skipped %s", skipped)
        if self.count > len(self.first):
            logger.warning("skipped %d bad rows in all", self.count)
        if not good:
            raise FeedbackError(f"no usable row{f': {self.first[0]}' if self.first else ''}")
        if self.count and labels is not None:
            check_classes(labels, self.labels, self.first[0])


def read_rows(
    source: str | os.PathLike | Iterable[Mapping],
    *,
    needs: Needs = "labels",
    on_bad_row: str = "error",
    columns: str | Mapping[str, str] | None = None,
    score_scale: str | tuple[float, float] | None = None,
    labels: str | Mapping[str, object] | None = None,
) -> list[FeedbackRow]:
    """Read and validate feedback.

    Args:
        source: a file (JSON Lines, a JSON array, CSV, Parquet), a name on the Hub (owner/dataset or
            owner/dataset:split; the default split is train), or an iterable of dicts such as a `datasets.Dataset`. See
            docs/feedback.md.
        needs: what the objective reads. "labels" takes pairs too; `unpair` turns them into thumbs.
        on_bad_row: "error" raises at the end of reading and names the first bad row; "skip" leaves bad rows out, counts
            and logs them.
        columns: the source's names of columns that differ from ours: {"completion": "response"} or
            "completion=response,label=kto_tag".
        score_scale: the scores that become 0 and 1, as (1, 5) or "1,5"; scores outside are refused. For needs="scores"
            only. Default: (0, 1).
        labels: the values of `label` that are thumbs up and down, as "up=1,down=-1" or {"up": [4, 5], "down": [1, 2],
            "ignore": [3]}; for needs="labels" only. Default: true and false.

    Raises:
        FeedbackError: the source cannot be read or has no usable row, a row is bad and on_bad_row is "error", or leaving
            out bad rows would take away a class or more than a tenth of it.
        ValueError: an option cannot be understood.
    """
    bad_rows = BadRows(on_bad_row)
    renamed = parse_columns(columns)
    scale = _scale(score_scale, needs)
    thumbs = parse_labels(labels)
    if thumbs and needs != "labels":
        raise ValueError(f"labels is for objectives that read a label, not for {needs}")
    ignored = 0
    stream = open_source(source, {*COLUMNS, *MEDIA, *renamed.values()}, renamed)
    rows: list[FeedbackRow] = []
    try:
        for where, record in stream.records:
            try:
                known = None
                record = with_our_names(as_record(record), renamed, stream.columns)
                refuse_media(record)
                for turn, part in split_turns(record):
                    name = label_column(part)
                    if thumbs and name in part:
                        part = {**part, name: thumb(part[name], thumbs)}
                    if thumbs and part.get(name, True) is None:
                        ignored += 1
                        continue
                    known = part.get(name)
                    rows.append(_row(part, where + turn, needs, scale, stream.columns))
            except RowError as error:
                bad_rows.add(where, error, known if isinstance(known, bool) else None)
    except OSError as error:
        raise FeedbackError(f"{source}: {error.strerror or error}") from None
    alone = [row.label for row in rows if len(row.completions) == 1]
    bad_rows.settle(len(rows), alone if needs == "labels" and alone else None)
    if ignored:
        logger.info("%d rows are left out, because labels ignores their value", ignored)
    warn_of_repeats(rows)
    return rows


def refuse_media(record: Mapping) -> None:
    """Raises `RowError` for a row with more than text."""
    for name in MEDIA:
        value = record.get(name)
        if value is not None and not (isinstance(value, (str, bytes, list, tuple, dict)) and not value):
            raise RowError(f"the row has {name}, and bco_fast trains on text only")


def parse_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """{our name: theirs}. Raises `ValueError`."""
    pairs = list(columns.items()) if isinstance(columns, Mapping) else []
    if isinstance(columns, str):
        parts = [part.strip() for part in columns.split(",") if part.strip()]
        if not all(re.fullmatch(r"[^=]+=[^=]+", part) for part in parts):
            raise ValueError(f"columns must read ours=theirs,ours=theirs, not {columns!r}")
        pairs = [tuple(map(str.strip, part.split("="))) for part in parts]
    for ours, _ in pairs:
        if ours not in COLUMNS:
            near = difflib.get_close_matches(ours, COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"columns: {ours!r} is none of {', '.join(COLUMNS)}{hint}")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"columns names a column twice: {columns!r}")
    return dict(pairs)


def _scale(scale: str | tuple[float, float] | None, needs: Needs) -> tuple[float, float]:
    if scale is None:
        return (-math.inf, math.inf) if needs == "rewards" else (0.0, 1.0)
    if needs != "scores":
        raise ValueError(f"score_scale is for objectives that read a score in [0, 1], not for {needs}")
    try:
        low, high = map(float, scale.split(",") if isinstance(scale, str) else scale)
    except (TypeError, ValueError):
        raise ValueError(f"score_scale must be two numbers as in 1,5, not {scale!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"score_scale must rise, as 1,5 does, not {scale!r}")
    return low, high


def with_our_names(record: Mapping, renamed: Mapping[str, str], found: Sequence[str] | None) -> Mapping:
    """A record with its columns renamed. Raises `RowError`."""
    for ours, theirs in renamed.items():
        if theirs not in record:
            raise RowError(f"column {theirs!r}, given as {ours}, is missing (found: {shortened(found or record)})")
    theirs = set(renamed.values())
    rest = {name: value for name, value in record.items() if name not in theirs} if renamed else record
    return {**rest, **{ours: record[name] for ours, name in renamed.items()}}


def _implicit_prompt(record: Mapping) -> Mapping:
    """A pair of texts without a prompt: it is the words with which both begin.

    Raises:
        RowError: there are none.
    """
    sides = [_text(record[name], name) for name in ("chosen", "rejected")]
    differ = (i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b)
    shared = next(differ, min(map(len, sides)))
    if any(not text[shared : shared + 1].isspace() for text in sides):  # amid a word, or one text is all of it
        shared = max((i for i, letter in enumerate(sides[0][:shared]) if letter.isspace()), default=0)
    prompt = sides[0][:shared].rstrip()
    if not prompt:
        raise RowError(f"column 'prompt' is missing, and the two texts do not begin alike (found: {shortened(record)})")
    return {**record, "prompt": prompt, "chosen": sides[0][len(prompt) :], "rejected": sides[1][len(prompt) :]}


def _row(record: Mapping, where: str, needs: Needs, scale: tuple[float, float], found: Sequence[str] | None):
    # A table may hold pairs and single completions, with null where a column does not apply.
    either = record.get("chosen") is not None or record.get("rejected") is not None
    pair = needs == "pairs" or (needs in ("labels", "texts") and either)
    scored = needs in ("scores", "rewards")
    names = ("chosen", "rejected") if pair else ("completion",)
    if not pair and isinstance(record.get("messages"), (list, tuple)) and record.get("completion") is None:
        names = ("messages",)
    chat = any(isinstance(record.get(name), (list, tuple)) for name in ("prompt", *names))
    if pair and not chat and record.get("prompt") is None and all(isinstance(record.get(name), str) for name in names):
        record = _implicit_prompt(record)
    unlabelled = needs == "texts" and record.get(label_column(record)) is None
    required = [*names, *([] if pair or unlabelled else ["score" if scored else label_column(record)])]
    if not chat or record.get("prompt") is not None:
        required.insert(0, "prompt")
    for name in required:
        if name not in record:
            hint = f"; columns {name}=NAME says which one it is"
            raise RowError(f"column {name!r} is missing (found: {shortened(found or record)}){hint}")
    prompt, completions = (_chat if chat else _strings)(record, names)
    if pair and completions[0] == completions[1]:
        raise RowError("chosen and rejected are the same")
    score = _score(record["score"], needs, scale) if scored else math.nan
    label = True if pair or unlabelled else score > 0.5 if scored else label_of(record, LABEL_HINT)
    tools = as_tools(record.get("tools")) if chat else None
    variables = as_variables(record.get("chat_template_kwargs")) if chat else None
    weight, group = weight_of(record), record.get("group", "")
    return FeedbackRow(prompt, completions, label, weight, where, score, tools, group, variables)


def _score(score, needs: Needs, scale: tuple[float, float]) -> float:
    low, high = scale
    if not _is_number(score) or not low <= score <= high:
        bounds = f" in [{low:g}, {high:g}]" if needs == "scores" else ""
        raise RowError(f"score must be a number{bounds}, not {short(score)}{_decimal_comma(score)}")
    return float(score) if needs == "rewards" else (score - low) / (high - low)


def as_text(value, name: str, expected: str = "a string") -> str:
    """A string that a tokenizer can read. Raises `RowError`."""
    if not isinstance(value, str):
        raise RowError(f"{name} must be {expected}, not {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"{name} has a lone surrogate, which is not text") from None
    return value


def _text(value, name: str) -> str:
    if not as_text(value, name, "a string or a list of messages").strip() and name != "prompt":
        raise RowError(f"{name} is empty")
    return value


def _strings(record: Mapping, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    return _text(record["prompt"], "prompt"), tuple([_text(record[name], name) for name in names])


def _chat(record: Mapping, names: Sequence[str]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    prompt = None if names == ("messages",) else record.get("prompt")
    for name, value in (("prompt", prompt), *((name, record[name]) for name in names)):
        if not isinstance(value, (list, tuple)) and not (name == "prompt" and value is None):
            _text(value, name)
    return sides_of([conversation(prompt, record[name], name) for name in names])


def weight_of(record: Mapping) -> float:
    """`weight`, 1 where there is none. Raises `RowError`."""
    weight = record.get("weight", 1.0)
    if not _is_number(weight) or weight < 0:
        raise RowError(f"weight must be a number >= 0, not {short(weight)}{_decimal_comma(weight)}")
    if weight > LARGEST_WEIGHT:
        raise RowError(f"weight {short(weight)} is infinite in float32")
    return float(weight)


def _decimal_comma(value) -> str:
    return "; write a decimal point" if isinstance(value, str) and re.fullmatch(r"[+-]?\d+,\d+", value.strip()) else ""


def _is_number(value) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def unpair(rows: Iterable[FeedbackRow], pairing_ratio: float = 1.0) -> list[FeedbackRow]:
    """Pairs as alternating thumbs up and thumbs down; other rows unchanged.

    Args:
        pairing_ratio: share of the pairs that keep both sides; of the others one side, drawn at random, is left out
            (arXiv 2410.04834, Table 6). The draw depends on the pair's text only.

    Raises:
        ValueError: pairing_ratio is out of range, or below 1 where no row is a pair.
    """
    if not 0 <= pairing_ratio <= 1:
        raise ValueError(f"pairing_ratio must be in [0, 1], not {pairing_ratio}")
    rows = list(rows)
    if pairing_ratio < 1 and not any(len(row.completions) == 2 for row in rows):
        raise ValueError(
            f"pairing_ratio {pairing_ratio:g} leaves out sides of pairs, and the data has none (chosen, rejected)"
        )
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
    """(training, held-out) rows. A hash of the prompt decides, so rows of a prompt stay together in any order."""
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, not {fraction}")
    parts: tuple[list, list] = ([], [])
    for row in rows:
        digest = hashlib.blake2b(row.prompt_text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
        parts[int.from_bytes(digest, "little") < fraction * 2**64].append(row)
    if not parts[0] or not parts[1]:
        raise FeedbackError(
            f"holding out {fraction} of {len(rows)} rows by prompt leaves one side empty; give a file of held-out rows"
        )
    return parts
