"""Public datasets as feedback rows, by name.

    helpsteer2      nvidia/HelpSteer2: prompt, response, helpfulness, correctness, coherence, ... in 0..4; the two responses
                    of a prompt are consecutive rows; later turns of a prompt stand behind lines "<extra_id_1>Assistant"
                    and "<extra_id_1>User"                                                      -> pairs, binary, score
    ultrafeedback   openbmb/UltraFeedback: instruction, completions [{response, overall_score}]; or its binarized form
                    (HuggingFaceH4/ultrafeedback_binarized): prompt, chosen, rejected as messages, score_chosen,
                    score_rejected                                                              -> pairs, binary
    capybara        argilla/distilabel-capybara-dpo-7k-binarized: chosen, rejected as multi-turn messages -> pairs, binary
    pairs           prompt, chosen, rejected, as text or messages                               -> pairs, binary
    scores          prompt, completion, score or rating (Likert or any number)                  -> binary by threshold

Binary rows of a pair take turns, thumbs up first, so that no stretch of the file is of one class.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_text
from .sources import FeedbackError, Flaw, Source, is_hub_name, open_source, shortened

logger = logging.getLogger("bco_fast")

HELPSTEER2_WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}
"""Of the score, as the reward of HelpSteer2's models is put together; attributes are 0 to 4."""
HELPSTEER2_TOP = 4
HELPSTEER2_THRESHOLD = 4
"""Helpfulness that counts as thumbs up: 4; 3 and less are thumbs down (BCO's setting)."""
FORMATS = ("auto", "chat", "text")
_SHOWN = 5


class _LeftOut(Exception):
    """A row that is whole but of no use; its argument is the count of `ConvertReport` it belongs to."""


@dataclass
class ConvertReport:
    """Counts of records, but for `rows` and `chats`."""

    rows: int = 0
    """Written."""
    chats: int = 0
    """Written as messages."""
    read: int = 0
    no_preference: int = 0
    """Left out: both sides equal, in rating or in text."""
    empty: int = 0
    """Left out: a completion without text, as UltraFeedback has some."""
    unpaired: int = 0
    """Left out of pairs: the neighbour with the same prompt is missing."""
    multi_turn: int = 0
    """Left out by format="text"."""
    bad: int = 0
    """Left out by on_bad_row="skip"."""


def convert(
    records: Iterable[Mapping] | Source,
    recipe: str,
    to: str,
    *,
    threshold: float | None = None,
    format: str = "auto",
    on_bad_row: str = "error",
    report: ConvertReport | None = None,
) -> Iterator[dict]:
    """Feedback rows of a dataset's records, one by one.

    Args:
        records: as the dataset has them; or where they are read from, see `open_source`.
        recipe, to: see the module.
        threshold: the least score of a thumbs up; for "scores", and "helpsteer2" to binary (default 4).
        format: "chat" writes every row as messages, which training puts through the chat template; "text" writes plain
            strings and leaves conversations of several turns out; "auto" writes one turn as text and several as messages.
        on_bad_row: "error" raises at the first row of another schema, "skip" leaves it out, counts and logs it.
        report: counts are added to it.

    Raises:
        ValueError: an unknown recipe, target, format or policy; a threshold that is missing or that nothing would read.
        FeedbackError: a record of another schema; names its place.
    """
    _check(recipe, to, threshold, format, on_bad_row)
    report = ConvertReport() if report is None else report
    source = records if isinstance(records, Source) else open_source(records, RECIPES[recipe].columns)
    return _converted(source, RECIPES[recipe].targets[to](threshold, report), format, on_bad_row, report)


def _check(recipe: str, to: str, threshold: float | None, format: str, on_bad_row: str) -> None:
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    targets = RECIPES[recipe].targets
    if to not in targets:
        raise ValueError(f"{recipe} converts to {', '.join(targets)}, not {to!r}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', not {on_bad_row!r}")
    if recipe == "scores" and (threshold is None or not math.isfinite(threshold)):
        raise ValueError("scores needs a threshold: from which score on is a completion a thumbs up?")
    if threshold is not None and (recipe, to) not in (("scores", "binary"), ("helpsteer2", "binary")):
        raise ValueError(f"nothing in {recipe} to {to} is decided by a threshold")


