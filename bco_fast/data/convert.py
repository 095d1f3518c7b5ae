"""Public datasets as feedback rows, by name.

    helpsteer2      nvidia/HelpSteer2: prompt, response, helpfulness, correctness, coherence, ... in 0..4; the two responses
                    of a prompt are consecutive rows; later turns of a prompt follow lines "<extra_id_1>Assistant" and
                    "<extra_id_1>User"                                         -> pairs, chosen, binary, score, prompts
    ultrafeedback   openbmb/UltraFeedback: instruction, completions [{response, overall_score}]; or its binarized form
                    (HuggingFaceH4/ultrafeedback_binarized): prompt, chosen, rejected as messages, score_chosen,
                    score_rejected                                                      -> pairs, chosen, binary
    capybara        argilla/distilabel-capybara-dpo-7k-binarized: chosen, rejected as multi-turn messages, likewise
    pairs           prompt, chosen, rejected, as text or messages                                             likewise
    scores          prompt, completion, score or rating (Likert or any number)                  -> binary by threshold

"chosen" is the thumbs up of each pair, the data of fine-tuning; "prompts" has each prompt once. The two binary rows of a pair are adjacent, thumbs up first, so no stretch of the file holds only one class.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..files import atomic_text
from .records import LeftOut, answer_of, column_of, messages_of, number_of, pair_of, with_weight
from .rows import BadRows, as_text
from .sources import FeedbackError, RowError, as_record, is_hub_name, open_source, shortened

logger = logging.getLogger("bco_fast")

HELPSTEER2_WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}
"""The weighted sum that HelpSteer2's reward models use; attributes are 0 to 4."""
HELPSTEER2_TOP = 4
HELPSTEER2_THRESHOLD = 4
"""Helpfulness that counts as thumbs up: 4; 3 and less are thumbs down (BCO's setting)."""
FORMATS = ("auto", "chat", "text")
RANKINGS = ("helpfulness", "score")
TIES = ("drop", "keep")


@dataclass
class ConvertReport:
    """Counts of records, except `rows` and `chats`, which count what was written."""

    rows: int = 0
    chats: int = 0
    """Rows written as messages."""
    read: int = 0
    no_preference: int = 0
    """Left out: both sides equal, in rating or in text; of HelpSteer2 counted once a prompt."""
    empty: int = 0
    """Left out: a completion without text; UltraFeedback has some."""
    unpaired: int = 0
    """Left out: the neighbour with the same prompt is missing."""
    multi_turn: int = 0
    """Left out by format="text"."""
    bad: int = 0
    """Left out by on_bad_row="skip"."""


