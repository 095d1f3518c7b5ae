"""Puts the reference's log-probabilities beside every row of the trainer's datasets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..data.dataset import FeedbackDataset
from ..data.samplers import mismatched
from ..models.attention import knows_segments, use_segments
from ..models.patch import patch_model
from ..reference.cache import ReferenceCache, default_cache_dir
from ..reference.fill import FillReport, fill
from ..reference.identity import reference_id
from ..reference.ranks import gather_objects, own_rank
from .processes import RanksDisagree, check_ranks

if TYPE_CHECKING:
    from .trainer import FeedbackTrainer

logger = logging.getLogger("bco_fast")


class Reference:
    """The reference of a trainer's datasets. Its log-probabilities are attached to their rows by `fill`.

    Whose weights it is gets decided here, before they are sharded: FSDP and ZeRO-3 leave no rank with all of them, and
    efficient loading gives them to rank 0 only.

    Args:
        trainer: whose model is the reference (of an adapted model its base), unless `ref_model` is given.
        datasets: filled in place: `ref_logps`, `ref_token_logps` and `mismatched`, where the objective reads them.

    Raises:
        RanksDisagree: the ranks have different weights.
    """

    def __init__(self, trainer: FeedbackTrainer, datasets: Sequence[FeedbackDataset], ref_model: nn.Module | None):
        self.trainer, args = trainer, trainer.args
        for dataset in datasets:
            if trainer.objective.mismatched and dataset.mismatched is None:
                limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
                dataset.mismatched = mismatched(dataset, **limits)
        self.parts = [part for d in datasets for part in (d, d.mismatched) if part is not None]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        self.model = policy
        if ref_model is not None:
            self.model = patch_model(ref_model, backend=args.backend, workspace_bytes=args.workspace_bytes).to(
                args.device
            )
            if knows_segments(policy.config):
                use_segments(self.model)
        elif any(isinstance(m, nn.Dropout) and m.p > 0 for m in policy.modules()):
            logger.warning("the model has dropout: rewards start noisy, because the reference is computed without it")
        self.sharded = self.pending = trainer.sharded and ref_model is None
        """Sharded: all ranks `fill` in lockstep; pending: once the trainer has put the model on its devices."""
        name = None
        if own_rank() == 0 or not self.sharded:
            name = reference_id(self.model, autocast=trainer.accelerator.mixed_precision)
        names = gather_objects(name)
        other = next((rank for rank, found in enumerate(names) if found not in (None, names[0])), None)
        if other is not None:
            raise RanksDisagree(f"rank {other} has a reference model with other weights than rank 0")
        self.name = names[0]
        self.cache = ReferenceCache(args.cache_dir or default_cache_dir(), self.name)

    def fill(self, model: nn.Module | None = None) -> FillReport:
        """Compute what the cache lacks, then read the log-probabilities of every row from it.

        Args:
            model: the policy as it was sharded; by default the reference as it was given.
        """
        trainer = self.trainer
        args = trainer.args
        report = fill(
            self.cache,
            [example for part in self.parts for example in part.examples],
            self.model if model is None else model,
            pad_token_id=trainer.pad_token_id,
            tokens_per_batch=args.reference_tokens_per_batch,
            autocast=trainer.accelerator.autocast(),
            progress=not args.disable_tqdm and trainer.accelerator.is_local_main_process,
            layout=trainer.layout,
            lockstep=self.sharded,
        )
        logger.info("reference: %s (%s)", report, self.cache.folder)
        self.attach()
        self.model, self.pending = None, False
        return report

    def attach(self) -> None:
        """Read what the cache has; rows that it lacks get NaN."""
        for part in self.parts:
            keys = [example.key for example in part.examples]
            part.ref_logps = self.cache.sums(keys)
            if self.trainer.objective.per_token and part.has_reference:
                part.ref_token_logps = [self.cache.token_logps(key) for key in keys]


def prepare_reference(
    trainer: FeedbackTrainer, datasets: Sequence[FeedbackDataset], ref_model: nn.Module | None
) -> Reference | None:
    """Compare the ranks, identify the models, and fill the cache unless that must wait for the sharded model.

    Sets the trainer's `identity` (of its model as it came in), `reference_identity` (of `ref_model`) and, where the cache
    was filled, `reference_report`.

    Raises:
        RanksDisagree: the ranks have different rows, options, versions or weights, or no common cache folder.
    """
    args = trainer.args
    trainer.identity = trainer.reference_identity = None
    needed = trainer.objective.reference and bool(datasets)
    check_ranks(datasets, args, args.cache_dir or default_cache_dir() if needed else None)
    if not needed:
        reference = None
    else:
        reference = Reference(trainer, datasets, ref_model)
        if ref_model is None:
            trainer.identity = reference.name
        else:
            trainer.reference_identity = reference.name
        if reference.pending:
            reference.attach()  # what the cache has, for an evaluation before training
        else:
            trainer.reference_report = reference.fill()
    if trainer.identity is None and not trainer.sharded:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trainer.identity = reference_id(policy, autocast=trainer.accelerator.mixed_precision)
    return reference
