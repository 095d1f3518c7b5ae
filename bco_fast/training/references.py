"""Puts the reference's log-probabilities beside every row of the trainer's datasets."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ..data.dataset import FeedbackDataset
from ..data.samplers import mismatched
from ..data.sources import one_line
from ..models.attention import base_attention, knows_segments, use_segments
from ..models.load import read_weights
from ..models.patch import patch_model
from ..reference.adapter import load_reference_adapter
from ..reference.cache import ReferenceCache, ReferenceId, default_cache_dir
from ..reference.fill import FillReport, fill
from ..reference.identity import reference_id
from ..reference.ranks import gather_objects, own_rank
from .loader import items_of_all_steps
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
        self.parts = self._parts(datasets)
        self.items = items_of_all_steps(trainer)
        """Of the training dataset, those that training reads; None for all, or nearly all."""
        policy = trainer.accelerator.unwrap_model(trainer.model)
        self.model = policy
        self.adapter = args.ref_adapter is not None
        """The reference is `ref_model` with its adapter."""
        if ref_model is not None:
            self.model = self._ready(ref_model)
        elif any(isinstance(m, nn.Dropout) and m.p > 0 for m in policy.modules()):
            logger.warning("the model has dropout: rewards start noisy, because the reference is computed without it")
        self._given = weakref.ref(self.model)
        config = self.model.config
        self._checkpoint = {
            "path": getattr(config, "_name_or_path", ""),
            "dtype": next(self.model.parameters()).dtype,
            "attn_implementation": base_attention(config),
        }
        self.sharded = trainer.sharded and ref_model is None
        self.pending = self.sharded and bool(self.parts)
        """Sharded: all ranks `fill` in lockstep; pending: once the trainer has put the model on its devices."""
        name = None
        if own_rank() == 0 or not self.sharded:
            name = self._identify(self.model)
        names = gather_objects(name)
        other = next((rank for rank, found in enumerate(names) if found not in (None, names[0])), None)
        if other is not None:
            raise RanksDisagree(f"rank {other} has a reference model with other weights than rank 0")
        self.name = names[0]
        self.cache = ReferenceCache(args.cache_dir or default_cache_dir(), self.name)

    def _identify(self, model: nn.Module) -> ReferenceId:
        return reference_id(model, autocast=self.trainer.accelerator.mixed_precision, adapter=self.adapter)

    def _parts(self, datasets: Sequence[FeedbackDataset]) -> list[FeedbackDataset]:
        """The datasets and, where the objective reads them, their mismatched completions."""
        args = self.trainer.args
        for dataset in datasets:
            if self.trainer.objective.mismatched and dataset.mismatched is None:
                limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
                dataset.mismatched = mismatched(dataset, **limits)
        return [part for d in datasets for part in (d, d.mismatched) if part is not None]

    def _ready(self, model: nn.Module) -> nn.Module:
        """Another model than the policy, patched, on the device, with the policy's attention."""
        args, trainer = self.trainer.args, self.trainer
        model = patch_model(model, backend=args.backend, workspace_bytes=args.workspace_bytes).to(args.device)
        if knows_segments(trainer.accelerator.unwrap_model(trainer.model).config):
            use_segments(model)
        return model

    def fill(self, model: nn.Module | None = None) -> FillReport:
        """Compute what the cache lacks, then read the log-probabilities of every row from it.

        Args:
            model: the policy as it was sharded; by default the reference as it was given.
        """
        trainer = self.trainer
        args = trainer.args
        report = fill(
            self.cache,
            [part.examples[i] for part in self.parts for i in self._wanted(part)],
            self.model if model is None else model,
            pad_token_id=trainer.pad_token_id,
            tokens_per_batch=args.reference_tokens_per_batch,
            autocast=trainer.accelerator.autocast(),
            progress=not args.disable_tqdm and trainer.accelerator.is_local_main_process,
            layout=trainer.layout,
            lockstep=self.sharded,
            adapter=self.adapter,
        )
        if self.items is not None:
            most = f"{len(self.items)} of {len(trainer.train_dataset)} training rows"
            logger.info("reference: max_steps=%d reads %s, so only those are computed", args.max_steps, most)
        logger.info("reference: %s (%s)", report, self.cache.folder)
        self.attach()
        self.model, self.pending = None, False
        return report

    def add(self, dataset: FeedbackDataset) -> None:
        """Put the log-probabilities beside rows that the constructor has not seen.

        What the cache lacks is computed by the reference, as far as it can still be had: the policy without its adapter,
        or before training; `ref_model`, while its owner keeps it; else the checkpoint that the reference was loaded from.
        Its weights are compared with those of the constructor.

        Raises:
            ValueError: it cannot be had any more; says what to do.
        """
        args = self.trainer.args
        if dataset is self.trainer.train_dataset:
            self.items = None
        check_ranks([dataset], args, args.cache_dir or default_cache_dir())
        if not self.pending:
            self.parts = self._parts([dataset])
            self.cache.refresh()
            self.attach()
            if not all(part.has_reference for part in self.parts):
                self.fill(self._again())
        if not dataset.has_reference:
            raise ValueError(
                "the evaluation rows have no reference log-probabilities, and the model will be sharded: train first, or fill "
                "the cache with `bco-fast cache build`"
            )

    def _again(self) -> nn.Module:
        """The reference, after the constructor."""
        accelerator = self.trainer.accelerator
        if self.sharded:
            model = accelerator._models[-1] if accelerator._models else None
            model = getattr(model, "module", model)
            if _only_adapters_are_trained(model):
                return model
            raise ValueError(_GONE.format("the model is sharded, and its weights cannot be compared"))
        given = self._given()
        if given is not None and self._identify(given) == self.name:
            return given
        if self.adapter:
            model = self._ready(reference_adapter(self.trainer))
            if self._identify(model) == self.name:
                return model
            raise ValueError(_GONE.format(f"{self.trainer.args.ref_adapter} has changed since"))
        options = dict(self._checkpoint)
        path = options.pop("path")
        reason = "it has changed since, and it was not loaded from a checkpoint"
        if path:
            try:
                model = read_weights(path, self.trainer.args.trust_remote_code, local_files_only=True, **options)
            except (OSError, ValueError) as error:
                reason = f"{path} cannot be loaded again ({one_line(error)[:200]})"
            else:
                logger.info("reference: %s is loaded again for rows that the constructor has not seen", path)
                model = self._ready(model)
                if self._identify(model) == self.name:
                    return model
                reason = f"{path} has other weights than it had then"
        raise ValueError(_GONE.format(reason))

    def cover_steps(self) -> None:
        """Add the other training rows if steps, or an order, that were set after the trainer was made read more of them.

        Raises:
            ValueError: as `add`.
        """
        if self.items is None:
            return
        now = items_of_all_steps(self.trainer)
        if now is None or not set(now) <= set(self.items):
            self.items = now
            if not self.pending:
                self.add(self.trainer.train_dataset)

    def _wanted(self, part: FeedbackDataset) -> Iterable[int]:
        """Indices of its examples that training or evaluation reads."""
        train = self.trainer.train_dataset
        if self.items is None or train is None or not (part is train or part is train.mismatched):
            return range(len(part.examples))
        sides = 1 + train.paired
        return [sides * item + side for item in self.items for side in range(sides)]

    def attach(self) -> None:
        """Read what the cache has; rows that it lacks get NaN."""
        for part in self.parts:
            keys = [example.key for example in part.examples]
            part.ref_logps = self.cache.sums(keys)
            wanted = list(self._wanted(part))
            if self.trainer.objective.per_token and not np.isnan(part.ref_logps[wanted]).any():
                tokens = [np.empty(0, np.float32)] * len(keys)
                for i in wanted:
                    tokens[i] = self.cache.token_logps(keys[i])
                part.ref_token_logps = tokens


