"""Runs the reference model over what the cache does not hold yet, and checks a few rows of what it does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from .cache import CacheError, FillPlan, ReferenceCache, ReferenceId
from .data import Example, collate
from .models import completion_logps, logp_budget
from .packing import collate_packed

# What a config says about itself rather than about the function it describes.
_VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "architectures", "torch_dtype", "dtype")
ROWS_PER_SHARD = 512
CHECKED_ROWS = 4
_HASHED_PIECE = 32 << 20  # bytes; pieces of one tensor are hashed by several threads


@dataclass(frozen=True)
class FillReport:
    """What `fill` did."""

    rows: int
    """Distinct rows asked for: hits + computed."""
    hits: int
    """Found in the cache, or computed meanwhile by another process."""
    computed: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.rows} rows: {self.hits} cached, {self.computed} computed"


def reference_id(model: nn.Module, *, autocast: str = "no", adapter: bool = False) -> ReferenceId:
    """Identify a reference by what it computes: weights, config, dtype, attention backend.

    Every weight is read from memory once, because only memory is what computes: files of the same name may have been
    changed, converted or merged since. Threads share the work, 1 to 2 GB a second for each core.

    Args:
        autocast: "no", or the dtype that training and `fill` compute in.
        adapter: of a PEFT model, identify it with its active adapters rather than its base model; see `fill`.

    Raises:
        ValueError: a weight is not in memory (meta device), or an adapter is merged into the base weights in place.
    """
    weights = _weights(model, adapter)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    if adapter and hasattr(model, "peft_config"):
        config["adapters"] = {name: _settings(model.peft_config[name]) for name in model.active_adapters}
    text = json.dumps(config, sort_keys=True, default=_plain)
    return ReferenceId(
        weights=_digest(weights),
        config=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        dtype=f"{next(model.parameters()).dtype}, autocast {autocast}",
        attention=str(getattr(model.config, "_attn_implementation", "default")),
    )


def _settings(peft_config) -> dict:
    return {
        key: value for key, value in vars(peft_config).items() if key not in ("base_model_name_or_path", "revision")
    }


def _plain(value) -> object:
    """For JSON; a set has another order in every process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _weights(model: nn.Module, adapter: bool) -> dict[str, Tensor]:
    """Tensors by name. Without its adapters a PEFT model has the names and tensors of its base model, so that both find
    the same cache, whatever numbers the adapters were initialised with."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    if not adapter and not hasattr(model, "get_base_model"):
        raise ValueError("an adapter was added to the model in place: wrap it with peft.get_peft_model instead")
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")]
    if any(getattr(layer, "merged", False) for _, layer in layers):
        raise ValueError(
            "an adapter is merged into the weights of its base model in place: call unmerge_adapter() first, or "
            "merge_and_unload() to make the merged model the reference"
        )
    if adapter:
        return model.state_dict()
    # PEFT keeps the module that it wraps under one of two names.
    wraps = {
        f"{name}.": f"{name}.{inner}."
        for name, layer in layers
        for inner in ("base_layer", "original_module")
        if inner in dict(layer.named_children())
    }
    base = next(f"{name}." for name, module in model.named_modules() if module is model.get_base_model())
    return {
        name.removeprefix(base): tensor
        for name, tensor in _unwrapped(model.state_dict(), wraps)
        if name.startswith(base)
    }


def _unwrapped(state: Mapping[str, Tensor], wraps: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        for outside, inside in reversed(wraps.items()):  # inner modules first: their names hold the outer ones
            if name.startswith(inside):
                name = outside + name.removeprefix(inside)
            elif name.startswith(outside):
                break  # the adapter's own
        else:
            yield name, tensor


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes; pieces are hashed by threads, and tied weights once."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise ValueError(f"{name} of the reference model has no values in memory, so it cannot be identified")
    views = {(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device): t for t in weights.values()}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pieces = {
            view: pool.map(_sha256, tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_HASHED_PIECE))
            for view, tensor in views.items()
        }
        hashes = {view: b"".join(found) for view, found in pieces.items()}
    whole = hashlib.sha256()
    for name, t in sorted(weights.items(), key=lambda item: item[0]):
        whole.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        whole.update(hashes[t.data_ptr(), t.dtype, t.shape, t.stride(), t.device])
    return whole.hexdigest()[:32]


def _sha256(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().numpy()).digest()


def fill(
    cache: ReferenceCache,
    examples: Sequence[Example],
    model: nn.Module,
    *,
    pad_token_id: int = 0,
    tokens_per_batch: int = 8192,
    autocast: contextlib.AbstractContextManager | None = None,
    progress: bool = True,
    adapter: bool = False,
    check_tokens: bool = True,
    packed: bool | None = None,
) -> FillReport:
    """Compute the rows the cache lacks and commit them shard by shard; an interruption loses one shard at most.

    With torch.distributed initialised, every rank may call this at the same time: the ranks share the missing rows and
    find each other's on disk, without waiting for one another.

    Args:
        model: the reference, patched by `patch_model`, on its device; run in eval mode without gradient.
        tokens_per_batch: padded tokens of one forward pass.
        autocast: the context that training will compute in.
        adapter: of a PEFT model, keep its active adapters switched on; otherwise the reference is the base model.
        check_tokens: verify the per-token values of the rows that are there (1 GB a second) and compute damaged ones
            again, with a warning. Without it a damaged row shows when it is read; sums are verified either way.
        packed: run sequences end to end instead of padding them (`packing.collate_packed`); by default where
            FlashAttention runs them so without a mask. Other attention builds a mask of all pairs of tokens.

    Raises:
        CacheError: a cached row does not agree with the model, a new one is not finite, or the disk cannot be written.
    """
    start = time.perf_counter()
    by_key = {example.key: example for example in examples}
    keys = list(by_key)
    if check_tokens:
        cache.drop_damaged(keys)
    known = cache.find(keys)[:, 0] >= 0
    hits = {key: by_key[key] for key, here in zip(keys, known, strict=True) if here}
    missing = {key: by_key[key] for key in keys if key not in hits}
    computed = 0
    if packed is None:
        packed = str(getattr(model.config, "_attn_implementation", "")).startswith("flash_attention")
    with _as_reference(model, adapter), autocast or contextlib.nullcontext():
        if missing:
            cache.model_name = Path(str(getattr(model.config, "_name_or_path", ""))).name
            plan = cache.make_plan(keys, rows_per_shard=ROWS_PER_SHARD, tokens_per_batch=tokens_per_batch)
            computed = _compute(cache, missing, model, plan, pad_token_id, progress, packed)
        cache.settle()
        if hits:
            _spot_check(cache, hits, model, pad_token_id)
    return FillReport(len(keys), len(keys) - computed, computed, time.perf_counter() - start)


@contextlib.contextmanager
def _as_reference(model: nn.Module, adapter: bool) -> Iterator[None]:
    """In eval mode, without gradient, without the adapters of a PEFT model unless they are asked for."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    off = contextlib.nullcontext() if adapter or not hasattr(model, "disable_adapter") else model.disable_adapter()
    try:
        with torch.no_grad(), off:
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _compute(
    cache: ReferenceCache,
    missing: dict[bytes, Example],
    model: nn.Module,
    plan: FillPlan,
    pad_token_id: int,
    progress: bool,
    packed: bool,
) -> int:
    # Longest first: rows of one length share a batch, and memory peaks in the first one. Keys break ties, so the cuts
    # do not depend on the order of the file.
    order = sorted(missing, key=lambda key: (-len(missing[key]), key))
    total = sum(map(len, missing.values()))
    with tqdm(total=total, desc="reference", unit="tok", unit_scale=True, disable=not progress) as bar:

        def compute(keys: list[bytes]) -> list[np.ndarray]:
            values: list[np.ndarray] = []
            for batch in _batches([missing[key] for key in keys], plan.tokens_per_batch):
                values += token_logps(model, batch, pad_token_id, packed)
                bar.update(sum(map(len, batch)))
            return values

        def found(keys: Sequence[bytes]) -> None:
            bar.total -= sum(len(missing[key]) for key in keys)

        ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
        return cache.build(order, compute, rows_per_shard=plan.rows_per_shard, share=ranks, found=found)