def convert(
    source: str | os.PathLike | Iterable[Mapping],
    recipe: str,
    to: str,
    *,
    threshold: float | None = None,
    rank_by: str | None = None,
    ties: str | None = None,
    format: str = "auto",
    on_bad_row: str = "error",
    report: ConvertReport | None = None,
) -> Iterator[dict]:
    """Feedback rows of a dataset's records, one by one.

    Args:
        source: the records, or a file or Hub name to read them from, see `open_source`.
        recipe, to: see the module.
        threshold: the lowest score of a thumbs up; for "scores", and for "helpsteer2" to binary (default 4).
        rank_by: what decides between the two responses of a prompt, for "helpsteer2" to pairs: "helpfulness" (default;
            arXiv 2404.04656, section 5.3) or "score", the weighted sum of three attributes (arXiv 2408.15339, section 4).
        ties: for "helpsteer2" to binary: "drop" (default) keeps the prompts of which pairs are made, those with two
            responses of different helpfulness (arXiv 2404.04656, section 5.3); "keep" writes every response.
        format: "chat" writes every row as messages, which training renders with the chat template; "text" writes plain
            strings and leaves out conversations of several turns; "auto" writes one turn as text and several as messages.
        on_bad_row: "error" raises at the first row of another schema; "skip" leaves it out, counts and logs it.
        report: counts are added to it.

    Raises:
        ValueError: an unknown recipe, target, format or policy; a threshold that is missing or has no effect.
        FeedbackError: a record of another schema; names its place.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    columns, targets = RECIPES[recipe]
    if to not in targets:
        raise ValueError(f"{recipe} converts to {', '.join(targets)}, not {to!r}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if recipe == "scores" and (threshold is None or not math.isfinite(threshold)):
        raise ValueError("scores needs a threshold: the lowest score that counts as a thumbs up")
    for name, value, known, where in (
        ("rank_by", rank_by, RANKINGS, ("helpsteer2", "pairs", "chosen")), ("ties", ties, TIES, ("helpsteer2", "binary")),
    ):  # fmt: skip
        if value is not None and value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, not {value!r}")
        if value is not None and not (recipe == where[0] and to in where[1:]):
            raise ValueError(f"{name} has no effect on {recipe} to {to}")
    if threshold is not None and (recipe, to) not in (("scores", "binary"), ("helpsteer2", "binary")):
        raise ValueError(f"a threshold has no effect on {recipe} to {to}")
    bad_rows = BadRows(on_bad_row)
    run = _Run(threshold, rank_by or "helpfulness", ties or "drop", ConvertReport() if report is None else report)
    return _converted(open_source(source, columns.split()).records, targets[to], run, format, bad_rows)


@dataclass
class _Run:
    threshold: float | None
    rank_by: str
    ties: str
    report: ConvertReport
    waiting: list[tuple[float, dict]] = field(default_factory=list)
    """HelpSteer2: the first response of a prompt and its rating, until the second follows."""


def _converted(records: Iterable, target: Callable, run: _Run, format: str, bad_rows: BadRows) -> Iterator[dict]:
    report = run.report
    for where, record in records:
        report.read += 1
        try:
            rows = [_formatted(row, format) for row in target(as_record(record), run)]
        except LeftOut as reason:
            setattr(report, reason.args[0], getattr(report, reason.args[0]) + 1)
            continue
        except RowError as error:
            report.bad += 1
            bad_rows.add(where, error)
            if not bad_rows.skip:
                bad_rows.settle(0)
            continue
        report.rows += len(rows)
        report.chats += sum(not isinstance(row["prompt"], str) for row in rows)
        yield from rows
    bad_rows.settle(1)


def _formatted(row: dict, format: str) -> dict:
    """Prompt and completions as one kind: text, or messages."""
    prompt = row["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    if isinstance(prompt, str):
        if format != "chat":
            return {**row, "prompt": prompt}
        prompt = [{"role": "user", "content": prompt}]
    elif format == "text":
        raise LeftOut("multi_turn")
    texts = [name for name in ("completion", "chosen", "rejected") if name in row]
    return {**row, "prompt": prompt, **{name: [{"role": "assistant", "content": row[name]}] for name in texts}}


_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _attribute(record: Mapping, name: str) -> float:
    value = number_of(record, name)
    if not 0 <= value <= HELPSTEER2_TOP:
        raise RowError(f"{name} is {value:g}, outside 0 to {HELPSTEER2_TOP}")
    return value


def _helpsteer2(record: Mapping) -> dict:
    first, *rest = _TURN.split(as_text(column_of(record, "prompt"), "prompt"))
    prompt: str | list[dict] = first
    if rest:
        turns = zip(["user", *map(str.lower, rest[::2])], [first, *rest[1::2]], strict=True)
        prompt = [{"role": role, "content": content} for role, content in turns]
        if prompt[-1]["role"] != "user":
            raise RowError("prompt ends with the assistant's turn")
    return {"prompt": prompt, "completion": answer_of(column_of(record, "response"), "response")}


def helpsteer2_score(record: Mapping) -> float:
    """0.65 helpfulness + 0.8 correctness + 0.45 coherence, divided by its largest value: in [0, 1]."""
    total = sum(weight * _attribute(record, name) for name, weight in HELPSTEER2_WEIGHTS.items())
    return round(total / (HELPSTEER2_TOP * sum(HELPSTEER2_WEIGHTS.values())), 6)


def _helpsteer2_binary(record: Mapping, run: _Run) -> list[dict]:
    limit = HELPSTEER2_THRESHOLD if run.threshold is None else run.threshold
    rated = [(_attribute(record, "helpfulness"), _helpsteer2(record))] if run.ties == "keep" else _both(record, run)
    return [{**row, "label": rating >= limit} for rating, row in rated]


def _helpsteer2_scored(record: Mapping, run: _Run) -> list[dict]:
    return [{**_helpsteer2(record), "score": helpsteer2_score(record)}]


def _both(record: Mapping, run: _Run) -> list[tuple[float, dict]]:
    """(rating, row) of both responses of a prompt, once the second has come; they differ in rating and text."""
    waiting = run.waiting
    try:
        row = _helpsteer2(record)
        rated = (helpsteer2_score(record) if run.rank_by == "score" else _attribute(record, "helpfulness"), row)
    except LeftOut:
        waiting.clear()
        raise
    if not waiting or waiting[0][1]["prompt"] != rated[1]["prompt"]:
        waiting[:] = [rated]
        run.report.unpaired += 1
        return []
    run.report.unpaired -= 1
    first = waiting.pop()
    if first[0] == rated[0] or first[1] == rated[1]:
        raise LeftOut("no_preference")
    return [first, rated]


def _helpsteer2_pair(record: Mapping, run: _Run) -> dict | None:
    rated = _both(record, run)
    if not rated:
        return None
    (_, worst), (_, best) = sorted(rated, key=lambda r: r[0])
    return pair_of(best["prompt"], best["completion"], worst["completion"])


def _helpsteer2_prompts(record: Mapping, run: _Run) -> list[dict]:
    row = {"prompt": _helpsteer2(record)["prompt"]}
    new = not run.waiting or run.waiting[0][1] != row
    run.waiting[:] = [(0.0, row)]
    return [row] if new else []


def _side(record: Mapping, name: str) -> tuple[list[dict], str]:
    """(the messages before the completion, the completion). The completion's column may hold the whole conversation."""
    value, prompt = column_of(record, name), record.get("prompt")
    if isinstance(value, str):
        context, text = [], value
    else:
        *context, last = messages_of(value, name)
        if last["role"] != "assistant":
            raise RowError(f"the last message of {name} is not the assistant's")
        text = last["content"]
    if isinstance(prompt, list):
        before = messages_of(prompt, "prompt")
        context = context if context[: len(before)] == before else [*before, *context]
    elif not context:
        context = [{"role": "user", "content": as_text(column_of(record, "prompt"), "prompt")}]
    return context, text


