"""An objective of one's own, by name, beside those of `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from . import OBJECTIVES, Objective
from .output import LossOutput, reduce

_BUILT_IN = frozenset(OBJECTIVES)


def register_objective(
    name: str,
    function: Callable[..., Tensor],
    *,
    data: Literal["labels", "scores", "pairs"] = "labels",
    beta: float = 0.1,
    reference: bool = True,
) -> None:
    """Make a function of log-probabilities a `loss_type`.

        def margin(logps, ref_logps, labels, *, beta):                                                  # all [B]
            rewards = beta * (logps - ref_logps)
            return torch.relu(1 - torch.where(labels, rewards, -rewards))                              # [B]

        register_objective("margin", margin)
        FeedbackConfig(loss_type="margin", ...)

    Args:
        name: in lower case, letters, digits and underscores; replaces an earlier function of that name.
        function: the cost of each row, [B] float, differentiable in the log-probabilities, which are sums over the tokens of
            a completion in nats. It is called with (logps, ref_logps, labels, beta=...), labels bool; for "scores" with
            scores in [0, 1] in their place; for "pairs" with (chosen_logps, rejected_logps, ref_chosen_logps,
            ref_rejected_logps, beta=...). Weights, classes and the mean over a step are applied to what it returns.
        data: what it reads of a row.
        beta: default of the option `beta`.
        reference: False for a function without reference log-probabilities, which is then called without them.

    Raises:
        ValueError: the name is bco_fast's own or not an identifier, or `data` is none of these.
        TypeError: while training, if the function does not return a floating point tensor [B].
    """
    if name in _BUILT_IN:
        raise ValueError(f"{name} is an objective of bco_fast: choose another name")
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"the name of an objective is lower case letters, digits and underscores, not {name!r}")
    if data not in ("labels", "scores", "pairs"):
        raise ValueError(f"data must be labels, scores or pairs, not {data!r}")
    wrap = _paired if data == "pairs" else _unpaired
    OBJECTIVES[name] = Objective(wrap(name, function, reference), data, beta=beta, reference=reference)


def _checked(name: str, costs: Tensor, like: Tensor) -> Tensor:
    if not isinstance(costs, Tensor) or costs.shape != like.shape or not costs.dtype.is_floating_point:
        kind = list(costs.shape) if isinstance(costs, Tensor) else type(costs).__name__
        raise TypeError(
            f"objective {name} must return the cost of each row, a float tensor {list(like.shape)}, not {kind}"
        )
    return costs


def _unpaired(name: str, function: Callable, reference: bool) -> Callable[..., LossOutput]:
    def loss(logps, *facts, beta, sample_weight=None, reduction="mean") -> LossOutput:
        costs = _checked(name, function(logps, *facts, beta=beta), logps)
        labels = facts[-1] if facts[-1].dtype == torch.bool else facts[-1] > 0.5
        rewards = beta * (logps - facts[0] if reference else logps).detach()
        total = reduce(costs, labels, sample_weight, reduction)
        return LossOutput(total, costs, rewards, logps.detach(), labels)

    return loss


def _paired(name: str, function: Callable, reference: bool) -> Callable[..., LossOutput]:
    def loss(chosen, rejected, *references, beta) -> LossOutput:
        costs = _checked(name, function(chosen, rejected, *references, beta=beta), chosen)
        logps = torch.cat([chosen, rejected]).detach()
        rewards = beta * (logps - torch.cat(references) if reference else logps)
        labels = torch.arange(len(logps), device=logps.device) < len(chosen)
        return LossOutput(costs.mean(), costs, rewards, logps, labels, paired=True)

    return loss
