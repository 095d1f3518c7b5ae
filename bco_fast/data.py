"""Feedback files to tokens to batches, with a named complaint about each bad row.

    {"prompt": "What is 2 + 2?", "completion": "4", "label": true}        one JSON object a line; weight is optional

Tokens are tok(prompt) + tok(completion, no special tokens) + EOS. A row longer than `max_length` first loses the
beginning of its prompt down to `max_prompt_length` tokens, then the end of its completion (and with it the EOS); both
are counted and reported, never silent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .cache import row_key

logger = logging.getLogger("bco_fast")

IGNORE = -100


class FeedbackError(ValueError):
    """Feedback that cannot be trained on; names the file, the row and the reason."""


@dataclass(frozen=True)
class FeedbackRow:
    """One validated row, still text."""

    prompt: str
    completion: str
    label: bool
    weight: float
    where: str
    """file:line, or row number."""


@dataclass(frozen=True, eq=False)
class Example:
    """One row as tokens."""

    input_ids: np.ndarray  # [T] int64, prompt then completion
    completion_start: int
    label: bool
    weight: float

    @property
    def completion_mask(self) -> np.ndarray:  # [T] bool
        return np.arange(len(self.input_ids)) >= self.completion_start

    @cached_property
    def key(self) -> bytes:
        """The row's key in the reference cache."""
        return row_key(self.input_ids, self.completion_mask)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class FeedbackDataset(torch.utils.data.Dataset):
    """Tokenized feedback; `ref_logps` [rows] is filled from the reference cache before training."""

    examples: list[Example]
    ref_logps: np.ndarray | None = None
    report: dict[str, int] = field(default_factory=dict)
    """rows, skipped, prompts_cut, completions_cut."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Example, float]:
        return self.examples[index], math.nan if self.ref_logps is None else float(self.ref_logps[index])


class _Complaints:
    """Collects bad rows; at the end one error that names the first, or a warning that counts what was skipped."""

    def __init__(self, on_bad_row: str):
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row must be 'error' or 'skip', not {on_bad_row!r}")
        self.skip = on_bad_row == "skip"
        self.bad: list[str] = []

    def add(self, where: str, reason: str) -> None:
        self.bad.append(f"{where}: {reason}")

    def settle(self, good: int) -> None:
        if self.bad and not self.skip:
            more = f" (and {len(self.bad) - 1} more bad rows)" if len(self.bad) > 1 else ""
            raise FeedbackError(f"{self.bad[0]}{more}; on_bad_row=skip leaves such rows out")
        for complaint in self.bad[:5]:
            logger.warning("skipped %s", complaint)
        if len(self.bad) > 5:
            logger.warning("skipped %d bad rows in all", len(self.bad))
        if not good:
            raise FeedbackError(f"no usable row{'' if not self.bad else f': {self.bad[0]}'}")


def read_rows(source: str | os.PathLike | Iterable[Mapping], *, on_bad_row: str = "error") -> list[FeedbackRow]:
    """Read and validate unpaired feedback.

    Args:
        source: a JSONL file, or an iterable of dicts (a `datasets.Dataset` is one).
        on_bad_row: "error" raises at the end of reading and names the first bad row; "skip" leaves bad rows out,
            counts and logs them.

    Raises:
        FeedbackError: the file cannot be read or has no usable row, or a row is bad and on_bad_row is "error".
    """
    complaints = _Complaints(on_bad_row)
    rows = []
    for where, record in _records(source, complaints):
        reason = _flaw(record)
        if reason:
            complaints.add(where, reason)
        else:
            weight = float(record.get("weight", 1.0))
            rows.append(FeedbackRow(record["prompt"], record["completion"], record["label"], weight, where))
    complaints.settle(len(rows))
    return rows


def _records(source, complaints: _Complaints):
    if not isinstance(source, (str, os.PathLike)):
        yield from ((f"row {index}", record) for index, record in enumerate(source))
        return
    path = Path(source)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    complaints.add(f"{path}:{number}", f"not JSON ({error})")
    except OSError as error:
        raise FeedbackError(f"{path}: {error.strerror or error}") from None


def _flaw(record) -> str | None:
    """Why a record cannot be trained on, or None."""
    if not isinstance(record, Mapping):
        return f"a row must be an object, not {type(record).__name__}"
    for name in ("prompt", "completion", "label"):
        if name not in record:
            return f"column {name!r} is missing (found: {', '.join(map(str, record)) or 'none'})"
    for name in ("prompt", "completion"):
        if not isinstance(record[name], str):
            return f"{name} must be a string, not {type(record[name]).__name__}"
    if not record["completion"].strip():
        return "completion is empty"
    if not isinstance(record["label"], bool):
        return f"label must be true or false, not {record['label']!r}"
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        return f"weight must be a number >= 0, not {weight!r}"
    return None


def split_by_prompt(
    rows: Sequence[FeedbackRow], fraction: float, seed: int = 0
) -> tuple[list[FeedbackRow], list[FeedbackRow]]:
    """(training, held-out) rows. All rows of a prompt fall on one side, by a hash of its text: no leak, any order."""
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, not {fraction}")

    def held_out(row: FeedbackRow) -> bool:
        digest = hashlib.blake2b(row.prompt.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
        return int.from_bytes(digest, "little") < fraction * 2**64

    parts: tuple[list, list] = ([], [])
    for row in rows:
        parts[held_out(row)].append(row)
    if not parts[0] or not parts[1]:
        raise FeedbackError(
            f"holding out {fraction} of {len(rows)} rows by prompt leaves one side empty; give a file of held-out rows"
        )
    return parts


def tokenize_rows(
    rows: Sequence[FeedbackRow],
    tokenizer,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    on_bad_row: str = "error",
) -> FeedbackDataset:
    """Rows to tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS token.
        max_length: tokens of prompt and completion together, >= 2.
        max_prompt_length: what a prompt keeps, from its end, in a row that is too long; None for half of max_length.
        on_bad_row: as in `read_rows`.

    Raises:
        FeedbackError: a prompt or completion has no token, or truncation leaves no completion.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so a completion could not end")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, not {max_length}")
    keep_prompt = max_length // 2 if max_prompt_length is None else max_prompt_length
    if keep_prompt < 1:
        raise ValueError(f"max_prompt_length must be at least 1, not {keep_prompt}")
    prompts = tokenizer([row.prompt for row in rows])["input_ids"]
    completions = tokenizer([row.completion for row in rows], add_special_tokens=False)["input_ids"]
    complaints = _Complaints(on_bad_row)
    examples: list[Example] = []
    prompts_cut = completions_cut = 0
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        if prompt and prompt[-1] == eos and not row.prompt.endswith(tokenizer.eos_token):
            prompt = prompt[:-1]  # some tokenizers close every text
        if not prompt or not completion:
            complaints.add(row.where, f"{'completion' if prompt else 'prompt'} has no tokens")
            continue
        tokens = [*completion, eos]
        cut_prompt = cut_completion = False
        if len(prompt) + len(tokens) > max_length:
            room = max(keep_prompt, max_length - len(tokens))
            cut_prompt = len(prompt) > room
            prompt = prompt[-room:]
            cut_completion = len(prompt) + len(tokens) > max_length
            tokens = tokens[: max_length - len(prompt)]
        if not tokens:
            complaints.add(row.where, f"no completion left after truncation to {max_length} tokens")
            continue
        prompts_cut += cut_prompt
        completions_cut += cut_completion
        ids = np.array([*prompt, *tokens], dtype=np.int64)
        examples.append(Example(ids, len(prompt), row.label, row.weight))
    complaints.settle(len(examples))
    report = {
        "rows": len(examples),
        "skipped": len(complaints.bad),
        "prompts_cut": prompts_cut,
        "completions_cut": completions_cut,
    }
    if prompts_cut or completions_cut:
        logger.warning(
            "max_length=%d cut %d prompts and %d completions of %d rows",
            max_length, prompts_cut, completions_cut, len(examples),
        )  # fmt: skip
    return FeedbackDataset(examples, report=report)


