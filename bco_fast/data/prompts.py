"""Prompts of a file: a JSON list or JSONL, as AlpacaEval, Arena-Hard and plain files have them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

TEXTS = ("instruction", "prompt", "turns")
"""Where a record keeps its prompt; the first that is there counts."""
IDS = ("question_id", "uid")
ANSWERS = ("completion", "output", "chosen", "rejected", "label", "score", "weight", "generator")
"""Columns that speak of an earlier completion; they are not carried over to a new one."""


class GenerationError(ValueError):
    """Prompts or options that cannot be generated from; names the file, the row and the reason."""


@dataclass(frozen=True)
class Prompt:
    text: str
    id: str | int | None = None
    columns: dict = field(default_factory=dict)
    """What else the record has."""


def read_json_records(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """(file:place, object) of a JSON list or of JSONL, whichever the file is.

    Raises:
        GenerationError: the file cannot be read, is not JSON, has no record, or a record is not an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise GenerationError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise GenerationError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    records = []
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}: record {i}", record) for i, record in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"{path}: not JSON ({error})") from None
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append((f"{path}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise GenerationError(f"{path}:{number}: not JSON ({error})") from None
    for where, record in records:
        if not isinstance(record, dict):
            raise GenerationError(f"{where}: a record must be an object, not {type(record).__name__}")
    if not records:
        raise GenerationError(f"{path}: no record")
    return records


def prompt_of(where: str, record: dict) -> str | None:
    """The prompt of a record, or None if it has none. Raises GenerationError if it is not one text."""
    name = next((name for name in TEXTS if name in record), None)
    if name is None:
        return None
    text = record[name]
    if name == "turns":
        if not isinstance(text, list) or len(text) != 1:
            raise GenerationError(f"{where}: turns must be a list with one turn")
        text = text[0]["content"] if isinstance(text[0], dict) and "content" in text[0] else text[0]
    if not isinstance(text, str) or not text.strip():
        raise GenerationError(f"{where}: {name} must be a text that is not empty")
    return text


def id_of(record: dict) -> str | int | None:
    found = next((record[name] for name in IDS if record.get(name) is not None), None)
    return found if isinstance(found, (str, int)) else None


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Prompts of a JSON list or JSONL file: `instruction`, `prompt`, or Arena-Hard's `turns`.

    Raises:
        GenerationError: as `read_json_records`, or a record without a prompt.
    """
    prompts = []
    for where, record in read_json_records(path):
        text = prompt_of(where, record)
        if text is None:
            raise GenerationError(
                f"{where}: none of the columns {', '.join(TEXTS)} (found: {', '.join(record) or 'none'})"
            )
        columns = {name: value for name, value in record.items() if name not in (*TEXTS, *ANSWERS)}
        prompts.append(Prompt(text, id_of(record), columns))
    return prompts
