"""The reward shift δ of binary classifier optimization, as a running estimate."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

MODES = ("ema", "cumulative", "batch", "fixed")


class RewardShift:
    """δ = (E₊[r] + E₋[r]) / 2, the midpoint of the mean rewards of the two classes.

    Jung et al., arXiv 2404.04656, Eq. 7 and Theorem 4: the midpoint makes the gap between the BCE loss and the DPO
    loss smallest. `observe` takes rewards in, `step` closes an optimizer step, `value` is what the losses subtract.

        update="step"   value comes from earlier optimizer steps only, 0 at first: every micro-batch of a step, on
                        every rank, sees one δ, so accumulation and data parallelism do not change the loss
        update="micro"  each `observe` moves value at once

    State is one (mean, count) per class; with weights, a weighted mean and the sum of the weights. A class never seen is left out of the midpoint; one absent from a step keeps
    its mean.

    Args:
        mode: "ema" moves each class mean by (1 - decay); "cumulative" is the mean of all rewards ever seen; "batch"
            that of the last step; "fixed" never moves from `initial`.
        decay: of the exponential moving average, in [0, 1).
        balanced: both classes weigh the same, as in Eq. 7. False pools all rewards whatever their label; with
            "cumulative" and "micro" that is what TRL's former BCOTrainer did.
        update: see above.
        initial: δ before anything was observed, in reward units.
    """

    def __init__(
        self,
        mode: Literal["ema", "cumulative", "batch", "fixed"] = "ema",
        decay: float = 0.9,
        balanced: bool = True,
        update: Literal["step", "micro"] = "step",
        *,
        initial: float = 0.0,
    ):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        if update not in ("step", "micro"):
            raise ValueError(f"update must be 'step' or 'micro', not {update!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.mode, self.decay, self.balanced, self.update, self.initial = mode, decay, balanced, update, float(initial)
        groups = 2 if balanced else 1
        self._state = torch.zeros(2, groups, dtype=torch.float64)  # mean, count
        self._pending = torch.zeros(2, groups, dtype=torch.float64)  # sum, count

    def __repr__(self) -> str:
        return (
            f"RewardShift(mode={self.mode!r}, decay={self.decay}, balanced={self.balanced}, update={self.update!r}, "
            f"value={float(self.value):.4g})"
        )

    @property
    def value(self) -> Tensor:
        """δ, a 0-d float32 tensor on the device of the rewards; reading it does not wait for the device."""
        mean, count = self._state
        seen = (count > 0).double()
        midpoint = (mean * seen).sum() / seen.sum().clamp(min=1)
        return torch.where(seen.sum() > 0, midpoint, self.initial).float()

    @torch.no_grad()
    def observe(
        self,
        r: Tensor,  # [B]
        labels: Tensor,  # [B] bool
        weight: Tensor | None = None,  # [B]
    ) -> None:
        """Take in the rewards of one micro-batch, detached.

        Args:
            weight: what multiplies each row's cost, so that the means are those of the loss; None for 1. TRL's δ
                ("cumulative", "micro", not balanced) takes no weights.
        """
        if r.shape != labels.shape or r.dim() != 1:
            raise ValueError(f"rewards {list(r.shape)} and labels {list(labels.shape)} must both be [B]")
        if weight is not None and weight.shape != r.shape:
            raise ValueError(f"weight {list(weight.shape)} must be [B], like rewards {list(r.shape)}")
        if labels.dtype != torch.bool:
            raise TypeError(f"labels must be bool, not {labels.dtype}")
        if self.mode == "fixed":
            return
        self._to(r.device)
        r = r.detach().double()
        groups = torch.stack([labels, ~labels]) if self.balanced else torch.ones_like(labels)[None]
        trl = (self.mode, self.balanced, self.update) == ("cumulative", False, "micro")
        weight = torch.ones_like(r) if weight is None or trl else weight.detach().double()
        # where, not a product: one infinite reward must not turn the other class into NaN
        sums = torch.where(groups & (weight > 0), r * weight, 0.0).sum(1)
        self._pending += torch.stack([sums, torch.where(groups, weight, 0.0).sum(1)])
        if self.update == "micro":
            self._fold()

    @torch.no_grad()
    def step(self) -> None:
        """Close an optimizer step: what was observed since the last one, on all ranks, moves δ."""
        if self.mode != "fixed" and self.update == "step":
            self._fold()

    def _fold(self) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._pending)
        (mean, count), (total, arrived) = self._state, self._pending
        fresh = total / torch.where(arrived > 0, arrived, 1.0)
        if self.mode == "ema":
            moved = torch.where(count > 0, self.decay * mean + (1 - self.decay) * fresh, fresh)
        elif self.mode == "cumulative":
            moved = mean + (fresh - mean) * arrived / torch.where(count + arrived > 0, count + arrived, 1.0)
        else:
            moved = fresh
        self._state = torch.stack([torch.where(arrived > 0, moved, mean), count + arrived])
        self._pending = torch.zeros_like(self._pending)

    def _to(self, device: torch.device) -> None:
        if self._state.device != device:
            self._state, self._pending = self._state.to(device), self._pending.to(device)

    def state_dict(self) -> dict:
        """Plain numbers, fit for JSON: what is needed to go on exactly where this one stands."""
        return {
            "mode": self.mode,
            "decay": self.decay,
            "balanced": self.balanced,
            "update": self.update,
            "initial": self.initial,
            "state": self._state.tolist(),
            "pending": self._pending.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore from `state_dict`; a state of other settings is refused, because its δ would mean something else."""
        for name in ("mode", "decay", "balanced", "update", "initial"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the saved reward shift has {name}={state[name]!r}, this one {getattr(self, name)!r}")
        device = self._state.device
        self._state = torch.tensor(state["state"], dtype=torch.float64, device=device)
        self._pending = torch.tensor(state["pending"], dtype=torch.float64, device=device)