def load_feedback(
    source: str | os.PathLike | Iterable[Mapping],
    tokenizer,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    on_bad_row: str = "error",
) -> FeedbackDataset:
    """`read_rows`, then `tokenize_rows`."""
    rows = read_rows(source, on_bad_row=on_bad_row)
    return tokenize_rows(
        rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, on_bad_row=on_bad_row
    )


def collate(items: Sequence[tuple[Example, float]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """A right-padded batch.

    Returns:
        input_ids, attention_mask [B, T]; targets [B, T], the token that each position predicts, -100 for prompt and
        padding; label [B] bool; weight, ref_logps [B] float32.
    """
    examples = [example for example, _ in items]
    width = max(map(len, examples))
    input_ids = np.full((len(items), width), pad_token_id, dtype=np.int64)
    attention = np.zeros((len(items), width), dtype=np.int64)
    targets = np.full((len(items), width), IGNORE, dtype=np.int64)
    for i, example in enumerate(examples):
        length, start = len(example), example.completion_start
        input_ids[i, :length] = example.input_ids
        attention[i, :length] = 1
        targets[i, start - 1 : length - 1] = example.input_ids[start:]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention),
        "targets": torch.from_numpy(targets),
        "label": torch.tensor([example.label for example in examples]),
        "weight": torch.tensor([example.weight for example in examples], dtype=torch.float32),
        "ref_logps": torch.tensor([ref for _, ref in items], dtype=torch.float32),
    }
