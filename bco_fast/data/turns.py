"""A thumb on each turn of a chat: one record with judged assistant turns becomes one row per judged turn.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!", "label": true}, ...]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!", "rating": 4}, ...]}

A turn is judged by `label` or `feedback` (true, false, or a word of FEEDBACK) or by `score` or `rating` (a number, on the
scale of the data's scores); `weight` multiplies its cost. Turns without a judgement are context. The row of a turn holds
the conversation up to it, so splitting a chat by hand gives the same rows; `data.batch` then computes them in one pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from .sources import RowError

FEEDBACK = {"up": True, "thumbs_up": True, "positive": True, "down": False, "thumbs_down": False, "negative": False}
"""Words that `feedback` may be."""

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}  # fmt: skip
_JUDGEMENTS = {"label": "label", "feedback": "label", "score": "score", "rating": "score"}


def split_turns(record: Mapping) -> Iterator[tuple[str, Mapping]]:
    """(what to add to the place, record) of each judged turn, or the record itself where no turn is judged.

    The records of one chat have an equal `group`.

    Raises:
        RowError: a judgement is malformed, on another role than the assistant, or on the row as well.
    """
    messages, name = record.get("messages"), "messages"
    if messages is None and isinstance(record.get("conversations"), (list, tuple)):
        name, messages = "conversations", [_from_sharegpt(turn, i) for i, turn in enumerate(record["conversations"])]
        record = {key: value for key, value in record.items() if key != "conversations"} | {"messages": messages}
    if not isinstance(messages, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in messages):
        yield "", record
        return
    judged = [i for i, turn in enumerate(messages) if any(turn.get(key) is not None for key in _JUDGEMENTS)]
    if not judged:
        yield "", record
        return
    both = [key for key in ("label", "kto_tag", "score") if record.get(key) is not None]
    if both:
        raise RowError(f"{both[0]} is on the row and on its turns: keep one of them")
    group = hashlib.blake2b(
        json.dumps([messages, record.get("tools")], sort_keys=True, default=str).encode()
    ).hexdigest()
    plain = [{key: value for key, value in turn.items() if key not in (*_JUDGEMENTS, "weight")} for turn in messages]
    for i in judged:
        if messages[i].get("role") != "assistant":
            raise RowError(f"{name}[{i}] is judged, but from {messages[i].get('role')!r}, not the assistant")
        turn = {"messages": plain[: i + 1], "group": group, **_judgement(messages[i], f"{name}[{i}]")}
        yield f", turn {i}", {**record, **turn}


def _from_sharegpt(turn, index: int) -> Mapping:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise RowError(f"conversations[{index}] must have 'from' and 'value'")
    if turn["from"] not in _SHAREGPT:
        raise RowError(
            f"the speaker of conversations[{index}] must be one of {', '.join(_SHAREGPT)}, not {turn['from']!r}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT[turn["from"]], "content": turn["value"], **rest}


def _judgement(turn: Mapping, where: str) -> dict:
    """label, score and weight of a turn, under the names that a row has."""
    found: dict = {}
    for key, ours in _JUDGEMENTS.items():
        value = turn.get(key)
        if value is None:
            continue
        if ours in found:
            raise RowError(f"{where} has two of {', '.join(k for k, o in _JUDGEMENTS.items() if o == ours)}")
        if key == "feedback" and isinstance(value, str):
            if value.lower() not in FEEDBACK:
                raise RowError(
                    f"the feedback of {where} must be true, false or one of {', '.join(FEEDBACK)}, not {value[:40]!r}"
                )
            value = FEEDBACK[value.lower()]
        found[ours] = value
    if turn.get("weight") is not None:
        found["weight"] = turn["weight"]
    return found
