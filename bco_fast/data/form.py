"""The form of the rows that a model was trained on: raw text, or chats under a template. What samples from it follows it.

run.json keeps {"form": "text", "chat" or "text and chat", "template": digest} with the counts of the training rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .prompts import is_chat

if TYPE_CHECKING:
    from .rows import FeedbackRow

logger = logging.getLogger("bco_fast")

Chat = Literal["auto", "on", "off"]
_LARGEST = 1 << 22  # bytes of a run.json, which is a stranger's file


def form_of(rows: Sequence[FeedbackRow], tokenizer) -> dict[str, str | None]:
    """Of rows, and a digest of the template if it renders any."""
    chats = sum(not isinstance(row.prompt, str) for row in rows)
    form = "chat" if chats == len(rows) else "text and chat" if chats else "text"
    return {"form": form, "template": _digest(tokenizer) if chats else None}


def _digest(tokenizer) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.blake2b(json.dumps(template).encode(), digest_size=16).hexdigest() if template else None


def trained_form(model: str | Path) -> Mapping | None:
    """What the run.json of a run's folder, or beside its checkpoints, says; None where there is none that says it."""
    folder = Path(model)
    for path in (folder / "run.json", *([folder.parent / "run.json"] if folder.name.startswith("checkpoint-") else [])):
        try:
            if path.stat().st_size > _LARGEST:
                continue
            found = json.loads(path.read_bytes())["data"]["train"]
            if found["form"] in ("text", "chat"):
                return {"form": found["form"], "template": found["template"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def follow(trained: Mapping | None, prompts: Sequence[Mapping], tokenizer, chat: Chat = "auto") -> Chat:
    """How to read prompts for a model that was trained on that form; warns once where they cannot follow it.

    Args:
        trained: of `trained_form`.
        prompts: of `read_prompts`.
        chat: as it was asked for; "on" and "off" are kept.
    """
    if trained is None:
        return chat
    chats = is_chat(prompts[0]["prompt"]) or any(len(row.get("turns") or ()) > 1 for row in prompts)
    if chat == "auto" and trained["form"] == "text" and not chats:
        if tokenizer.chat_template:
            logger.info("prompts are read as text, without the chat template, as the model was trained")
        return "off"
    rendered = chats or chat == "on" or (chat == "auto" and bool(tokenizer.chat_template))
    if rendered and trained["form"] == "text":
        logger.warning("the model was trained on text, and these prompts are rendered by the chat template")
    elif not rendered and trained["form"] == "chat":
        logger.warning("the model was trained on chats, and these prompts are read as text: give messages")
    elif rendered and trained["template"] != _digest(tokenizer):
        logger.warning("the model was trained with another chat template than renders these prompts")
    return chat
