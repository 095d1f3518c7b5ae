"""Runs the reference model over what the cache does not hold yet, and checks a few rows of what it does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .. import files
from ..data.batch import Layout, collate_tokens, to_device
from ..data.dataset import Example
from ..data.samplers import token_batches
from ..models.attention import is_flash, knows_segments
from ..models.patch import completion_logps, logp_budget
from .cache import CacheError, FillPlan, ReferenceCache
from .ranks import gather_objects, number_of_ranks, own_rank
from .seen import SeenShards

ROWS_PER_SHARD = 512

CHECKED_ROWS = 4
"""Cached rows that every run computes again."""
CHECKED_UNSEEN_ROWS, CHECKED_UNSEEN_SHARE = 64, 0.01
"""Rows of shards from elsewhere that are computed again once: the larger of this many and this share of them."""

SHARED_FOLDER_SECONDS = 30.0
"""How long a shared file system may take to show what another rank has written."""


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
    layout: Layout | None = None,
    lockstep: bool = False,
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
        layout: of the batches (`data.batch`); by default every prompt once where the model's attention reads segments,
            packed where FlashAttention keeps sequences apart without a mask, else padded. It changes no key and, but for
            rounding, no value.
        lockstep: the model is sharded over the ranks, so that every forward is a collective: all ranks call this, agree on
            the missing rows and run equally many forwards.

    Raises:
        CacheError: a cached row does not agree with the model, a new one is not finite, or the disk cannot be written.
    """
    start = time.perf_counter()
    by_key = {example.key: example for example in examples}
    keys = list(by_key)
    if check_tokens:
        cache.drop_damaged(keys)
    known = cache.find(keys)[:, 0] >= 0
    if lockstep:
        known = gather_objects(known)[0]
    hits = {key: by_key[key] for key, here in zip(keys, known, strict=True) if here}
    missing = {key: by_key[key] for key in keys if key not in hits}
    present, seen = list(cache.shards), SeenShards(cache.folder)
    computed = 0
    if layout is None:
        layout = "shared" if knows_segments(model.config) else "packed" if is_flash(model.config) else "padded"
    with _as_reference(model, adapter), autocast or contextlib.nullcontext():
        if missing:
            cache.model_name = Path(str(getattr(model.config, "_name_or_path", ""))).name
            plan = cache.make_plan(keys, rows_per_shard=ROWS_PER_SHARD, tokens_per_batch=tokens_per_batch)
            computed = _compute(cache, missing, model, plan, pad_token_id, progress, layout, lockstep)
        if not lockstep or own_rank() == 0:
            cache.settle()
        if lockstep:
            _await_rows(cache, keys)
        if hits:
            used = _spot_check(cache, hits, seen, model, pad_token_id, tokens_per_batch, lockstep)
            seen.add(used)
        seen.add(shard.path for shard in cache.shards if shard not in present)
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
    layout: Layout,
    lockstep: bool,
) -> int:
    # Rows of one prompt or chat together, so that a batch can share it; those with the longest row first, so that rows of like
    # length share a batch and memory peaks in the first one. Keys break ties: the order of the file does not matter.
    longest: dict[bytes | str, int] = {}
    for example in missing.values():
        longest[example.together] = max(longest.get(example.together, 0), len(example))

    def place(key: bytes) -> tuple:
        group = missing[key].together
        return -longest[group], str(group), -len(missing[key]), key

    order = sorted(missing, key=place)
    total = sum(map(len, missing.values()))
    with tqdm(total=total, desc="reference", unit="tok", unit_scale=True, disable=not progress) as bar:

        def batches(keys: Sequence[bytes]) -> Iterator[list[Example]]:
            examples = [missing[key] for key in keys]
            cut = token_batches([[e] for e in examples], range(len(examples)), plan.tokens_per_batch, layout=layout)
            return ([examples[i] for i in chosen] for chosen in cut)

        def forward(examples: list[Example]) -> list[np.ndarray]:
            bar.update(sum(map(len, examples)))
            return token_logps(model, examples, pad_token_id, layout)

        def compute(keys: list[bytes]) -> list[np.ndarray]:
            return [values for examples in batches(keys) for values in forward(examples)]

        def found(keys: Sequence[bytes]) -> None:
            bar.total -= sum(len(missing[key]) for key in keys)

        if lockstep:
            return _build_in_lockstep(cache, order, batches, forward, plan.rows_per_shard)
        ranks = own_rank(), number_of_ranks()
        return cache.build(order, compute, rows_per_shard=plan.rows_per_shard, share=ranks, found=found)


