"""Tokenized feedback: one example, what the reference says about it, and a dataset of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from .keys import row_key


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt and one completion as tokens."""

    input_ids: np.ndarray  # [T] int32, prompt then completion
    completion_start: int
    label: bool
    weight: float
    score: float = math.nan
    group: str = ""
    """Equal for the judged turns of one chat, empty for other rows."""

    @property
    def completion_mask(self) -> np.ndarray:  # [T] bool
        return np.arange(len(self.input_ids)) >= self.completion_start

    @cached_property
    def key(self) -> bytes:
        """The row's key in the reference cache."""
        return row_key(self.input_ids, self.completion_mask)

    @cached_property
    def prompt_key(self) -> bytes:
        """Equal for examples whose prompts are the same tokens, after truncation."""
        return self.input_ids[: self.completion_start].tobytes()

    @property
    def together(self) -> bytes | str:
        """Equal for examples that should share a batch: turns of a chat, completions of a prompt."""
        return self.group or self.prompt_key

    def __len__(self) -> int:
        return len(self.input_ids)


class Item(NamedTuple):
    """One example with what the reference says about it; what `collate` takes."""

    example: Example
    ref_logps: float = math.nan
    ref_token_logps: np.ndarray | None = None  # [completion tokens] float32
    mismatched: Item | None = None
    """The same prompt with another prompt's completion, for KTO's z_ref."""
    index: int = -1
    """Number of the row or pair in the dataset, from 0; -1: unknown."""


@dataclass
class FeedbackDataset(torch.utils.data.Dataset):
    """Tokenized feedback. The reference's part is filled in from its cache before training."""

    examples: list[Example]
    """In a paired dataset chosen and rejected alternate, and an item is the two of them."""
    ref_logps: np.ndarray | None = None  # [examples] float64
    report: dict[str, int] = field(default_factory=dict)
    """rows, skipped, prompts_cut, completions_cut; rows_read, if only some of them were taken."""
    paired: bool = False
    ref_token_logps: list[np.ndarray] | None = None
    mismatched: FeedbackDataset | None = None
    """As many examples again, each prompt with another prompt's completion."""
    form: dict[str, str | None] = field(default_factory=dict)
    """Of the rows (`data.form`); empty if it is unknown."""
    source: str = ""
    """Name of the file, without its folder, or on the Hub; empty if it is unknown."""

    @property
    def has_reference(self) -> bool:
        """Whether the reference log-probability of every row is known."""
        return self.ref_logps is not None and not np.isnan(self.ref_logps).any()

    def __len__(self) -> int:
        return len(self.examples) // 2 if self.paired else len(self.examples)

    @property
    def sides(self) -> list[list[Example]]:
        """The examples of each item: one, or the two sides of a pair."""
        count = 1 + self.paired
        return [self.examples[i : i + count] for i in range(0, len(self.examples), count)]

    def __getitem__(self, index: int) -> Item | tuple[Item, Item]:
        if self.paired:
            return self.item(2 * index), self.item(2 * index + 1)
        return self.item(index)

    def item(self, index: int) -> Item:
        return Item(
            self.examples[index],
            math.nan if self.ref_logps is None else float(self.ref_logps[index]),
            None if self.ref_token_logps is None else self.ref_token_logps[index],
            None if self.mismatched is None else self.mismatched.item(index),
            index // (1 + self.paired),
        )
