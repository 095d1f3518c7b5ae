"""What is checked before the first step: that the model computes in training batches what it computes alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.batch import collate, to_device
from ..data.dataset import Item
from ..models.patch import logp_budget
from .step import completion_sums

logger = logging.getLogger("bco_fast")


def check_positions(model: nn.Module, max_length: int) -> None:
    """Refuse a max_length beyond the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise ValueError(f"max_length is {max_length}, but the model has {positions} positions")


@torch.no_grad()
def check_packing(model: nn.Module, items: Sequence[Item], pad_token_id: int) -> None:
    """Refuse a model whose attention looks across the sequences of a packed batch.

    Args:
        model: patched by `patch_model`.
        items: two sequences or more.

    Raises:
        ValueError: packed and padded log-probabilities differ by more than rounding.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        means = []
        for packed in (False, True):
            batch = to_device(collate(items, pad_token_id, packed=packed), device)
            means.append(completion_sums(model, batch) / batch["cu_completions"].diff())
    finally:
        model.train(training)
    difference = (means[0] - means[1]).abs().max()
    if not difference <= logp_budget(model):
        raise ValueError(
            f"{type(model).__name__} does not keep packed sequences apart: the log-probability per token differs by "
            f"{float(difference):.2g} nats from the padded batch's. Leave padding_free off."
        )


def check_start(model: nn.Module, log_ratios: Tensor, lengths: Tensor, *, autocast: bool) -> None:
    """Before the first step policy and reference are the same model, so every reward is 0 except for rounding.

    Args:
        model: the policy, unwrapped.
        log_ratios: [B], policy minus reference, nats, of a training batch.
        lengths: [B], tokens of its completions.

    Raises:
        ValueError: they differ: training batches and those of the reference disagree. An adapter that was trained before
            is only warned about.
    """
    largest = float((log_ratios / lengths).abs().max())
    budget = logp_budget(model, autocast=autocast)
    logger.info("step 0: policy and reference differ by %.1e nats per token at most (budget %.0e)", largest, budget)
    if largest <= budget:
        return
    text = (
        f"before training policy and reference differ by {largest:.2g} nats per token, more than rounding ({budget:g})"
    )
    if hasattr(model, "disable_adapter"):
        logger.warning("%s: the adapter is not a fresh one, so rewards do not start at 0", text)
        return
    raise ValueError(
        f"{text}: the model computes other values in training batches than alone. Pass ref_model= if the reference is "
        "another model."
    )