def _build_in_lockstep(
    cache: ReferenceCache,
    order: Sequence[bytes],
    batches: Callable[[Sequence[bytes]], Iterator[list[Example]]],
    forward: Callable[[list[Example]], list[np.ndarray]],
    rows_per_shard: int,
) -> int:
    """Compute and commit the rows in turns: a shard per rank, and as many forwards on every rank as on the busiest.

    The shards are those of `ReferenceCache.build`. A rank that fails makes all of them raise its error.
    """
    rank, ranks = own_rank(), number_of_ranks()
    shards = [list(order[first : first + rows_per_shard]) for first in range(0, len(order), rows_per_shard)]
    computed = 0
    for turn in range(0, len(shards), ranks):
        own = shards[turn + rank] if turn + rank < len(shards) else []
        todo, values, problem = list(batches(own)), [], None
        idle = next(batches(shards[turn][:1]))  # what a rank runs that has nothing left to do
        for number in range(max(gather_objects(len(todo)))):
            if number < len(todo):
                values += forward(todo[number])
            else:
                forward(idle)
        try:
            if own:
                cache.write_shard(own, values)
        except CacheError as error:
            problem = str(error)
        for other, text in enumerate(gather_objects(problem)):
            if text is not None:
                raise CacheError(f"rank {other}: {text}")
        computed += len(own)
        files.failpoint("next shard")
    return computed


def _await_rows(cache: ReferenceCache, keys: Sequence[bytes]) -> None:
    """Wait for the other ranks' shards, which a shared file system may show late."""
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while True:
        cache.refresh()
        complete = bool((cache.find(keys)[:, 0] >= 0).all())
        late = time.monotonic() > deadline
        said = gather_objects((complete, late))
        if all(whole for whole, _ in said):
            return
        if any(late for _, late in said):
            rank = next(rank for rank, (whole, _) in enumerate(said) if not whole)
            raise CacheError(f"rank {rank} does not see all shards of {cache.folder}: give all ranks one cache_dir")
        time.sleep(0.1)


def token_logps(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, layout: Layout = "padded"
) -> list[np.ndarray]:
    """Per-token log-probabilities of each completion."""
    batch = collate_tokens(examples, pad_token_id, layout=layout)
    logps = completion_logps(model, to_device(batch, next(model.parameters()).device))
    return np.split(logps.float().cpu().numpy(), batch["cu_completions"][1:-1].numpy())


def _spot_check(
    cache: ReferenceCache,
    hits: dict[bytes, Example],
    seen: SeenShards,
    model: nn.Module,
    pad_token_id: int,
    tokens_per_batch: int,
    lockstep: bool = False,
) -> list[Path]:
    """Compute cached rows again and compare, more of those in shards from elsewhere; -> the shards that hold `hits`.

    A reference that is not this model shows in the first row; forged rows in a copied folder show in proportion.
    """
    keys = list(hits)
    places = cache.find(keys)[:, 0]
    shards = {int(i): cache.shards[i].path for i in np.unique(places)}
    unseen = np.flatnonzero(np.isin(places, [i for i, path in shards.items() if path not in seen]))
    rng = np.random.default_rng()
    if len(unseen):
        count = max(CHECKED_UNSEEN_ROWS, int(np.ceil(CHECKED_UNSEEN_SHARE * len(unseen))))
        chosen = _spread(unseen, places[unseen], rng)[:count]
    else:
        chosen = rng.choice(len(keys), min(CHECKED_ROWS, len(keys)), replace=False)
    if lockstep:
        chosen = gather_objects(chosen)[0]  # every rank runs the same forwards
    examples = [hits[keys[i]] for i in chosen]
    budget = logp_budget(model, autocast=torch.is_autocast_enabled(next(model.parameters()).device.type))
    for batch in token_batches([[e] for e in examples], range(len(examples)), tokens_per_batch):
        rows = [examples[i] for i in batch]
        for row, fresh in zip(rows, token_logps(model, rows, pad_token_id), strict=True):
            stored = cache.token_logps(row.key)
            if fresh.shape != stored.shape or not np.abs(fresh - stored).mean() <= budget:
                raise CacheError(
                    f"row {row.key.hex()} of {cache.folder} does not agree with the reference model any more. "
                    "Delete that folder, or choose another cache_dir, and run again."
                )
    return list(shards.values())


def _spread(rows: np.ndarray, shards: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows in random order, but one of every shard first, then a second of every shard, ..."""
    order = rng.permutation(len(rows))
    order = order[np.argsort(shards[order], kind="stable")]
    _, starts, counts = np.unique(shards[order], return_index=True, return_counts=True)
    turns = np.arange(len(rows)) - np.repeat(starts, counts)
    return rows[order[np.argsort(turns + rng.random(len(rows)))]]
