"""The batches that a rank trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from ..data.batch import Batch, Layout, placeholder
from ..data.samplers import RankBatches, TokenBudgetSampler
from .checks import CHECKED_ITEMS
from .config import FeedbackConfig

if TYPE_CHECKING:
    from .trainer import FeedbackTrainer


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
    batches, drop_last = _batches(dataset, order, args, layout)

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


def _batches(dataset, order: Sampler, args: FeedbackConfig, layout: Layout) -> tuple[Sampler, bool]:
    """The batches of all ranks in turn, and whether the last ones are left out where they are too few for all ranks."""
    if isinstance(order, RandomSampler):  # whose order would follow torch's seed of the moment
        order = SeedableRandomSampler(dataset, data_seed=args.data_seed)
    if args.tokens_per_batch is None:
        return BatchSampler(
            order, args.per_device_train_batch_size, args.dataloader_drop_last
        ), args.dataloader_drop_last
    # no batch is short: each is as full as its rows allow
    return TokenBudgetSampler(dataset.sides, order, args.tokens_per_batch, layout=layout, seed=args.data_seed), False


def items_of_all_steps(trainer: FeedbackTrainer) -> list[int] | None:
    """The items of the training dataset that `max_steps` steps read, and the first ones, which are checked before them.

    None where that is more than half of the dataset, or cannot be known before training.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if dataset is None or args.max_steps <= 0 or args.auto_find_batch_size:
        return None
    batches, _ = _batches(dataset, trainer._get_train_sampler(), args, trainer.layout)
    wanted = args.max_steps * args.gradient_accumulation_steps * args.world_size
    if wanted >= len(batches):
        return None
    first = range(min(CHECKED_ITEMS, len(dataset)))
    items = sorted({*first, *(item for batch in islice(batches, wanted) for item in batch)})
    return items if 2 * len(items) <= len(dataset) else None
