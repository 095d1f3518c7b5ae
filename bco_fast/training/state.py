"""What training accumulates between log lines and keeps across a resume: the reward shift and the log window."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..head.types import HeadStats
from ..losses.metrics import FIELDS, unpaired_metrics
from ..losses.reward_shift import RewardShift

_DEVICE = ("loss", "kl", *FIELDS)
"""Sums that are added up on the device; nothing waits for them before a log line."""
_HOST = ("steps", "rho", "certified", "sparse")
"""Numbers that the host knows anyway."""


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class FeedbackState(TrainerCallback, ExportableState):
    """δ and the sums of the current log window: moved by training, saved with every checkpoint, restored on resume.

    The Trainer writes the state of its callbacks into trainer_state.json but does not read it back. It also forgets the
    losses of the window that a checkpoint falls into, so the window's loss is kept here as well.
    """

    restores_itself = True

    def __init__(self, shift: RewardShift):
        self.shift = shift
        self.head = HeadStats()
        self._clear()

    def _clear(self) -> None:
        self._sums: Tensor | None = None  # [_DEVICE] float64
        self._numbers = dict.fromkeys(_HOST, 0.0)

    def add(self, loss: Tensor, sums: Tensor, z_ref: Tensor | None = None, *, begins_step: bool = True) -> None:
        """Take in one micro-batch.

        Args:
            loss: its part of the step's loss.
            sums: its `unpaired_sums`.
            z_ref: of KTO, with the first micro-batch of a step.
        """
        kl = loss * 0 if z_ref is None else z_ref
        row = torch.cat([torch.stack([loss.double(), kl.double()]), sums])
        self._sums = row if self._sums is None else self._sums + row
        self._add_backward()
        self._numbers["steps"] += begins_step

    def _add_backward(self) -> None:
        """Take in, once, what the last backward of a sparse head reported."""
        if self.head.kept_fraction is not None:
            self._numbers["rho"] += self.head.kept_fraction
            self._numbers["certified"] += self.head.error_bound
            self._numbers["sparse"] += 1
            self.head.clear()

    def take(self, device: torch.device, ranks: int) -> dict[str, float]:
        """The metrics of the window over all ranks; the next window starts empty.

        Every rank must call it: one without a micro-batch since the last call adds zeros.
        """
        self._add_backward()
        sums = torch.zeros(len(_DEVICE), dtype=torch.float64) if self._sums is None else self._sums
        numbers = torch.tensor(list(self._numbers.values()), dtype=torch.float64)
        self._clear()
        found = all_reduce(torch.cat([sums.to(device), numbers.to(device)])).cpu()
        named = dict(zip((*_DEVICE, *_HOST), found.tolist(), strict=True))
        if not named["steps"]:
            return {}
        metrics = {"loss": named["loss"] * ranks / named["steps"], **unpaired_metrics(found[2 : len(_DEVICE)])}
        metrics["kl"] = named["kl"] / named["steps"]
        if named["sparse"]:
            metrics["head/rho"] = named["rho"] / named["sparse"]
            metrics["head/certified"] = named["certified"] / named["sparse"]
        return metrics

    def on_step_end(self, args, state, control, **kwargs):
        self.shift.step()

    def on_train_begin(self, args, state, control, **kwargs):
        # Checkpoints written before the package had rooms call this class _FeedbackState.
        older = state.stateful_callbacks.pop("_FeedbackState", None)
        saved = (state.stateful_callbacks.get(type(self).__name__) or older or {}).get("attributes")
        if not saved:
            return
        self.shift.load_state_dict({key: _stored(value) for key, value in saved["shift"].items()})
        self._clear()
        if saved["sums"] is not None:
            loss, steps, kl, rho, certified, sparse, *sums = _stored(saved["sums"])
            self._sums = torch.tensor([loss, kl, *sums], dtype=torch.float64, device=args.device)
            self._numbers = {"steps": steps, "rho": rho, "certified": certified, "sparse": sparse}

    def state(self) -> dict:
        self._add_backward()
        sums = None
        if self._sums is not None:
            (loss, kl, *rest), numbers = self._sums.tolist(), self._numbers
            sums = [loss, numbers["steps"], kl, numbers["rho"], numbers["certified"], numbers["sparse"], *rest]
        return {"args": {}, "attributes": _storable({"shift": self.shift.state_dict(), "sums": sums})}


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
