"""What is checked before the first step: that the model computes in training batches what it computes alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batch import Layout, collate_tokens, layout_tokens, to_device
from ..data.dataset import Example, FeedbackDataset, Item
from ..data.samplers import token_batches
from ..data.tokenizer import positions
from ..models.attention import knows_segments
from ..models.patch import logp_budget
from .config import FeedbackConfig
from .step import completion_sums

logger = logging.getLogger("bco_fast")

CHECKED_TOKENS = 64
"""Of a prompt and of a completion, at most: a check must not need more memory than training."""
CHECKED_ITEMS = 4
"""The first ones of the training dataset, at most."""


def check_arguments(model: nn.Module | str, args: FeedbackConfig, ref_model: nn.Module | None) -> None:
    """Refuse other arguments than a `FeedbackConfig`, and a reference that training would change."""
    if not isinstance(args, FeedbackConfig):
        raise TypeError(f"args must be a FeedbackConfig, not {type(args).__name__}")
    if ref_model is not None and args.ref_adapter is not None:
        raise ValueError("ref_adapter and ref_model are two references: leave one out")
    if ref_model is not None and ref_model is model:
        raise ValueError(
            "ref_model is the model itself, which training changes: leave ref_model out, and the model as it is now is the "
            "reference"
        )


def check_positions(model: nn.Module, max_length: int) -> None:
    """Refuse a max_length beyond the model's positions."""
    most = positions(model)
    if most and max_length > most:
        raise ValueError(f"max_length is {max_length}, but the model has {most} positions")


def check_rows(dataset: FeedbackDataset, args: FeedbackConfig) -> None:
    """Refuse rows of another kind than the objective reads, and weights that it cannot apply."""
    name, objective = args.loss_type, args.objective
    if dataset.paired is not objective.paired:
        raise ValueError(
            f"{name} reads {objective.data}, and the dataset was loaded {'as' if dataset.paired else 'without'} pairs: "
            f"load_feedback(..., needs={objective.data!r})"
        )
    if not objective.batchwise:
        return
    if any(example.weight != 1 for example in dataset.examples):
        raise ValueError(
            f"{name} sorts the pairs of a micro-batch, so its costs belong to no row: leave out the weights"
        )
    if args.world_size * args.gradient_accumulation_steps > 1:
        logger.warning(
            "%s sorts the %d pairs of each micro-batch, as in TRL: another split of a step is another loss",
            name, args.per_device_train_batch_size,
        )  # fmt: skip


def check_budget(dataset: FeedbackDataset, tokens_per_batch: int) -> None:
    """Refuse a budget that a single row or pair exceeds."""
    sizes = [layout_tokens(sides, "packed") for sides in dataset.sides]
    row = int(np.argmax(sizes))
    if sizes[row] > tokens_per_batch:
        raise ValueError(
            f"tokens_per_batch is {tokens_per_batch}, but row {row} (counted from 0) alone has {sizes[row]} tokens: raise it or "
            "lower max_length"
        )


@torch.no_grad()
def check_layout(model: nn.Module, examples: Sequence[Example], pad_token_id: int, layout: Layout) -> None:
    """Refuse a model that computes other log-probabilities in batches of this layout than in padded ones.

    Args:
        model: patched by `patch_model`.
        examples: two or more; of long ones the ends of prompts and the beginnings of completions are taken.

    Raises:
        ValueError: the log-probabilities differ by more than rounding; says what the reason may be.
    """
    training, device = model.training, next(model.parameters()).device
    prompt = examples[0].input_ids[: examples[0].completion_start][-CHECKED_TOKENS:]
    short = [_short(example, example.input_ids[: example.completion_start][-CHECKED_TOKENS:]) for example in examples]
    short += [_short(example, prompt) for example in examples]  # so that there is a prompt to share
    model.eval()
    try:
        means = []
        for kind in ("padded", layout):
            batch = to_device(collate_tokens(short, pad_token_id, layout=kind), device)
            means.append(completion_sums(model, batch) / batch["cu_completions"].diff())
    finally:
        model.train(training)
    difference = float((means[0] - means[1]).abs().max())
    if difference <= logp_budget(model):
        return
    name, visits = type(model).__name__, len(batch["segments"].visits)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", visits)
    if knows_segments(model.config) and visits < layers:
        raise ValueError(
            f"{name} does not keep {layout} sequences apart: {layers - visits} of its {layers} layers mix tokens by other "
            "means than transformers' attention interface"
        )
    raise ValueError(
        f"{name} does not keep {layout} sequences apart: the log-probability per token differs by {difference:.2g} nats "
        "from the padded batch's"
    )


def _short(example: Example, prompt: np.ndarray) -> Example:
    completion = example.input_ids[example.completion_start :][:CHECKED_TOKENS]
    return Example(np.concatenate([prompt, completion]), len(prompt), example.label, 1.0)


def first_rows(dataset: FeedbackDataset, args: FeedbackConfig, layout: Layout) -> list[Item | tuple[Item, Item]]:
    """The items that `check_start` runs: no more than a batch of training holds."""
    rows = range(min(CHECKED_ITEMS, args.per_device_train_batch_size, len(dataset)))
    if args.tokens_per_batch is not None:
        rows = range(min(CHECKED_ITEMS, len(dataset)))
        rows = next(token_batches(dataset.sides, rows, args.tokens_per_batch, layout=layout))
    return [dataset[i] for i in rows]


def check_start(model: nn.Module, log_ratios: Tensor, lengths: Tensor, *, autocast: bool) -> None:
    """Before the first step policy and reference are the same model, so every reward is 0 except for rounding.

    Args:
        model: the policy, unwrapped.
        log_ratios: [B], policy minus reference, nats, of a training batch.
        lengths: [B], tokens of its completions.

    Raises:
        ValueError: they differ: training batches and those of the reference disagree. An adapter that was trained before
            is only warned about.
    """
    largest = float((log_ratios / lengths).abs().max())
    budget = logp_budget(model, autocast=autocast)
    logger.info("step 0: policy and reference differ by %.1e nats per token at most (budget %.0e)", largest, budget)
    if largest <= budget:
        return
    text = (
        f"before training policy and reference differ by {largest:.2g} nats per token, more than rounding ({budget:g})"
    )
    if hasattr(model, "disable_adapter"):
        logger.warning("%s: the adapter is not a fresh one, so rewards do not start at 0", text)
        return
    raise ValueError(
        f"{text}: the model computes other values in training batches than alone. Pass ref_model= if the reference is "
        "another model."
    )
