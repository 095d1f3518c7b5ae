"""`FeedbackTrainer`: the Hugging Face Trainer with a loss on thumbs up and down, and a reference read from disk."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data.batch import collate, collate_packed, completion_lengths, sequence_sums
from ..data.chat import with_template
from ..data.dataset import FeedbackDataset
from ..data.samplers import StratifiedSampler, TokenBudgetSampler, balancing_weights, mismatched, oversample
from ..data.tokenize import load_feedback
from ..head.types import HeadStats
from ..losses.metrics import auc, unpaired_metrics, unpaired_sums
from ..losses.output import LossOutput, reduction_weights, token_weights
from ..losses.reward_shift import RewardShift
from ..models.load import add_adapter, load_model
from ..models.memory import chunk_mlps, offload_activations
from ..models.patch import HeadOutput, completion_logps, forward_logps, logp_budget, patch_model
from ..reference.cache import ReferenceCache, default_cache_dir
from ..reference.fill import FillReport, fill
from ..reference.identity import reference_id
from .checks import check_packing
from .config import FeedbackConfig
from .record import RunRecorder
from .resume import WholeCheckpoints

logger = logging.getLogger("bco_fast")


def _all_reduce(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class _FeedbackState(TrainerCallback, ExportableState):
    """δ and the sums of the current logging window: moved by training, saved with every checkpoint, restored on resume.

    The Trainer writes the state of its callbacks into trainer_state.json but does not read it back, and forgets the
    losses of the window that a checkpoint falls into; so the window's loss is kept here as well.
    """

    restores_itself = True

    def __init__(self, shift: RewardShift):
        self.shift = shift
        self.head = HeadStats()
        self.sums: Tensor | None = None

    def add(self, loss: Tensor, steps: int, kl: Tensor | float, sums: Tensor) -> None:
        """One micro-batch: its part of the step's loss, 1 and z_ref if a step begins with it, its `unpaired_sums`."""
        head = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=sums.device) for x in (loss, steps, kl)])
        sums = torch.cat([head, sums.new_zeros(3, dtype=torch.float64), sums])
        self.add_backward()
        self.sums = sums if self.sums is None else self.sums + sums

    def add_backward(self) -> None:
        """What the last backward of a sparse head said of itself; once."""
        if self.sums is not None and self.head.kept_fraction is not None:
            self.sums[3:6] += torch.tensor(
                [self.head.kept_fraction, self.head.error_bound, 1.0], dtype=torch.float64
            ).to(self.sums)
            self.head.clear()

    def take(self, device: torch.device) -> Tensor | None:
        """The window's sums over all ranks (loss, steps, z_ref, three of the sparse head, `unpaired_sums`); the next window
        starts empty.

        Every rank must call it: one that had no micro-batch since the last call adds zeros.
        """
        empty = torch.zeros(15, dtype=torch.float64, device=device)
        self.add_backward()
        sums, self.sums = empty if self.sums is None else self.sums, None
        sums = _all_reduce(sums)
        return sums if sums[1] > 0 else None

    def on_step_end(self, args, state, control, **kwargs):
        self.shift.step()

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and saved["attributes"]:
            self.shift.load_state_dict(saved["attributes"]["shift"])
            sums = saved["attributes"]["sums"]
            self.sums = None if sums is None else torch.tensor(sums, dtype=torch.float64, device=args.device)

    def state(self) -> dict:
        self.add_backward()
        sums = None if self.sums is None else self.sums.tolist()
        return {"args": {}, "attributes": {"shift": self.shift.state_dict(), "sums": sums}}


@dataclass
class _Step:
    """What a micro-batch must know of the whole optimizer step it belongs to, over all ranks."""

    batches: list[dict[str, Tensor]]
    """This rank's micro-batches."""
    counts: Tensor  # [3] float64: thumbs up, thumbs down, tokens of thumbs up; of pairs: pairs, 0, tokens
    kl: Tensor | None = None
    """Mean log-ratio of the mismatched completions, once it was computed."""


