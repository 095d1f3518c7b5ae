"""Feedback as tokens. The file formats are in `rows` and docs/feedback.md.

    strings   tok(prompt) + tok(completion, no special tokens) + EOS
    chats     the tokenizer's chat template, see `chat`

The keys of the reference cache depend on these ids. A completion loses what exceeds `max_completion_length`. A row longer than
`max_length` then loses the beginning of its prompt, down to `max_prompt_length` tokens, then the end of its completion (and
with it the EOS). All of it is counted and logged.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from .batch import hosts
from .chat import ChatEncoder, Rendering
from .dataset import Example, FeedbackDataset
from .form import form_of
from .rows import BadRows, FeedbackRow, Needs, read_rows, unpair
from .sources import RowError, name_of
from .tokenizer import open_ids, special_tokens

logger = logging.getLogger("bco_fast")

BLOCK_ROWS = 1024
"""Rows given to the tokenizer at once: enough to keep its threads busy, few enough that their lists stay small."""
LOAD_OPTIONS = (
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "on_bad_row",
    "columns",
    "score_scale",
    "labels",
)
"""Of `load_feedback`, by the names that configs give them."""
_PROGRESS_ROWS = 10_000


class _Encoder:
    """Rows to token ids, block by block."""

    def __init__(self, tokenizer, bad_rows: BadRows):
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            raise ValueError("the tokenizer has no EOS token, so a completion could not end")
        self.tokenizer, self.bad_rows = tokenizer, bad_rows
        self.control = set(special_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
        self.control_texts = 0
        """Completions of string rows that hold a special token as text."""
        self._chat: ChatEncoder | None = None

    def encode(self, rows: Sequence[FeedbackRow]) -> Iterator[tuple[FeedbackRow, list[int], list[list[int]]]]:
        """(row, prompt, completions), in the order of the rows, without the bad ones."""
        renderings = [None if isinstance(row.prompt, str) else self._render(row) for row in rows]
        strings = self._strings([row for row in rows if isinstance(row.prompt, str)])
        good = [r for r in renderings if isinstance(r, Rendering)]
        chats = self._chat.encode(good) if self._chat else iter(())
        for row, rendering in zip(rows, renderings, strict=True):
            if isinstance(rendering, RowError):
                self.bad_rows.add(row.where, rendering, row.label)
                continue
            prompt, sides = next(strings if rendering is None else chats)
            if prompt and all(sides):
                yield row, prompt, sides
            else:
                self.bad_rows.add(row.where, f"{'completion' if prompt else 'prompt'} has no tokens", row.label)

    def _render(self, row: FeedbackRow) -> Rendering | RowError:
        self._chat = self._chat or ChatEncoder(self.tokenizer)
        try:
            return self._chat.render(row.prompt, row.completions, row.tools, row.template_variables)
        except RowError as error:
            return error

    def _strings(self, rows: Sequence[FeedbackRow]) -> Iterator[tuple[list[int], list[list[int]]]]:
        if not rows:
            return
        prompts = list(dict.fromkeys(row.prompt for row in rows))  # rows of one prompt are often adjacent
        prompt_ids = dict(zip(prompts, open_ids(self.tokenizer, prompts), strict=True))
        texts = [text for row in rows for text in row.completions]
        options = {"add_special_tokens": False, "return_attention_mask": False}
        completions = iter(self.tokenizer(texts, **options)["input_ids"])
        for row in rows:
            sides = [next(completions) for _ in row.completions]
            self.control_texts += not all(map(self.control.isdisjoint, sides))
            yield prompt_ids[row.prompt], [[*side, self.eos] if side else side for side in sides]

    def warn(self) -> None:
        """Log what is worth knowing but no reason to refuse a row."""
        if self.control_texts:
            logger.warning(
                "%d completions contain special tokens as text, and the tokenizer reads them as special tokens; in chat "
                "messages they would stay text",
                self.control_texts,
            )
        if self._chat:
            self._chat.warn()


def tokenize_rows(
    rows: Sequence[FeedbackRow],
    tokenizer,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    on_bad_row: str = "error",
    progress: bool = True,
) -> FeedbackDataset:
    """Rows to tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS token; for chats with a chat template.
        max_length: tokens of prompt and completion together, >= 2.
        max_prompt_length: tokens that a prompt keeps, from its end, in a row that is too long; None for half of
            max_length.
        max_completion_length: tokens that a completion keeps, from its beginning, in any row; None for no limit but
            max_length.
        on_bad_row: as in `read_rows`.
        progress: show a bar if there are many rows.

    Raises:
        FeedbackError: a prompt or completion has no token, the chat template refuses a row, or truncation leaves no
            completion.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, not {max_length}")
    keep_prompt = prompt_limit(max_length, max_prompt_length)
    if keep_prompt < 1:
        raise ValueError(f"max_prompt_length must be at least 1, not {keep_prompt}")
    if max_completion_length is not None and max_completion_length < 1:
        raise ValueError(f"max_completion_length must be at least 1, not {max_completion_length}")
    paired = len(rows) > 0 and len(rows[0].completions) == 2
    if any((len(row.completions) == 2) is not paired for row in rows):
        raise ValueError("rows are pairs or single completions, not both: unpair(rows) makes them one kind")
    bad_rows = BadRows(on_bad_row)
    encoder = _Encoder(tokenizer, bad_rows)
    examples: list[Example] = []
    prompts_cut = completions_cut = 0
    for block in _blocks(rows, progress):
        for row, prompt, sides in encoder.encode(block):
            whole = len(prompt), sum(map(len, sides))
            prompt, sides = fit(prompt, [side[:max_completion_length] for side in sides], max_length, keep_prompt)
            if not all(sides):
                bad_rows.add(row.where, f"no completion left after truncation to {max_length} tokens", row.label)
                continue
            prompts_cut += len(prompt) < whole[0]
            completions_cut += sum(map(len, sides)) < whole[1]
            for side, label in zip(sides, (row.label, False), strict=False):
                ids = np.array([*prompt, *side], dtype=np.int32)
                examples.append(Example(ids, len(prompt), label, row.weight, row.score, row.group))
    thumbs = None if paired or any(not math.isnan(row.score) for row in rows) else [e.label for e in examples]
    bad_rows.settle(len(examples), thumbs)
    _log_turns(examples)
    report = {
        "rows": len(examples) // (1 + paired),
        "skipped": bad_rows.count,
        "prompts_cut": prompts_cut,
        "completions_cut": completions_cut,
    }
    if prompts_cut or completions_cut:
        logger.warning(
            "max_length=%d%s cut %d prompts and %d completions of %d rows",
            max_length, "" if max_completion_length is None else f" and max_completion_length={max_completion_length}",
            prompts_cut, completions_cut, report["rows"],
        )  # fmt: skip
    encoder.warn()
    return FeedbackDataset(examples, report=report, paired=paired, form=form_of(rows, tokenizer))