def _batches(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) + 1) * max(len(batch[0]), len(example)) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def token_logps(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, packed: bool = False
) -> list[np.ndarray]:
    """Per-token log-probabilities of each completion."""
    device = next(model.parameters()).device
    batch = (collate_packed if packed else collate)([(example, 0.0) for example in examples], pad_token_id)
    logps = completion_logps(model, {name: tensor.to(device) for name, tensor in batch.items()})
    logps = logps.float().cpu().numpy()
    rows = np.split(logps[0], batch["cu_seqlens"][1:-1].numpy()) if packed else logps
    return [row[e.completion_start - 1 : len(e) - 1] for row, e in zip(rows, examples, strict=True)]


def _spot_check(cache: ReferenceCache, hits: dict[bytes, Example], model: nn.Module, pad_token_id: int) -> None:
    """Recompute a few cached rows, others each time: a reference that is not this model shows in the first."""
    chosen = np.random.default_rng().choice(len(hits), min(CHECKED_ROWS, len(hits)), replace=False)
    budget = logp_budget(model, autocast=torch.is_autocast_enabled(next(model.parameters()).device.type))
    keys = list(hits)
    for key in (keys[i] for i in chosen):
        fresh = token_logps(model, [hits[key]], pad_token_id)[0]
        stored = cache.token_logps(key)
        if fresh.shape != stored.shape or not np.abs(fresh - stored).mean() <= budget:
            raise CacheError(
                f"row {key.hex()} of {cache.folder} does not agree with the reference model any more. "
                "Delete that folder, or choose another cache_dir, and run again."
            )
