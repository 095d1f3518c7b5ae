"""What training accumulates between log lines and keeps across a resume: the reward shift and the log window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..head.types import HeadStats
from ..losses.metrics import FIELDS, unpaired_metrics
from ..losses.reward_shift import RewardShift
from ..reference.ranks import all_reduce, number_of_ranks, own_rank

_DEVICE = ("loss", "kl", *FIELDS)
"""Sums that are added up on the device; nothing waits for them before a log line."""
_HOST = ("steps", "rho", "certified", "sparse")
"""Numbers that the host knows anyway."""


class FeedbackState(TrainerCallback, ExportableState):
    """δ and the sums of the current log window: moved by training, saved with every checkpoint, restored on resume.

    The Trainer writes the state of its callbacks into trainer_state.json but does not read it back. It also forgets the
    losses of the window that a checkpoint falls into, so the window's loss is kept here as well.
    """

    restores_itself = True

    def __init__(self, shift: RewardShift, part_weights: Mapping[str, float] | None = None):
        """part_weights: of the objectives of a sum, whose losses are logged one by one."""
        self.shift = shift
        self.part_weights = part_weights or {}
        self.head = HeadStats()
        self.batches: dict[str, int] = {}
        """How a step is cut, for a resume on another number of ranks."""
        self._clear()

    def _clear(self) -> None:
        self._sums: Tensor | None = None  # [_DEVICE] float64
        self._numbers = dict.fromkeys(_HOST, 0.0)

    def add(self, costs: Tensor, sums: Tensor | None, z_ref: Tensor | None = None, *, begins_step: bool = True) -> None:
        """Take in one micro-batch.

        Args:
            costs: [B], or [P, B] of a sum of P: their sum is its part of the step's loss.
            sums: its `unpaired_sums`; None for a placeholder.
            z_ref: of KTO, with the first micro-batch of a step.

        Steps and their z_ref are the same on all ranks, so the first rank alone counts them.
        """
        first, loss = own_rank() == 0, costs.sum()
        kl = z_ref if first and z_ref is not None else loss * 0
        sums = loss.new_zeros(len(FIELDS), dtype=torch.float64) if sums is None else sums
        parts = costs.double().sum(1) if self.part_weights else sums[:0]
        row = torch.cat([torch.stack([loss.double(), kl.double()]), sums, parts])
        self._sums = row if self._sums is None else self._sums + row
        self._add_backward()
        self._numbers["steps"] += begins_step and first

    def _add_backward(self) -> None:
        """Take in, once, what the last backward of a sparse head reported."""
        if self.head.kept_fraction is not None:
            self._numbers["rho"] += self.head.kept_fraction
            self._numbers["certified"] += self.head.error_bound
            self._numbers["sparse"] += 1
            self.head.clear()

    def _over_ranks(self, device: torch.device) -> Tensor:  # [_DEVICE + parts + _HOST] float64
        """The window's sums over all ranks; the next window starts empty."""
        self._add_backward()
        length = len(_DEVICE) + len(self.part_weights)
        sums = torch.zeros(length, dtype=torch.float64) if self._sums is None else self._sums
        numbers = torch.tensor(list(self._numbers.values()), dtype=torch.float64)
        self._clear()
        return all_reduce(torch.cat([sums.to(device), numbers.to(device)]))

    def take(self, device: torch.device) -> dict[str, float]:
        """The metrics of the window over all ranks; the next window starts empty.

        Every rank must call it: one without a micro-batch since the last call adds zeros.
        """
        found = self._over_ranks(device).cpu()
        named = dict(zip((*_DEVICE, *self.part_weights, *_HOST), found.tolist(), strict=True))
        if not named["steps"]:
            return {}
        metrics = {"loss": named["loss"] / named["steps"], **unpaired_metrics(found[2 : len(_DEVICE)])}
        metrics["kl"] = named["kl"] / named["steps"]
        metrics |= {f"loss/{name}": named[name] / named["steps"] / w for name, w in self.part_weights.items()}
        if named["sparse"]:
            metrics["head/rho"] = named["rho"] / named["sparse"]
            metrics["head/certified"] = named["certified"] / named["sparse"]
        return metrics

    def pool(self, device: torch.device) -> None:
        """Move the sums of all ranks to the first, which saves them. Every rank must call it before a save."""
        if number_of_ranks() == 1:
            return
        found = self._over_ranks(device)
        if own_rank() == 0:
            self._restore(found[: -len(_HOST)], found[-len(_HOST) :].tolist())

    def _restore(self, sums: Tensor, numbers: Sequence[float]) -> None:
        self._sums, self._numbers = sums, dict(zip(_HOST, numbers, strict=True))

    def on_step_end(self, args, state, control, **kwargs):
        self.shift.step()

    @staticmethod
    def _batches(args) -> dict[str, int]:
        return {
            "ranks": number_of_ranks(),
            "batches of a step": number_of_ranks() * args.gradient_accumulation_steps,
            "rows of a batch": args.per_device_train_batch_size,
        }

    def on_train_begin(self, args, state, control, **kwargs):
        self.batches = self._batches(args)
        # Checkpoints written before the package had rooms call this class _FeedbackState.
        older = state.stateful_callbacks.pop("_FeedbackState", None)
        saved = (state.stateful_callbacks.get(type(self).__name__) or older or {}).get("attributes")
        if not saved:
            return
        _check_batches(saved.get("batches"), self.batches)
        self.shift.load_state_dict({key: _stored(value) for key, value in saved["shift"].items()})
        self._clear()
        if saved["sums"] is not None and own_rank() == 0:  # they are those of all ranks
            loss, steps, kl, rho, certified, sparse, *sums = _stored(saved["sums"])
            on_device = torch.tensor([loss, kl, *sums], dtype=torch.float64, device=args.device)
            self._restore(on_device, [steps, rho, certified, sparse])

    def state(self) -> dict:
        self._add_backward()
        sums = None
        if self._sums is not None:
            (loss, kl, *rest), numbers = self._sums.tolist(), self._numbers
            sums = [loss, numbers["steps"], kl, numbers["rho"], numbers["certified"], numbers["sparse"], *rest]
        return {
            "args": {},
            "attributes": _storable({"shift": self.shift.state_dict(), "sums": sums, "batches": self.batches}),
        }


def _storable(value):
    """For JSON, which has no infinity: such a number becomes a word that `float` reads."""
    if isinstance(value, dict):
        return {key: _storable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_storable(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _stored(value):
    if isinstance(value, list):
        return [_stored(part) for part in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def _check_batches(saved: dict[str, int] | None, now: dict[str, int]) -> None:
    """Refuse to resume on another number of ranks if a step would take other rows."""
    if not saved or saved["ranks"] == now["ranks"]:
        return
    for name in ("batches of a step", "rows of a batch"):
        if saved[name] != now[name]:
            raise ValueError(
                f"the checkpoint was saved by {saved['ranks']} ranks with {saved['batches of a step']} micro-batches of "
                f"{saved['rows of a batch']} rows a step, and this run has {now['ranks']} ranks with "
                f"{now['batches of a step']} of {now['rows of a batch']}: the order of the rows would change. Keep "
                "ranks x gradient_accumulation_steps and per_device_train_batch_size"
            )