def _log_turns(examples: Sequence[Example]) -> None:
    """Say how many judged turns are computed together with a later one of their chat."""
    chats: dict[str, list[Example]] = {}
    for example in examples:
        if example.group:
            chats.setdefault(example.group, []).append(example)
    if not chats:
        return
    turns = sum(map(len, chats.values()))
    alone = sum(len(set(hosts(chat))) for chat in chats.values()) - len(chats)
    logger.info("%d judged turns of %d chats, %d of them computed by themselves", turns, len(chats), alone)
    if alone:
        logger.info("(the template renders earlier turns differently, or max_length has cut them)")


def _blocks(rows: Sequence[FeedbackRow], progress: bool) -> Iterator[Sequence[FeedbackRow]]:
    from tqdm.auto import tqdm  # comes with transformers, as the tokenizer does

    with tqdm(total=len(rows), desc="tokenize", unit="row", disable=not progress or len(rows) < _PROGRESS_ROWS) as bar:
        for first in range(0, len(rows), BLOCK_ROWS):
            block = rows[first : first + BLOCK_ROWS]
            yield block
            bar.update(len(block))


def prompt_limit(max_length: int, max_prompt_length: int | None) -> int:
    """Tokens that a prompt keeps in a row that is too long."""
    return max_length // 2 if max_prompt_length is None else max_prompt_length


def fit(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], max_length: int, keep_prompt: int
) -> tuple[Sequence[int], list[Sequence[int]]]:
    """Truncate: the start of the prompt down to `keep_prompt` tokens, then the end of what is still too long.

    The two sides of a pair keep one prompt.
    """
    longest = max(map(len, completions))
    if len(prompt) + longest > max_length:
        prompt = prompt[-max(keep_prompt, max_length - longest) :]
    return prompt, [completion[: max(0, max_length - len(prompt))] for completion in completions]


def load_feedback(
    source: str | os.PathLike | Iterable[Mapping],
    tokenizer,
    *,
    needs: Needs = "labels",
    pairing_ratio: float = 1.0,
    columns: str | Mapping[str, str] | None = None,
    score_scale: str | tuple[float, float] | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    on_bad_row: str = "error",
    progress: bool = True,
    labels: str | Mapping[str, object] | None = None,
) -> FeedbackDataset:
    """`read_rows`, `unpair` unless the objective needs pairs, then `tokenize_rows`."""
    reading = {"columns": columns, "score_scale": score_scale, "labels": labels}
    rows = read_rows(source, needs=needs, on_bad_row=on_bad_row, **reading)
    if needs != "pairs":
        rows = unpair(rows, pairing_ratio)
    made = tokenize_rows(
        rows,
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        on_bad_row=on_bad_row,
        progress=progress,
    )
    made.source = name_of(source)
    return made