def _converted(source: Source, make: Callable, format: str, on_bad_row: str, report: ConvertReport) -> Iterator[dict]:
    for where, record in source.records:
        report.read += 1
        try:
            if isinstance(record, Flaw):
                raise record
            if not isinstance(record, Mapping):
                raise Flaw(f"a row must be an object, not {type(record).__name__}")
            rows = [_formatted(row, format) for row in make(record)]
        except _LeftOut as reason:
            setattr(report, reason.args[0], getattr(report, reason.args[0]) + 1)
            continue
        except Flaw as flaw:
            if on_bad_row == "error":
                raise FeedbackError(f"{where}: {flaw}; on_bad_row=skip leaves such rows out") from None
            report.bad += 1
            if report.bad <= _SHOWN:
                logger.warning("skipped %s: %s", where, flaw)
            continue
        report.rows += len(rows)
        report.chats += sum(not isinstance(row["prompt"], str) for row in rows)
        yield from rows


def _formatted(row: dict, format: str) -> dict:
    """Prompt and completions as one kind: text, or messages."""
    prompt, texts = row["prompt"], ("completion", "chosen", "rejected")
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]  # one turn
    if isinstance(prompt, str):
        if format != "chat":
            return {**row, "prompt": prompt}
        prompt = [{"role": "user", "content": prompt}]
    elif format == "text":
        raise _LeftOut("multi_turn")
    sides = {name: [{"role": "assistant", "content": row[name]}] for name in texts if name in row}
    return {**row, "prompt": prompt, **sides}


# ---- columns of a record


