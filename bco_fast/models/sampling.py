"""Sampling from a model, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


@torch.no_grad()
def draw(
    model: nn.Module,
    encoded: Sequence[Sequence[int]],
    order: Sequence[int],
    options: Mapping[str, object],
    *,
    batch_size: int,
    seed: int,
    progress: bool = False,
) -> list[list[int]]:
    """What `model.generate` adds to each prompt, padding included; the global random state is left as it was.

    Args:
        encoded: prompts as token ids.
        order: in which they are cut into batches; samples hang on it.
        options: of `model.generate`, pad_token_id among them.
    """
    device, training = next(model.parameters()).device, model.training
    drawn: list[list[int]] = [[] for _ in encoded]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress):
                chosen = order[start : start + batch_size]
                batch = _left_padded([encoded[i] for i in chosen], options["pad_token_id"])
                tokens = model.generate(**{name: tensor.to(device) for name, tensor in batch.items()}, **options)
                for i, ids in zip(chosen, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                    drawn[i] = ids
    finally:
        model.train(training)
    return drawn


def _left_padded(encoded: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:  # [B, T] int64
    width = max(map(len, encoded))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in encoded]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]),
    }
