"""`FeedbackTrainer`: the Hugging Face Trainer with a loss on thumbs up and down, and a reference read from disk."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, set_seed

from ..data.batch import Batch, collate
from ..data.chat import with_template
from ..data.dataset import FeedbackDataset
from ..data.samplers import GroupedSampler, StratifiedSampler, balancing_weights, oversample
from ..data.tokenizer import pad_or_eos
from ..losses import LossOutput
from ..models.memory import offloading
from ..models.patch import forward_logps
from ..reference.fill import FillReport
from . import checks
from .config import FeedbackConfig
from .evaluation import evaluation_metrics, evaluation_rows
from .evaluation_sets import EvaluationSets, as_list
from .loader import train_loader
from .memory_watch import MemoryWatch
from .policy import prepare_policy, replace_layers, tokenizer_of
from .processes import check_processes
from .record import RunRecorder
from .references import prepare_reference
from .resume import WholeCheckpoints
from .sharing import choose_layout
from .state import FeedbackState
from .step import Step, completion_sums, mismatched_log_ratios

logger = logging.getLogger("bco_fast")


class FeedbackTrainer(EvaluationSets, WholeCheckpoints, Trainer):
    """Train a causal language model from thumbs up and down, scores or pairs.

    The reference log-probabilities come from the cache. Missing ones are computed before training, with `ref_model` or,
    without one, with `model` as it is passed in. No reference model is in memory during training.

    The loss of an optimizer step is the objective's loss of all its rows together, however they are cut into
    micro-batches and spread over ranks (`training.step`).

    Args:
        model: a Hugging Face causal language model, or the path of one.
        args: a `FeedbackConfig`.
        train_dataset, eval_dataset: what `read_rows` takes (a file, a Hub name, a `datasets.Dataset`, an iterable of
            dicts), or a `FeedbackDataset`; eval_dataset also several by name.
        processing_class: the tokenizer; by default that of the model's checkpoint.
        ref_model: the reference, if it is not `model` itself. It is not kept; see `references.Reference.add`.
        peft_config: a `peft` config; the model is wrapped in that adapter, and its base is the reference.
        **kwargs: of `transformers.Trainer`. `compute_metrics` adds to our metrics, or replaces those of its names.

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
        eval_dataset: str | os.PathLike | Iterable[Mapping] | FeedbackDataset | Mapping[str, Iterable] | None = None,
        processing_class=None,
        ref_model: nn.Module | None = None,
        peft_config=None,
        **kwargs,
    ):
        checks.check_arguments(model, args, ref_model)
        tokenizer = with_template(processing_class or tokenizer_of(model, args), args.chat_template)
        self.objective, self.settings = args.objective, args.settings
        self.pad_token_id = pad_or_eos(tokenizer)
        train_dataset = self._dataset(train_dataset, args, tokenizer, pairing_ratio=args.pairing_ratio)
        eval_dataset = self._datasets(eval_dataset, args, tokenizer)
        if train_dataset is not None and args.oversample:
            train_dataset = oversample(train_dataset, args.seed)
        self.class_weights = _class_weights(train_dataset, args)
        self.weighting = {"reduction": args.reduction, "class_weights": self.class_weights}
        self.feedback = FeedbackState(args.new_shift(), self.objective.part_weights)
        self._users_metrics = kwargs.pop("compute_metrics", None)
        set_seed(args.seed)  # the Trainer seeds after a new adapter, or a missing weight, has been drawn
        super().__init__(
            model=prepare_policy(model, args, peft_config, stats=self.feedback.head),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=kwargs.pop("data_collator", None) or self._collate,
            compute_metrics=self._eval_metrics,
            **kwargs,
        )
        check_processes(args)
        self.sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # on its devices once training is prepared
        self.loss_is_scaled_for_ga = True  # `compute_loss` returns a part of the step's loss, not a mean
        self.model_accepts_loss_kwargs = True  # says the same to a Trainer that does not know the attribute above
        self.label_names = ["label"]
        self.recorder = RunRecorder(train_dataset, eval_dataset)
        self.add_callback(self.feedback)
        self.add_callback(self.recorder)
        self.memory = MemoryWatch(self)
        self.add_callback(self.memory)
        policy = self.accelerator.unwrap_model(self.model)
        self.recorder.record["liger"] = replace_layers(policy, args, sharded=self.sharded)
        datasets = [*as_list(train_dataset), *as_list(eval_dataset)]
        self.layout = choose_layout(policy, args, next(iter(datasets), None), self.pad_token_id, sharded=self.sharded)
        self._own_reference = self.objective.reference and ref_model is None and args.ref_adapter is None
        self.reference_report = FillReport(0, 0, 0, 0.0)
        self._reference = prepare_reference(self, datasets, ref_model)

    # ---- data

    def _collate(self, items) -> Batch:
        alone = self.args.gradient_accumulation_steps == 1  # z_ref is the step's, so it must not wait for other batches
        return collate(items, self.pad_token_id, layout=self.layout, continued=alone)

    def get_train_dataloader(self):
        order = self._get_train_sampler()
        return train_loader(self.train_dataset, order, self.args, self.accelerator, self.data_collator, self.layout)

    # Private to the Trainer, which has no public way to choose the order of rows.
    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.batch_composition == "stratified" and dataset is not None:
            return StratifiedSampler([example.label for example in dataset.examples], self.args.data_seed)
        if dataset is not None and (self.layout == "shared" or any(example.group for example in dataset.examples)):
            return GroupedSampler([sides[0].together for sides in dataset.sides], self.args.data_seed)
        return super()._get_train_sampler(train_dataset)

    # ---- one optimizer step

    def train(self, resume_from_checkpoint=None, **kwargs):
        if not resume_from_checkpoint:
            self._check_start()
        return super().train(resume_from_checkpoint, **kwargs)

    def create_scheduler(self, num_training_steps, optimizer=None):
        # The first moment at which a sharded model is on its devices, and the last before a checkpoint is loaded into it.
        if self._reference is not None and self._reference.pending and self.accelerator._models:
            model = self.accelerator._models[-1]
            self.reference_report = self._reference.fill(getattr(model, "module", model))
        return super().create_scheduler(num_training_steps, optimizer)

    @torch.no_grad()
    def _check_start(self) -> None:
        if not self._own_reference or self.train_dataset is None or self.sharded:
            return
        batch = self._prepare_inputs(self.data_collator(checks.first_rows(self.train_dataset, self.args, self.layout)))
        model = self.accelerator.unwrap_model(self.model).eval()
        with self.compute_loss_context_manager():
            ratios = completion_sums(model, batch) - batch["ref_logps"]
        lengths = batch["cu_completions"].diff()
        checks.check_start(model, ratios, lengths, autocast=self.accelerator.mixed_precision != "no")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step and, in place of a number of tokens, what they must know of it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, Step.of(batches) if batches else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's part of the step's loss; a batch that comes without a step is one."""
        step = num_items_in_batch if isinstance(num_items_in_batch, Step) else Step.alone(inputs)
        begins, training = step.begin(model, mismatched=self.objective.mismatched), torch.is_grad_enabled()
        self.finite.begin(inputs["index"])
        with offloading(inputs["input_ids"].shape, self.args.activation_offloading and training):
            out, aux_loss = self._run(model, inputs, lambda: step.reference_point(model), observe=training)
        costs = out.per_example * self.objective.weights(inputs, step.counts, **self.weighting)
        filled = "placeholder" not in inputs
        if training:
            z_ref = step.z_ref.clamp(min=0) if begins and step.z_ref is not None else None
            self.feedback.add(costs.detach(), out.sums if filled else None, z_ref, begins_step=begins)
            if filled:
                self.finite.loss(out.per_example, inputs["index"], self.state.global_step + 1)
        loss = costs.sum().to(out.per_example.dtype)
        if aux_loss is not None:  # a mean over the tokens of a micro-batch
            loss = loss + filled * self._aux_weight * aux_loss.to(loss.device) / step.micro_batches
        if step is num_items_in_batch:
            loss = loss * self.accelerator.num_processes  # data parallelism takes the mean of the ranks' gradients
        return (loss, out) if return_outputs else loss

    def _run(
        self, model: nn.Module, batch: Batch, z_ref: Callable[[], Tensor], observe: bool
    ) -> tuple[LossOutput, Tensor | None]:
        """The objective on one batch, and the load-balancing loss of a mixture of experts."""
        head = forward_logps(model, batch, return_entropy=self.objective.per_token)
        filled = "placeholder" not in batch
        out = self.objective.run(
            head.logps, batch, self.settings, entropy=head.entropy, z_ref=z_ref() if self.objective.mismatched else None,
            shift=self.feedback.shift, observe=observe and filled, class_weights=self.class_weights,
        )  # fmt: skip
        if observe and not filled and self.objective.shift:  # no rewards, but the other ranks' all-reduce waits for us
            self.feedback.shift.observe(out.rewards[:0], batch["label"][:0])
        return out, head.aux_loss

    @property
    def _aux_weight(self) -> float:
        return float(getattr(self.accelerator.unwrap_model(self.model).config, "router_aux_loss_coef", 0.0))

    # ---- evaluation, logging, saving

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            ratios = functools.cache(lambda: mismatched_log_ratios(model, inputs))  # once the batch itself has run
            out, _ = self._run(model, inputs, lambda: ratios().mean(), observe=False)
        if prediction_loss_only:
            return out.loss, None, None
        # The loss is left to `_eval_metrics`, which knows the class sizes and z_ref of the whole set.
        return None, *evaluation_rows(out, inputs, ratios() if self.objective.mismatched else None)

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        columns, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
        self.recorder.keep(columns, labels)
        metrics = evaluation_metrics(columns, labels, self.objective, self.settings, **self.weighting)
        users = {} if self._users_metrics is None else self._users_metrics(prediction)
        return _present(metrics | {"delta": self.delta}) | users

    @property
    def delta(self) -> float:
        """δ as it is now; 0 for an objective without one."""
        return float(self.feedback.shift.value) if self.objective.shift else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training line; evaluation logs eval_loss
            window = self.feedback.take(self.args.device)
            if window:
                if not self.objective.mismatched:
                    del window["kl"]
                logs.update(_present(window), delta=self.delta, **self.memory.log())
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        self.feedback.pool(self.args.device)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        self.create_model_card(output_dir=output_dir)

    def create_model_card(self, *args, output_dir=None, license=None, **kwargs):
        """Write README.md beside a model. It describes the run by itself; of the Trainer's arguments it reads `license`."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            model = self.accelerator.unwrap_model(self.model)
            self.recorder.write_card(folder, self.args, self.state, model, license)


def _class_weights(dataset: FeedbackDataset | None, args: FeedbackConfig) -> tuple[float, float]:
    """λ of thumbs up and of thumbs down."""
    if dataset is None:
        return 1.0, 1.0
    if args.desirable_weight != "auto":
        return args.desirable_weight, args.undesirable_weight
    weights = balancing_weights([example.label for example in dataset.examples])
    logger.info("desirable_weight=auto: thumbs up weigh %.4g, thumbs down %.4g", *weights)
    return weights


def _present(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """As floats, without those of a class that was absent."""
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}