def _column(record: Mapping, name: str) -> Any:
    if record.get(name) is None:
        found = shortened(column for column in record if record[column] is not None)
        raise Flaw(f"column {name!r} is missing (found: {found})")
    return record[name]


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise Flaw(f"{name} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Flaw(f"{name} has a lone surrogate, which is no text") from None
    return value


def _answer(value, name: str) -> str:
    if not _text(value, name).strip():
        raise _LeftOut("empty")
    return value


_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def _number(record: Mapping, name: str) -> float:
    """A finite number; CSV, and UltraFeedback's ratings, have it as text."""
    value = _column(record, name)
    number = math.nan
    if (isinstance(value, (int, float)) and not isinstance(value, bool)) or _is_numeral(value):
        with contextlib.suppress(OverflowError):  # an int that no float can hold
            number = float(value)
    if not math.isfinite(number):
        raise Flaw(f"{name} must be a number, not {str(value)[:40]!r}")
    return number


def _is_numeral(value) -> bool:
    return isinstance(value, str) and _NUMBER.fullmatch(value) is not None


def _messages(value, name: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise Flaw(f"{name} must be messages, not {type(value).__name__ if value != [] else 'an empty list'}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Flaw(f"{name} must be messages with a role and a content")
        _text(message.get("content"), f"the content of {name}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _pair(prompt, chosen: str, rejected: str) -> dict:
    if chosen == rejected:
        raise _LeftOut("no_preference")
    return {"prompt": prompt, "chosen": _answer(chosen, "chosen"), "rejected": _answer(rejected, "rejected")}


def _weighted(record: Mapping, row: dict) -> dict:
    """A weight goes along."""
    if record.get("weight") is None:
        return row
    if (weight := _number(record, "weight")) < 0:
        raise Flaw(f"weight must be >= 0, not {weight:g}")
    return {**row, "weight": weight}


# ---- HelpSteer2

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _attribute(record: Mapping, name: str) -> float:
    value = _number(record, name)
    if not 0 <= value <= HELPSTEER2_TOP:
        raise Flaw(f"{name} is {value:g}, outside 0 to {HELPSTEER2_TOP}")
    return value


def _steered(record: Mapping) -> dict:
    first, *rest = _TURN.split(_text(_column(record, "prompt"), "prompt"))
    prompt: str | list[dict] = first
    if rest:
        turns = zip(rest[::2], rest[1::2], strict=True)
        prompt = [
            {"role": "user", "content": first},
            *({"role": role.lower(), "content": content} for role, content in turns),
        ]
        if prompt[-1]["role"] != "user":
            raise Flaw("prompt ends with the assistant's turn")
    return {"prompt": prompt, "completion": _answer(_column(record, "response"), "response")}


def helpsteer2_score(record: Mapping) -> float:
    """0.65 helpfulness + 0.8 correctness + 0.45 coherence, divided by its largest value: in [0, 1]."""
    total = sum(weight * _attribute(record, name) for name, weight in HELPSTEER2_WEIGHTS.items())
    return round(total / (HELPSTEER2_TOP * sum(HELPSTEER2_WEIGHTS.values())), 6)


def _helpsteer2_binary(threshold, report):
    limit = HELPSTEER2_THRESHOLD if threshold is None else threshold
    return lambda record: [{**_steered(record), "label": _attribute(record, "helpfulness") >= limit}]


def _helpsteer2_score(threshold, report):
    return lambda record: [{**_steered(record), "score": helpsteer2_score(record)}]


def _helpsteer2_pairs(threshold, report):
    waiting: list[tuple] = []  # the first response of a prompt

    def make(record: Mapping) -> list[dict]:
        try:
            mine = (_attribute(record, "helpfulness"), _steered(record))
        except _LeftOut:
            waiting.clear()
            raise
        if not waiting or waiting[0][1]["prompt"] != mine[1]["prompt"]:
            waiting[:] = [mine]
            report.unpaired += 1
            return []
        one, other = waiting.pop(), mine
        report.unpaired -= 1
        if one[0] == other[0]:
            raise _LeftOut("no_preference")
        worst, best = sorted((one, other), key=lambda rated: rated[0])
        return [_pair(best[1]["prompt"], best[1]["completion"], worst[1]["completion"])]

    return make


# ---- pairs


def _side(record: Mapping, name: str) -> tuple[list[dict], str]:
    """(the messages before the completion, the completion). The completion's column may hold the conversation so far."""
    value, prompt = _column(record, name), record.get("prompt")
    if isinstance(value, str):
        context, text = [], value
    else:
        *context, last = _messages(value, name)
        if last["role"] != "assistant":
            raise Flaw(f"the last message of {name} is not the assistant's")
        text = last["content"]
    if isinstance(prompt, list):
        before = _messages(prompt, "prompt")
        context = context if context[: len(before)] == before else [*before, *context]
    elif not context:
        context = [{"role": "user", "content": _text(_column(record, "prompt"), "prompt")}]
    return context, text


def _two_sides(record: Mapping) -> dict:
    (prompt, chosen), (other, rejected) = _side(record, "chosen"), _side(record, "rejected")
    if prompt != other:
        raise Flaw("chosen and rejected do not answer the same messages")
    return _pair(prompt, chosen, rejected)


def _ultrafeedback(record: Mapping) -> dict:
    if "completions" not in record:
        if _number(record, "score_chosen") == _number(record, "score_rejected"):
            raise _LeftOut("no_preference")
        return _two_sides(record)
    prompt, answers = _text(_column(record, "instruction"), "instruction"), record["completions"]
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise Flaw("completions must be a list of objects")
    rated = []
    for answer in answers:
        if "overall_score" not in answer:
            raise Flaw(f"a completion has no overall_score (found: {shortened(answer)})")
        score = answer["overall_score"]
        if score is None or score != score:  # the judge gave none
            continue
        rated.append((_number(answer, "overall_score"), _text(_column(answer, "response"), "response")))
    if not rated:
        raise _LeftOut("no_preference")
    # max and min keep the first of equals
    best, worst = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
    if best[0] == worst[0]:
        raise _LeftOut("no_preference")
    return _pair(prompt, best[1], worst[1])


def _plain_pair(record: Mapping) -> dict:
    return _weighted(record, _two_sides(record))


def _pairs(make: Callable[[Mapping], dict]):
    return lambda threshold, report: lambda record: [make(record)]


def _thumbs(make: Callable[[Mapping], dict]):
    def take_turns(record: Mapping) -> list[dict]:
        pair = make(record)
        chosen, rejected = pair.pop("chosen"), pair.pop("rejected")
        return [{**pair, "completion": chosen, "label": True}, {**pair, "completion": rejected, "label": False}]

    return lambda threshold, report: take_turns


# ---- scores


def _scores_binary(threshold, report):
    def make(record: Mapping) -> list[dict]:
        prompt, completion = _side(record, "completion")
        score = _number(record, "rating" if record.get("score") is None and "rating" in record else "score")
        row = {"prompt": prompt, "completion": _answer(completion, "completion"), "label": score >= threshold}
        return [_weighted(record, row)]

    return make


@dataclass(frozen=True)
class Recipe:
    columns: frozenset[str]
    """Those it reads."""
    targets: dict[str, Callable[[float | None, ConvertReport], Callable[[Mapping], list[dict]]]]
    """target -> (threshold, report) -> record -> rows, with completions as text and a prompt of one turn or messages."""


def _recipe(columns: str, targets: dict[str, Callable]) -> Recipe:
    return Recipe(frozenset(columns.split()), targets)


RECIPES = {
    "helpsteer2": _recipe(
        "prompt response helpfulness correctness coherence",
        {"pairs": _helpsteer2_pairs, "binary": _helpsteer2_binary, "score": _helpsteer2_score},
    ),
    "ultrafeedback": _recipe(
        "instruction completions prompt chosen rejected score_chosen score_rejected",
        {"pairs": _pairs(_ultrafeedback), "binary": _thumbs(_ultrafeedback)},
    ),
    "capybara": _recipe("prompt chosen rejected", {"pairs": _pairs(_two_sides), "binary": _thumbs(_two_sides)}),
    "pairs": _recipe("prompt chosen rejected weight", {"pairs": _pairs(_plain_pair), "binary": _thumbs(_plain_pair)}),
    "scores": _recipe("prompt completion score rating weight", {"binary": _scores_binary}),
}


def convert_file(
    source: str,
    output: str | os.PathLike,
    recipe: str,
    to: str,
    *,
    threshold: float | None = None,
    split: str | None = None,
    format: str = "auto",
    on_bad_row: str = "error",
) -> ConvertReport:
    """`convert` from a file or the Hub into a JSONL file, which appears when it is whole.

    Args:
        source: a JSONL, JSON, CSV or Parquet file, or a Hub name, owner/dataset or owner/dataset:split; only a Hub name
            makes this ask the network.
        split: of the Hub dataset; default: train.

    Raises:
        ValueError: output is the source, or nothing was left to write; and what `convert` and `open_source` raise.
    """
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise ValueError(f"{output} is the input; write to another file")
    if split is not None:
        if not is_hub_name(source) or ":" in source:
            raise ValueError(f"a split is for a name on the Hub, not for {source}")
        source = f"{source}:{split}"
    _check(recipe, to, threshold, format, on_bad_row)  # before a download
    report = ConvertReport()
    records = open_source(source, RECIPES[recipe].columns)
    options = {"threshold": threshold, "format": format, "on_bad_row": on_bad_row, "report": report}
    with atomic_text(output) as file:
        for row in convert(records, recipe, to, **options):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not report.rows:
            raise FeedbackError(f"{source}: no usable row among {report.read}")
    if 0 < report.chats < report.rows:
        logger.warning(
            "%d of %d rows are messages and the others plain text, which no chat template touches; "
            "format=chat makes all of them messages", report.chats, report.rows,
        )  # fmt: skip
    return report