class FeedbackTrainer(WholeCheckpoints, Trainer):
    """Train a causal language model from thumbs up and down, scores or pairs.

    The reference log-probabilities come from the cache: what it lacks is computed before training, with `ref_model` or,
    without one, with `model` as it is passed in. No reference model is in memory during training.

    The loss of an optimizer step is the objective's loss of all its rows together, whatever their number is in a
    micro-batch or on a rank: class sizes and KTO's z_ref are known before its first micro-batch.

    Args:
        model: a Hugging Face causal language model, or the path of one.
        args: a `FeedbackConfig`.
        train_dataset, eval_dataset: what `read_rows` takes (a file, a Hub name, a `datasets.Dataset`, an iterable of
            dicts), or a `FeedbackDataset`.
        processing_class: the tokenizer.
        ref_model: the reference, if it is not `model` itself; used in this constructor only.
        peft_config: a `peft` config; the model is wrapped in that adapter, and its base is the reference.
        **kwargs: of `transformers.Trainer`.

    Raises:
        FeedbackError: a row of feedback cannot be used.
        CacheError: the reference cache does not fit the model.
        TypeError, ValueError: the model cannot be patched (see `patch_model`).
    """

    def __init__(
        self,
        model: nn.Module | str,
        args: FeedbackConfig,
        train_dataset: str | os.PathLike | Iterable[Mapping] | FeedbackDataset | None = None,
        eval_dataset: str | os.PathLike | Iterable[Mapping] | FeedbackDataset | None = None,
        processing_class=None,
        ref_model: nn.Module | None = None,
        peft_config=None,
        **kwargs,
    ):
        if not isinstance(args, FeedbackConfig):
            raise TypeError(f"args must be a FeedbackConfig, not {type(args).__name__}")
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the tokenizer")
        processing_class = with_template(processing_class, args.chat_template)
        if isinstance(model, (str, os.PathLike)):
            model = load_model(model, args)
        if (args.use_peft or peft_config is not None) and not hasattr(model, "peft_config"):
            model = add_adapter(model, args, peft_config)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.objective = args.objective
        self.tokenize = functools.partial(
            load_feedback,
            tokenizer=processing_class,
            needs=self.objective.data,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            on_bad_row=args.on_bad_row,
            columns=args.columns,
            score_scale=args.score_scale,
            progress=not args.disable_tqdm,
        )
        self.pad_token_id = processing_class.pad_token_id
        if self.pad_token_id is None:
            self.pad_token_id = processing_class.eos_token_id
        train_dataset = self._dataset(train_dataset, args, pairing_ratio=args.pairing_ratio)
        eval_dataset = self._dataset(eval_dataset, args)
        self.class_weights = (1.0, 1.0)
        if train_dataset is not None:
            if args.oversample:
                train_dataset = oversample(train_dataset, args.seed)
            self.class_weights = self._class_weights(train_dataset, args)
        self._check_positions(model, args.max_length)
        self.feedback = _FeedbackState(args.new_shift())
        patch_model(
            model,
            backend=args.backend,
            workspace_bytes=args.workspace_bytes,
            sparse_tolerance=args.sparse_tolerance,
            stats=self.feedback.head if args.sparse_tolerance else None,
        )
        if args.mlp_chunk_tokens is not None:
            logger.info(
                "%d MLPs run over %d tokens at a time", chunk_mlps(model, args.mlp_chunk_tokens), args.mlp_chunk_tokens
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None)
            or functools.partial(collate_packed if args.padding_free else collate, pad_token_id=self.pad_token_id),
            compute_metrics=kwargs.pop("compute_metrics", None) or self._eval_metrics,
            **kwargs,
        )
        # The Trainer would count tokens otherwise; `get_batch_samples` counts what the objectives need.
        self.model_accepts_loss_kwargs = False
        self.label_names = ["label"]
        self.recorder = RunRecorder(train_dataset, eval_dataset)
        self.add_callback(self.feedback)
        self.add_callback(self.recorder)
        datasets = [dataset for dataset in (train_dataset, eval_dataset) if dataset is not None]
        self._attach_reference(ref_model, datasets)
        if args.padding_free and datasets:
            items = [datasets[0].item(i) for i in range(min(3, len(datasets[0].examples)))]
            check_packing(self.accelerator.unwrap_model(self.model), items, self.pad_token_id)

    # ---- data

    def _dataset(self, source, args: FeedbackConfig, **options) -> FeedbackDataset | None:
        """Tokenized, of the kind the objective reads, and with mismatched completions for kto."""
        if source is None:
            return None
        dataset = source if isinstance(source, FeedbackDataset) else self.tokenize(source, **options)
        if dataset.paired is not (self.objective.data == "pairs"):
            raise ValueError(
                f"{args.loss_type} reads {self.objective.data}, and the dataset was loaded "
                f"{'as' if dataset.paired else 'without'} pairs: load_feedback(..., needs={self.objective.data!r})"
            )
        return dataset

    @staticmethod
    def _class_weights(dataset: FeedbackDataset, args: FeedbackConfig) -> tuple[float, float]:
        if args.desirable_weight != "auto":
            return args.desirable_weight, args.undesirable_weight
        weights = balancing_weights([example.label for example in dataset.examples])
        logger.info("desirable_weight=auto: thumbs up weigh %.4g, thumbs down %.4g", *weights)
        return weights

    @staticmethod
    def _check_positions(model: nn.Module, max_length: int) -> None:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions and max_length > positions:
            raise ValueError(f"max_length is {max_length}, but the model has {positions} positions")

    def _attach_reference(self, ref_model: nn.Module | None, datasets: list[FeedbackDataset]) -> None:
        """Fill the cache and put the reference's log-probabilities beside every row."""
        self.reference_report = FillReport(0, 0, 0, 0.0)
        self._own_reference = self.objective.reference and ref_model is None
        if not self.objective.reference or not datasets:
            return
        limits = {"max_length": self.args.max_length, "max_prompt_length": self.args.max_prompt_length}
        for dataset in datasets:
            if self.args.loss_type == "kto" and dataset.mismatched is None:
                dataset.mismatched = mismatched(dataset, **limits)
        parts = [part for d in datasets for part in (d, d.mismatched) if part is not None]
        reference = self.accelerator.unwrap_model(self.model) if ref_model is None else ref_model
        if ref_model is not None:
            patch_model(ref_model, backend=self.args.backend, workspace_bytes=self.args.workspace_bytes)
            ref_model.to(self.args.device)
        elif any(isinstance(m, nn.Dropout) and m.p > 0 for m in reference.modules()):
            logger.warning("the model has dropout: rewards start noisy, because the reference is computed without it")
        name = reference_id(reference, autocast=self.accelerator.mixed_precision)
        # Of an adapted model the reference is the base; several ranks share the missing rows.
        cache = ReferenceCache(self.args.cache_dir or default_cache_dir(), name)
        self.reference_report = fill(
            cache,
            [example for part in parts for example in part.examples],
            reference,
            pad_token_id=self.pad_token_id,
            tokens_per_batch=self.args.reference_tokens_per_batch,
            autocast=self.accelerator.autocast(),
            progress=not self.args.disable_tqdm and self.accelerator.is_local_main_process,
        )
        logger.info("reference: %s (%s)", self.reference_report, cache.folder)
        for part in parts:
            keys = [example.key for example in part.examples]
            part.ref_logps = cache.sums(keys)
            if self.args.loss_type == "bnf":
                part.ref_token_logps = [cache.token_logps(key) for key in keys]

    def train(self, resume_from_checkpoint=None, **kwargs):
        if not resume_from_checkpoint:
            self._check_start()
        return super().train(resume_from_checkpoint, **kwargs)

    @torch.no_grad()
    def _check_start(self) -> None:
        """Before the first step policy and reference are one model, so every reward is 0 but for rounding (DESIGN §4).

        Raises:
            ValueError: they are not: the batches of training and those of the reference disagree.
        """
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not self._own_reference or self.train_dataset is None or sharded:
            return
        model, dataset = self.accelerator.unwrap_model(self.model), self.train_dataset
        few = [dataset[i] for i in range(min(4, len(dataset)))]
        batch = self._prepare_inputs(self.data_collator(few))
        model.eval()
        with self.compute_loss_context_manager():
            ratios = sequence_sums(completion_logps(model, batch), batch) - batch["ref_logps"]
        largest = float((ratios / completion_lengths(batch)).abs().max())
        budget = logp_budget(model, autocast=self.accelerator.mixed_precision != "no")
        logger.info("step 0: policy and reference differ by %.1e nats per token at most (budget %.0e)", largest, budget)
        if largest <= budget:
            return
        text = f"before training policy and reference differ by {largest:.2g} nats per token, more than rounding ({budget:g})"
        if hasattr(model, "disable_adapter"):
            logger.warning("%s: the adapter is not a fresh one, so rewards do not start at 0", text)
            return
        raise ValueError(
            f"{text}: the model computes other values in training batches than alone. Pass ref_model= if the reference is another model."
        )

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        self.create_model_card(output_dir=output_dir)

    def create_model_card(self, *args, output_dir=None, **kwargs):
        """README.md of a folder with a model; what the arguments of the Trainer's say, ours finds by itself."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.recorder.write_card(folder, self.args, self.state, self.accelerator.unwrap_model(self.model))

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._dataset(eval_dataset, self.args)
            if self.objective.reference and eval_dataset.ref_logps is None:
                raise ValueError(
                    "eval_dataset has no reference log-probabilities: pass it to the constructor, where the reference "
                    "model is at hand"
                )
        return super().get_eval_dataloader(eval_dataset)

    def get_train_dataloader(self):
        if self.args.tokens_per_batch is None:
            return super().get_train_dataloader()
        dataset, args = self.train_dataset, self.args
        order = self._get_train_sampler()
        if isinstance(order, torch.utils.data.RandomSampler):
            order.generator = torch.Generator().manual_seed(args.data_seed)
        sides = 2 if dataset.paired else 1
        lengths = [len(example) for example in dataset.examples]
        sampler = TokenBudgetSampler(
            [sum(lengths[i : i + sides]) if args.padding_free else max(lengths[i : i + sides]) * sides for i in range(0, len(lengths), sides)],
            order,
            args.tokens_per_batch,
            padded=not args.padding_free,
            seed=args.data_seed,
            ranks=self.accelerator.num_processes,
        )  # fmt: skip
        self.accelerator.even_batches = False  # the sampler has made them even
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(
                dataset,
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
            )
        )

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.batch_composition == "stratified" and dataset is not None:
            return StratifiedSampler([example.label for example in dataset.examples], self.args.data_seed)
        return super()._get_train_sampler(train_dataset)

    # ---- the loss of a whole optimizer step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and in place of a number of tokens all that the losses need of it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        return batches, self._whole_step(batches)

    def _whole_step(self, batches: list[dict[str, Tensor]]) -> _Step:
        counts = sum(self._counts(batch) for batch in batches).to(self.args.device)
        return _Step(batches, _all_reduce(counts))

    def _counts(self, batch: dict[str, Tensor]) -> Tensor:  # [3]
        up, lengths = batch["label"], completion_lengths(batch)
        down = torch.zeros_like(up) if self.objective.data == "pairs" else ~up
        return torch.stack([up.sum(), down.sum(), (lengths * up).sum()]).double()

    def _weights(self, labels: Tensor, weight: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
        """What each example's cost is multiplied by: the step's loss is the sum of these products."""
        if self.args.loss_type == "sft":
            return token_weights(labels, lengths, weight, counts[2])
        up, down = self.class_weights
        weight = weight.double() * torch.where(labels, up, down)
        return reduction_weights(labels, weight, self.args.reduction, counts[0], counts[1])

    @torch.no_grad()
    def _mean_kl(self, model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
        """Mean log-ratio of the mismatched completions of these batches, on all ranks: KTO's z_ref before the clamp."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            kl = self._prepare_inputs({name[3:]: x for name, x in batch.items() if name.startswith("kl_")})
            ratios = sequence_sums(completion_logps(model, kl), kl) - kl["ref_logps"]
            total += torch.stack([ratios.double().sum(), torch.full_like(total[0], len(ratios))])
        total = _all_reduce(total)
        return (total[0] / total[1]).float()

    def _run_objective(
        self, model: nn.Module, inputs: dict[str, Tensor], kl: Tensor | None, observe: bool
    ) -> tuple[LossOutput, Tensor | None]:
        """The objective on one micro-batch, and a mixture of experts' own loss. `observe`: the shift sees the rewards."""
        head = forward_logps(model, inputs, return_entropy=self.args.loss_type == "bnf")
        return self._objective(head, inputs, kl, observe), head.aux_loss

    def _objective(self, head: HeadOutput, inputs: dict[str, Tensor], kl: Tensor | None, observe: bool) -> LossOutput:
        labels, loss, args = inputs["label"], self.objective.loss, self.args
        if args.loss_type == "bnf":
            parts = (head.logps, inputs["ref_token_logps"], inputs["targets"] >= 0, head.entropy)
            packed = {"cu_seqlens": inputs["cu_seqlens"]} if "cu_seqlens" in inputs else {}
            logps, refs, mask, entropy = (part[0] for part in parts) if packed else parts
            return loss(logps, refs, labels, mask=mask, entropy=entropy, **packed)
        logps, lengths = sequence_sums(head.logps, inputs), completion_lengths(inputs)
        options = {keyword: getattr(args, name) for name, keyword in self.objective.options.items()}
        if args.beta is not None:
            options["beta"] = args.beta
        if self.objective.data == "pairs":
            if self.objective.lengths or args.length_normalized:
                options["chosen_lengths"], options["rejected_lengths"] = lengths.chunk(2)
            references = inputs["ref_logps"].chunk(2) if self.objective.reference else ()
            return loss(*logps.chunk(2), *references, **options)
        if args.loss_type == "sft":
            return loss(logps, labels, lengths)
        if args.loss_type == "kto":
            options["kl"] = kl
        if self.objective.shift:
            options["delta"] = self.feedback.shift
            if observe:
                rewards = args.beta * (logps.detach() - inputs["ref_logps"])
                offset = inputs["score"] if self.objective.data == "rewards" else 0.0
                self.feedback.shift.observe(rewards - offset, labels)
        return loss(
            logps, inputs["ref_logps"], labels if self.objective.data == "labels" else inputs["score"], **options
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = isinstance(num_items_in_batch, _Step)
        step = num_items_in_batch if training else _Step([inputs], self._counts(inputs))
        first = step.kl is None
        if first:
            step.kl = self._mean_kl(model, step.batches) if self.args.loss_type == "kto" else torch.zeros(())
        offload = self.args.activation_offloading and torch.is_grad_enabled()
        with offload_activations() if offload else contextlib.nullcontext():
            out, aux_loss = self._run_objective(model, inputs, step.kl, observe=torch.is_grad_enabled())
        items = len(out.per_example)
        weights = self._weights(
            inputs["label"][:items], inputs["weight"][:items], completion_lengths(inputs)[:items], step.counts
        )  # fmt: skip
        loss = (out.per_example * weights).sum()
        if torch.is_grad_enabled():
            kl = step.kl.clamp(min=0) if first else 0.0
            self.feedback.add(loss.detach(), int(first), kl, out.sums)
        loss = loss.to(out.per_example.dtype)
        if training:
            # The Trainer is about to divide by the micro-batches, and data parallelism by the ranks; our weights have
            # divided already.
            loss = loss * (self.current_gradient_accumulation_steps * self.accelerator.num_processes)
        if aux_loss is not None:  # a mean over tokens, so what divides it is right
            loss = loss + self._aux_weight * aux_loss.to(loss.device)
        return (loss, out) if return_outputs else loss

    @property
    def _aux_weight(self) -> float:
        return float(getattr(self.accelerator.unwrap_model(self.model).config, "router_aux_loss_coef", 0.0))

    # ---- evaluation and logging

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            kl = self._mean_kl(model, [inputs]) if self.args.loss_type == "kto" else None
            out, _ = self._run_objective(model, inputs, kl, observe=False)
        if prediction_loss_only:
            return out.loss, None, None
        sides = 2 if out.paired else 1
        columns = [
            out.rewards,
            out.logps,
            out.per_example.repeat(sides),
            torch.as_tensor(out.threshold, device=out.rewards.device).expand(len(out.rewards)),
            inputs["weight"],
            completion_lengths(inputs),
        ]
        rows = torch.stack([column.detach().double() for column in columns], dim=-1)  # [sides * B, 6]
        # One row of the result per item of the dataset, so that gathering can drop what padded the last batch. The loss
        # is left to `_eval_metrics`, which knows the class sizes of the whole set.
        return None, torch.stack(rows.chunk(sides), dim=1), torch.stack(out.labels.chunk(sides), dim=1)

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        columns = torch.from_numpy(prediction.predictions)  # [items, sides, 6]
        labels = torch.from_numpy(prediction.label_ids)  # [items, sides]
        self.recorder.keep(columns, labels)
        items, paired = len(columns), columns.shape[1] == 2
        rewards, logps, cost, threshold, weight, lengths = columns.transpose(0, 1).flatten(0, 1).unbind(-1)
        labels = labels.T.flatten()
        sums = unpaired_sums(rewards, logps, labels, threshold, paired=paired)
        counts = torch.stack([sums[0], 0 * sums[1] if paired else sums[1], (lengths * labels).sum()])
        weights = self._weights(labels[:items], weight[:items], lengths[:items], counts)
        metrics = {
            "loss": (cost[:items] * weights).sum(),
            **unpaired_metrics(sums),
            "rewards/auc": auc(rewards, labels),
            "delta": self._delta(),
        }
        return _present(metrics)

    def _delta(self) -> float:
        return float(self.feedback.shift.value) if self.objective.shift else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training line; evaluation logs eval_loss
            sums = self.feedback.take(self.args.device)
            if sums is not None:
                steps = sums[1] / self.accelerator.num_processes
                logs["loss"] = float(sums[0] / steps)
                logs.update(_present(unpaired_metrics(sums[6:])))
                logs["delta"] = self._delta()
                if sums[5] > 0:
                    logs["head/rho"], logs["head/certified"] = (sums[3:5] / sums[5]).tolist()
                if self.args.loss_type == "kto":
                    logs["kl"] = float(sums[2] / sums[1])
        super().log(logs, start_time)


def _present(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """As floats, without those of a class that was absent."""
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}
