"""The specification: float64, with materialised logits. The tests compare everything with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiling import accumulator_dtype
from ..types import HeadInputs


def linear_logps(inputs: HeadInputs, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """logp of the targets and entropy of every row, both [N] and 0 where not kept [N] bool (None: all are).

    Autograd sees every step.
    """
    hidden, weight, targets, bias, spec = inputs
    if keep is None:
        keep = torch.ones_like(targets, dtype=torch.bool)
    hidden64 = torch.where(keep[:, None], hidden, 0.0).double()  # padding may hold anything, NaN too
    weight64 = weight.double()
    if weight.dtype != hidden.dtype:  # under autocast: rounded, but not its gradient
        weight64 = weight64 + (weight.to(hidden.dtype).double() - weight64).detach()
    logits = hidden64 @ weight64.T  # [N, V]
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * spec.logit_scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    logits = logits / spec.temperature

    log_probs = torch.log_softmax(logits, dim=-1)
    # -inf log-probabilities (a vocabulary masked by its bias) add 0 to the entropy, and 0 x -inf is NaN
    surprisal = torch.where(log_probs == float("-inf"), 0.0, log_probs)
    entropy = -(log_probs.exp() * surprisal).sum(-1)
    logps = log_probs.gather(1, torch.where(keep, targets, 0)[:, None])[:, 0]
    dtype = accumulator_dtype(hidden.dtype)
    return torch.where(keep, logps, 0.0).to(dtype), torch.where(keep, entropy, 0.0).to(dtype)
