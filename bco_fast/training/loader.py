"""The batches that a rank trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from ..data.batch import Batch, Layout, placeholder
from ..data.samplers import RankBatches, TokenBudgetSampler
from .config import FeedbackConfig


def train_loader(
    dataset,
    order: Sampler,
    args: FeedbackConfig,
    accelerator: Accelerator,
    collate: Callable[[Sequence], Batch],
    layout: Layout,
) -> DataLoader:
    """Batches of rows, or of tokens, of this rank; the same rows in the same order on any number of ranks.

    Args:
        order: of the dataset's items.
        collate: items -> batch. A rank that has no rows left at the end of an epoch gets a `placeholder` of the dataset's
            first item.
    """
    if isinstance(order, RandomSampler):  # whose order would follow torch's seed of the moment
        order = SeedableRandomSampler(dataset, data_seed=args.data_seed)
    drop_last = args.dataloader_drop_last
    if args.tokens_per_batch is None:
        batches = BatchSampler(order, args.per_device_train_batch_size, drop_last)
    else:
        batches = TokenBudgetSampler(dataset.sides, order, args.tokens_per_batch, layout=layout, seed=args.data_seed)
        drop_last = False  # no batch is short: each is as full as its rows allow

    def collate_or_fill(items: Sequence) -> Batch:
        return collate(items) if items else placeholder(collate([dataset[0]]))

    options = {
        name: getattr(args, f"dataloader_{name}")
        for name in ("num_workers", "pin_memory", "persistent_workers", "multiprocessing_context", "prefetch_factor")
        if hasattr(args, f"dataloader_{name}")  # transformers 4 has no multiprocessing_context
    }
    rank, ranks = accelerator.process_index, accelerator.num_processes
    sampler = RankBatches(batches, rank, ranks, drop_last=drop_last)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_or_fill, **options)
    # One process as far as accelerate knows: it would share the batches out again.
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=accelerator.device_placement
    )
