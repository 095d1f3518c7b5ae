"""Batches without padding: sequences end to end, and as many of them as a token budget holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..data.batch import collate, collate_packed, completion_lengths, sequence_sums
from ..data.dataset import Item
from ..models.patch import completion_logps, logp_budget


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
        sums = []
        for make in (collate, collate_packed):
            batch = {name: tensor.to(device) for name, tensor in make(items, pad_token_id).items()}
            sums.append(sequence_sums(completion_logps(model, batch), batch) / completion_lengths(batch))
    finally:
        model.train(training)
    budget = logp_budget(model)
    if not (sums[0] - sums[1]).abs().max() <= budget:
        raise ValueError(
            f"{type(model).__name__} does not keep packed sequences apart: the log-probability per token differs by "
            f"{float((sums[0] - sums[1]).abs().max()):.2g} nats from the padded batch's. Leave padding_free off."
        )
