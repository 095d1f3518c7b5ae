"""Prompts for `generate`, `judge` and online training, and their tokens by the rules that feedback follows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from .chat import ChatEncoder, Message, as_messages, as_tools, as_variables
from .rows import BadRows, as_text, refuse_media
from .sources import FeedbackError, RowError, as_record, open_source, shortened
from .tokenizer import open_ids, warn_of_control_texts

logger = logging.getLogger("bco_fast")

Prompt = str | list[Message]
TEXTS = ("prompt", "instruction", "turns", "conversation_input")
"""Where a record keeps its prompt; the first that is there counts."""
_IDS = ("question_id", "uid", "session_id")


def read_prompts(
    source: str | os.PathLike | Iterable[str | Sequence[Message] | Mapping], *, turns: bool = False
) -> list[dict]:
    """Rows with `prompt`, text or chat messages, and their further columns.

    Args:
        source: a file (JSON Lines, a JSON array, CSV, Parquet), a name on the Hub, or an iterable. A record is a string,
            chat messages, or an object with `prompt`, AlpacaEval's `instruction`, Arena-Hard's `turns` or WildBench's
            `conversation_input`. In online training
            the further columns reach the reward; the chat template reads `tools` and `chat_template_kwargs`. Prompts are all
            strings or all chats, and a chat does not end with the assistant, whose turn it is.
        turns: MT-Bench's records with several `turns` are allowed; such a row's prompt is the first, and it keeps `turns`.

    Raises:
        FeedbackError: the source cannot be read, or a prompt is missing, empty or malformed; names the row.
    """
    rows: list[dict] = []
    bad_rows = BadRows(None)
    for where, record in open_source(source).records:
        try:
            record = as_record({"prompt": record} if isinstance(record, (str, list, tuple)) else record)
            refuse_media(record)
            several = turns and isinstance(record.get("turns"), (list, tuple)) and len(record["turns"]) > 1
            asked = [prompt_of({"turns": [turn]})[1] for turn in record["turns"]] if several else []
            name, prompt = ("turns", asked[0]) if several else prompt_of(record)
            if prompt is None:
                raise RowError(f"none of the columns {', '.join(TEXTS)} (found: {shortened(record)})")
            if is_chat(prompt):
                as_tools(record.get("tools"))
                as_variables(record.get("chat_template_kwargs"))
            kept = {column: value for column, value in record.items() if column != name}
            rows.append({"prompt": prompt} | kept | ({"turns": asked} if several else {}))
            if is_chat(prompt) is not is_chat(rows[0]["prompt"]):
                raise RowError("prompts are all strings or all chat messages, not both")
        except RowError as error:
            bad_rows.add(where, error)
    bad_rows.settle(len(rows))
    return rows


def prompt_of(record: Mapping) -> tuple[str, Prompt | None]:
    """(column, prompt) of a record; (_, None) if it has none. Raises `RowError` if it is not a prompt."""
    name = next((name for name in TEXTS if name in record), "")
    prompt = record.get(name)
    if name == "turns":
        if not isinstance(prompt, (list, tuple)) or len(prompt) != 1:
            raise RowError("turns must be a list with one turn")
        prompt = prompt[0]["content"] if isinstance(prompt[0], Mapping) and "content" in prompt[0] else prompt[0]
    elif isinstance(prompt, (list, tuple)):
        prompt = list(as_messages(prompt, name))
        if name == "conversation_input":  # WildBench's messages carry more
            prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
        if prompt[-1]["role"] == "assistant":
            raise RowError(f"{name} ends with the assistant's message, which the model is to write")
        return name, prompt
    if name and not (isinstance(prompt, str) and as_text(prompt, name).strip()):
        raise RowError(f"{name} is empty, or neither text nor messages")
    return name, prompt


def id_of(record: Mapping) -> str | int | None:
    found = next((record[name] for name in _IDS if record.get(name) is not None), None)
    return found if isinstance(found, (str, int)) else None


def is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str)


def prompts_within(rows: Sequence[dict], tokenizer, limit: int) -> list[tuple[dict, list[int]]]:
    """(row, token ids) of the prompts of at most `limit` tokens; the others are left out and their number is logged.

    Raises:
        ValueError: no prompt is left; and what `prompt_ids` raises.
    """
    encoded = zip(rows, prompt_ids(rows, tokenizer), strict=True)
    kept = [(row, tokens) for row, tokens in encoded if len(tokens) <= limit]
    if not kept:
        raise ValueError(
            f"all {len(rows)} prompts have more than {limit} tokens: raise max_length or max_prompt_length, or lower "
            "max_new_tokens"
        )
    if len(kept) < len(rows):
        logger.warning(
            "left out %d of %d prompts, which have more than %d tokens", len(rows) - len(kept), len(rows), limit
        )
    return kept


def prompt_ids(rows: Sequence[Mapping], tokenizer) -> list[list[int]]:
    """Token ids of each row's prompt, as training reads the prompt of a feedback row.

    Raises:
        FeedbackError: prompts are messages and the tokenizer has no chat template, or the template refuses one.
    """
    if is_chat(rows[0]["prompt"]):
        encoder, renderings = ChatEncoder(tokenizer), []
        for number, row in enumerate(rows):
            try:
                renderings.append(
                    encoder.render(
                        row["prompt"], [], as_tools(row.get("tools")), as_variables(row.get("chat_template_kwargs"))
                    )
                )
            except RowError as error:
                raise FeedbackError(f"row {number}: {error}") from None
        encoder.warn()
        encoded = [ids for ids, _ in encoder.encode(renderings)]
    else:
        texts = [row["prompt"] for row in rows]
        warn_of_control_texts(tokenizer, texts)
        encoded = open_ids(tokenizer, texts)
    for number, ids in enumerate(encoded):
        if not ids:
            raise FeedbackError(f"row {number}: prompt {str(rows[number]['prompt'])[:60]!r} has no tokens")
    return encoded
