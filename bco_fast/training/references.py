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

if TYPE_CHECKING:
    from .trainer import FeedbackTrainer

logger = logging.getLogger("bco_fast")


def attach_reference(
    trainer: FeedbackTrainer, datasets: Sequence[FeedbackDataset], ref_model: nn.Module | None
) -> FillReport:
    """Compute what the cache lacks, then read the log-probabilities of every row from it.

    Args:
        trainer: whose model is the reference (of an adapted model its base), unless `ref_model` is given.
        datasets: filled in place: `ref_logps`, `ref_token_logps` and `mismatched`, where the objective reads them.
    """
    args, objective = trainer.args, trainer.objective
    for dataset in datasets:
        if objective.mismatched and dataset.mismatched is None:
            limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
            dataset.mismatched = mismatched(dataset, **limits)
    parts = [part for d in datasets for part in (d, d.mismatched) if part is not None]
    name = trainer.identity
    if ref_model is None:
        reference = trainer.accelerator.unwrap_model(trainer.model)
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in reference.modules()):
            logger.warning("the model has dropout: rewards start noisy, because the reference is computed without it")
    else:
        reference = patch_model(ref_model, backend=args.backend, workspace_bytes=args.workspace_bytes).to(args.device)
        if knows_segments(trainer.accelerator.unwrap_model(trainer.model).config):
            use_segments(reference)
        name = trainer.reference_identity = reference_id(reference, autocast=trainer.accelerator.mixed_precision)
    cache = ReferenceCache(args.cache_dir or default_cache_dir(), name)
    report = fill(
        cache,
        [example for part in parts for example in part.examples],
        reference,
        pad_token_id=trainer.pad_token_id,
        tokens_per_batch=args.reference_tokens_per_batch,
        autocast=trainer.accelerator.autocast(),
        progress=not args.disable_tqdm and trainer.accelerator.is_local_main_process,
        layout=trainer.layout,
    )
    logger.info("reference: %s (%s)", report, cache.folder)
    for part in parts:
        keys = [example.key for example in part.examples]
        part.ref_logps = cache.sums(keys)
        if objective.per_token:
            part.ref_token_logps = [cache.token_logps(key) for key in keys]
    return report