def _two_sides(record: Mapping, run: _Run) -> dict:
    (prompt, chosen), (other, rejected) = _side(record, "chosen"), _side(record, "rejected")
    if prompt != other:
        raise RowError("chosen and rejected do not answer the same messages")
    return pair_of(prompt, chosen, rejected)


def _weighted_sides(record: Mapping, run: _Run) -> dict:
    return with_weight(record, _two_sides(record, run))


def _ultrafeedback(record: Mapping, run: _Run) -> dict:
    if "completions" not in record:
        if number_of(record, "score_chosen") == number_of(record, "score_rejected"):
            raise LeftOut("no_preference")
        return _two_sides(record, run)
    prompt, answers = as_text(column_of(record, "instruction"), "instruction"), record["completions"]
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise RowError("completions must be a list of objects")
    rated = []
    for answer in answers:
        if "overall_score" not in answer:
            raise RowError(f"a completion has no overall_score (found: {shortened(answer)})")
        score = answer["overall_score"]
        if score is not None and score == score:  # null and NaN: the judge gave no score
            rated.append((number_of(answer, "overall_score"), as_text(column_of(answer, "response"), "response")))
    # max and min keep the first of equals
    best, worst = (choose(rated, key=lambda r: r[0], default=(0.0, "")) for choose in (max, min))
    if best[0] == worst[0]:
        raise LeftOut("no_preference")
    return pair_of(prompt, best[1], worst[1])


def _paired(make: Callable[[Mapping, _Run], dict | None]) -> dict[str, Callable]:
    """The targets of a recipe whose records are pairs, or become one."""

    def pairs(record: Mapping, run: _Run) -> list[dict]:
        pair = make(record, run)
        return [] if pair is None else [pair]

    def binary(record: Mapping, run: _Run) -> list[dict]:
        return [
            {**{name: value for name, value in pair.items() if name not in ("chosen", "rejected")}, "completion": pair[side], "label": up}
            for pair in pairs(record, run)
            for side, up in (("chosen", True), ("rejected", False))
        ]  # fmt: skip

    return {"pairs": pairs, "binary": binary, "chosen": lambda record, run: binary(record, run)[:1]}


def _scores_binary(record: Mapping, run: _Run) -> list[dict]:
    prompt, completion = _side(record, "completion")
    score = number_of(record, "rating" if record.get("score") is None and "rating" in record else "score")
    row = {"prompt": prompt, "completion": answer_of(completion, "completion"), "label": score >= run.threshold}
    return [with_weight(record, row)]


RECIPES: dict[str, tuple[str, dict[str, Callable[[Mapping, _Run], list[dict]]]]] = {
    "helpsteer2": (
        "prompt response helpfulness correctness coherence",
        {
            **_paired(_helpsteer2_pair),
            "binary": _helpsteer2_binary,
            "score": _helpsteer2_scored,
            "prompts": _helpsteer2_prompts,
        },
    ),
    "ultrafeedback": (
        "instruction completions prompt chosen rejected score_chosen score_rejected",
        _paired(_ultrafeedback),
    ),
    "capybara": ("prompt chosen rejected", _paired(_two_sides)),
    "pairs": ("prompt chosen rejected weight", _paired(_weighted_sides)),
    "scores": ("prompt completion score rating weight", {"binary": _scores_binary}),
}
"""recipe -> (columns it reads, target -> function of a record to rows, whose completions are text)."""


def convert_file(
    source: str, output: str | os.PathLike, recipe: str, to: str, *, split: str | None = None, **options
) -> ConvertReport:
    """`convert` from a file or the Hub into a JSONL file, which appears only when it is complete.

    Args:
        source: a JSONL, JSON, CSV or Parquet file, or a Hub name, owner/dataset or owner/dataset:split; only a Hub name
            uses the network.
        split: of the Hub dataset; default: train.
        options: threshold, rank_by, ties, format and on_bad_row of `convert`.

    Raises:
        ValueError: output is the source, or there is nothing to write; and what `convert` and `open_source` raise.
    """
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise ValueError(f"{output} is the input; write to another file")
    if split is not None:
        if not is_hub_name(source) or ":" in source:
            raise ValueError(f"a split is for a name on the Hub, not for {source}")
        source = f"{source}:{split}"
    report = ConvertReport()
    rows = convert(source, recipe, to, report=report, **options)
    with atomic_text(output) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not report.rows:
            raise FeedbackError(f"{source}: no usable row among {report.read}")
    if 0 < report.chats < report.rows:
        logger.warning(
            "%d of %d rows are messages and the others plain text, which no chat template touches; format=chat makes all "
            "of them messages",
            report.chats,
            report.rows,
        )
    return report
