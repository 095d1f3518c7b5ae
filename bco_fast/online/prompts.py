"""Prompts of online training: texts, or chat messages, and their tokens by the rules that feedback follows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from ..data.chat import ChatEncoder, Message, as_messages, as_tools
from ..data.prompts import GenerationError, read_json_records
from ..data.sources import FeedbackError, Flaw

logger = logging.getLogger("bco_fast")

Prompt = str | list[Message]


def read_prompts(source: str | os.PathLike | Iterable[str | Sequence[Message] | Mapping]) -> list[dict]:
    """Prompts of a JSONL file or a JSON list, or an iterable; each is a string, chat messages, or a dict with `prompt`.

    Further columns reach the reward; of chats, the template also reads `tools`. Prompts are all strings or all chats, and a
    chat does not end with the assistant, whose turn it is.

    Raises:
        FeedbackError: the file cannot be read, a prompt is missing, empty or malformed, or there is none; names the row.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            records = [record for _, record in read_json_records(source)]
        except GenerationError as error:
            raise FeedbackError(str(error)) from None
    else:
        records = list(source)
    rows = []
    for number, record in enumerate(records):
        row = record if isinstance(record, Mapping) else {"prompt": record}
        try:
            rows.append({**row, "prompt": _prompt(row)})
        except Flaw as flaw:
            raise FeedbackError(f"row {number}: {flaw}") from None
        if is_chat(rows[-1]["prompt"]) is not is_chat(rows[0]["prompt"]):
            raise FeedbackError(f"row {number}: prompts are all strings or all chat messages, not both")
    if not rows:
        raise FeedbackError("no prompts")
    return rows


def is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str)


def _prompt(row: Mapping) -> Prompt:
    value = row.get("prompt")
    if isinstance(value, (list, tuple)) and value:
        messages = as_messages(value, "prompt")
        if messages[-1]["role"] == "assistant":
            raise Flaw("prompt ends with the assistant's message; the policy is to write that")
        as_tools(row.get("tools"))
        return list(messages)
    if not isinstance(value, str) or not value.strip():
        raise Flaw("prompt is missing, empty, or neither a string nor messages")
    return value


def prompt_ids(rows: Sequence[Mapping], tokenizer) -> list[list[int]]:
    """Token ids of each prompt, as an offline run reads the prompt of a feedback row.

    Raises:
        FeedbackError: prompts are messages and the tokenizer has no chat template, or the template refuses one.
    """
    encoded = (_chat_ids if is_chat(rows[0]["prompt"]) else _text_ids)(rows, tokenizer)
    for number, ids in enumerate(encoded):
        if not ids:
            raise FeedbackError(f"row {number}: prompt has no tokens")
    return encoded


def _text_ids(rows: Sequence[Mapping], tokenizer) -> list[list[int]]:
    texts, eos = [row["prompt"] for row in rows], tokenizer.eos_token_id
    return [
        ids[:-1] if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token) else ids
        for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True)
    ]


def _chat_ids(rows: Sequence[Mapping], tokenizer) -> list[list[int]]:
    encoder, renderings = ChatEncoder(tokenizer), []
    for number, row in enumerate(rows):
        try:
            renderings.append(encoder.render(row["prompt"], [], as_tools(row.get("tools"))))
        except Flaw as flaw:
            raise FeedbackError(f"row {number}: {flaw}") from None
    if encoder.left_out:
        lost = ", ".join(f"{what} in {count} rows" for what, count in sorted(encoder.left_out.items()))
        logger.warning("the chat template leaves out or changes %s", lost)
    return [ids for ids, _ in encoder.encode(renderings)]
