"""Runs the reference model over what the cache does not hold yet, and checks a few rows of what it does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .cache import CacheError, FillPlan, ReferenceCache, ReferenceId
from .data import Example, collate
from .models import completion_logps

# What a config says about itself rather than about the function it describes.
_VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "architectures", "torch_dtype", "dtype")
ROWS_PER_SHARD = 512
CHECKED_ROWS = 4


@dataclass(frozen=True)
class FillReport:
    """What `fill` did."""

    rows: int
    """Distinct rows asked for: hits + computed."""
    hits: int
    computed: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.rows} rows: {self.hits} cached, {self.computed} computed"


def reference_id(model: nn.Module, *, autocast: str = "no") -> ReferenceId:
    """Identify a reference by what it computes: weights, config, dtype, attention backend. Reads every weight once."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    text = json.dumps(config, sort_keys=True, default=str)
    return ReferenceId(
        weights=weights.hexdigest(),
        config=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        dtype=f"{next(model.parameters()).dtype}, autocast {autocast}",
        attention=str(getattr(model.config, "_attn_implementation", "default")),
    )


def fill(
    cache: ReferenceCache,
    examples: Sequence[Example],
    model: nn.Module,
    *,
    pad_token_id: int = 0,
    tokens_per_batch: int = 8192,
    autocast: contextlib.AbstractContextManager | None = None,
    progress: bool = True,
) -> FillReport:
    """Compute the rows the cache lacks and commit them shard by shard; an interruption loses one shard at most.

    Args:
        model: the reference, patched by `patch_model`, on its device; run in eval mode without gradient.
        tokens_per_batch: padded tokens of one forward pass.
        autocast: the context that training will compute in.

    Raises:
        CacheError: a cached row does not agree with the model, or a new one is not finite.
    """
    start = time.perf_counter()
    by_key = {example.key: example for example in examples}
    keys = list(by_key)
    places = cache.find(keys)[:, 0]
    hits = {key: by_key[key] for key, shard in zip(keys, places, strict=True) if shard >= 0}
    missing = {key: by_key[key] for key in keys if key not in hits}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast or contextlib.nullcontext():
            if missing:
                plan = cache.make_plan(keys, rows_per_shard=ROWS_PER_SHARD, tokens_per_batch=tokens_per_batch)
                _compute(cache, missing, model, plan, pad_token_id, progress)
            cache.settle()
            if hits:
                _spot_check(cache, hits, model, pad_token_id)
    finally:
        model.train(training)
    return FillReport(len(keys), len(hits), len(missing), time.perf_counter() - start)


def _compute(
    cache: ReferenceCache,
    missing: dict[bytes, Example],
    model: nn.Module,
    plan: FillPlan,
    pad_token_id: int,
    progress: bool,
) -> None:
    # Longest first: rows of one length share a batch, and memory peaks in the first one. Keys break ties, so the cuts
    # do not depend on the order of the file.
    order = sorted(missing, key=lambda key: (-len(missing[key]), key))
    total = sum(map(len, missing.values()))
    with tqdm(total=total, desc="reference", unit="tok", unit_scale=True, disable=not progress) as bar:
        for first in range(0, len(order), plan.rows_per_shard):
            shard = order[first : first + plan.rows_per_shard]
            values: list[np.ndarray] = []
            for batch in _batches([missing[key] for key in shard], plan.tokens_per_batch):
                values += _token_logps(model, batch, pad_token_id)
                bar.update(sum(map(len, batch)))
            cache.write_shard(shard, values)


def _batches(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) + 1) * max(len(batch[0]), len(example)) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _token_logps(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> list[np.ndarray]:
    """Per-token log-probabilities of each completion."""
    device = next(model.parameters()).device
    batch = collate([(example, 0.0) for example in examples], pad_token_id)
    logps = completion_logps(model, {name: tensor.to(device) for name, tensor in batch.items()})
    logps = logps.float().cpu().numpy()
    return [row[e.completion_start - 1 : len(e) - 1] for row, e in zip(logps, examples, strict=True)]


def _spot_check(cache: ReferenceCache, hits: dict[bytes, Example], model: nn.Module, pad_token_id: int) -> None:
    """Recompute a few cached rows, evenly spread over their keys: a wrong reference shows in the first."""
    order = sorted(hits)
    chosen = [order[i] for i in np.linspace(0, len(order) - 1, min(CHECKED_ROWS, len(order)), dtype=int)]
    # Batches of another shape round differently; a token may be off by a few units in the last place of the
    # computation's dtype on logits of this size.
    low = torch.is_autocast_enabled(next(model.parameters()).device.type) or next(model.parameters()).dtype.itemsize < 4
    budget = 0.05 if low else 1e-3
    for key in chosen:
        fresh = _token_logps(model, [hits[key]], pad_token_id)[0]
        stored = cache.token_logps(key)
        if fresh.shape != stored.shape or not np.abs(fresh - stored).mean() <= budget:
            raise CacheError(
                f"row {key.hex()} of {cache.folder} does not agree with the reference model any more. "
                "Delete that folder, or choose another cache_dir, and run again."
            )
