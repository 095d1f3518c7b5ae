"""Stops a run whose loss or gradient is not finite, before it writes or deletes a checkpoint.

A step on a GPU must not wait for a number, so the device keeps the first such step and its rows. They are read with every
log line, before every save and at the end. On the CPU the head looks at the values itself and the run stops at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainingArguments

from ..head.types import NotFiniteError
from .checkpoints import MANIFEST, candidates
from .state import all_reduce

NAMED_ROWS = 8
_GRADIENT = -2  # in place of a row


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not finite; the message names the step, the rows and the last good checkpoint."""


class FiniteWatch:
    """Keeps the first optimizer step whose loss or gradient is not finite."""

    def __init__(self) -> None:
        self._found: Tensor | None = None  # [1 + NAMED_ROWS] int64: the step, 0 for none; its rows, then -1
        self._rows: Tensor | None = None  # of the last micro-batch

    def loss(self, per_example: Tensor, rows: Tensor, step: int) -> None:
        """Take in the costs of a micro-batch.

        Args:
            per_example: [B] or, of pairs, [B / 2]; of a sum of P objectives [P, ...].
            rows: [B] int64, their numbers in the dataset.
            step: of the optimizer, from 1.
        """
        finite = per_example.detach().isfinite()
        finite = finite if finite.dim() == 1 else finite.all(0)
        rows = rows[: len(finite)]
        bad = torch.where(finite, -1, rows).topk(min(NAMED_ROWS, len(rows))).values
        self._keep(bad[0] >= 0, F.pad(bad, (0, NAMED_ROWS - len(bad)), value=-1), step)

    def gradient(self, norm: Tensor | float, step: int) -> None:
        """Take in the norm of a step's gradient. A DTensor's part of this rank is enough: `check` asks all ranks."""
        if not isinstance(norm, Tensor):
            if math.isfinite(norm):
                return
            norm = torch.tensor(norm)
        norm = getattr(norm, "to_local", lambda: norm)().detach()
        mark = torch.full((NAMED_ROWS,), _GRADIENT, device=norm.device)
        self._keep(~norm.isfinite(), mark, step)

    def _keep(self, found: Tensor, rows: Tensor, step: int) -> None:
        new = torch.cat([torch.full((1,), step, device=rows.device), rows])
        old = torch.zeros_like(new) if self._found is None else self._found.to(rows.device)
        self._found = torch.where(found & (old[0] == 0), new, old)

    def check(self, args: TrainingArguments) -> None:
        """Raise on every rank if any has kept a step. Every rank must call it."""
        found = torch.zeros(1, dtype=torch.int64) if self._found is None else self._found[:1]
        if not int(all_reduce((found != 0).long().to(args.device))):
            return
        mine = [] if self._found is None or not int(self._found[0]) else [self._found.tolist()]
        step, *rows = min(gather_object(mine))
        raise diverged(args, step, rows)

    @contextlib.contextmanager
    def stops(self, args: TrainingArguments, state) -> Iterator[None]:
        """Turn what the head says of values on the CPU into the same error."""
        try:
            yield
        except NotFiniteError as error:
            rows = [] if self._rows is None else self._rows.tolist()
            raise diverged(args, state.global_step + 1, rows) from error

    def begin(self, rows: Tensor) -> None:
        self._rows = rows


def diverged(args: TrainingArguments, step: int, rows: list[int]) -> TrainingDiverged:
    named = sorted({row for row in rows if row >= 0})
    some = f"{', '.join(map(str, named[:NAMED_ROWS]))}{', ...' if len(named) >= NAMED_ROWS else ''}"
    what = "gradient" if _GRADIENT in rows else "loss"
    where = f" for rows {some} of the training set (counted from 0)" if named else ""
    good = [p for p in candidates(True, args.output_dir) if (p / MANIFEST).is_file()]
    last = f"The last good checkpoint is {good[0]}" if good else f"{Path(args.output_dir)} has no checkpoint"
    return TrainingDiverged(
        f"step {step}: the {what} is not finite{where}. Training has stopped, nothing was saved or deleted since. {last}. "
        f"Train again with a lower learning_rate (it is {args.learning_rate:g}), more warmup_steps or a lower "
        f"max_grad_norm (it is {args.max_grad_norm:g})."
    )