_GONE = (
    "these rows have no reference log-probabilities, and the reference model of the constructor is gone: {}. Pass the "
    "rows to the constructor as eval_dataset, or keep the reference and pass it as ref_model"
)


def reference_adapter(trainer: FeedbackTrainer) -> nn.Module:
    """The model of `ref_adapter`."""
    policy, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    if trainer.sharded:
        raise ValueError(
            "ref_adapter is loaded whole on every rank, which FSDP and DeepSpeed are there to avoid: train without them, or "
            "merge it by `bco-fast merge` and pass ref_model"
        )
    return load_reference_adapter("ref_adapter", args.ref_adapter, policy, args)


def _only_adapters_are_trained(model: nn.Module | None) -> bool:
    """Whether a PEFT model's base is as it was before training."""
    if not hasattr(model, "disable_adapter"):
        return False
    own = (f".{model.base_model.prefix}", ".modules_to_save.")
    return all(any(part in name for part in own) for name, p in model.named_parameters() if p.requires_grad)


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
    reference = None
    if needed and args.ref_adapter is not None:
        ref_model = reference_adapter(trainer)
    if needed or (trainer.objective.reference and ref_model is None and not trainer.sharded):
        reference = Reference(trainer, datasets, ref_model)
        if ref_model is None:
            trainer.identity = reference.name
        else:
            trainer.reference_identity = reference.name
        if reference.pending:
            reference.attach()  # what the cache has, for an evaluation before training
        elif needed:
            trainer.reference_report = reference.fill()
    if trainer.identity is None and not trainer.sharded:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trainer.identity = reference_id(policy, autocast=trainer.accelerator.mixed_precision)
    return reference
