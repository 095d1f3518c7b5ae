"""Which layout the trainer's batches have: padded, packed, or every prompt once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from torch import nn

from ..data.batch import Layout, layout_tokens
from ..data.dataset import Example, FeedbackDataset
from ..data.samplers import GroupedSampler, token_batches
from ..data.sources import one_line
from ..models.attention import is_flash, use_segments
from .checks import check_budget, check_layout
from .config import FeedbackConfig

logger = logging.getLogger("bco_fast")

WORTH = 0.9
"""Share of the tokens above which sharing prompts is not worth its smaller attention calls."""


FEWEST_TOKENS = 64
"""What a completion must save on average, because each becomes an attention call in every layer."""


def choose_layout(
    model: nn.Module, args: FeedbackConfig, dataset: FeedbackDataset | None, pad_token_id: int, *, sharded: bool = False
) -> Layout:
    """Decide the layout and let the model's attention read segments where it needs them; the log says why.

    Args:
        model: patched, unwrapped, on its device.
        dataset: the training rows, or those of evaluation where there are none.
        sharded: the model's weights are spread over ranks, so it cannot be run here.

    Raises:
        ValueError: share_prompts is "true", or padding_free is on, and the model cannot do it.
    """
    if dataset is not None and args.tokens_per_batch is not None:
        check_budget(dataset, args.tokens_per_batch)
    plain: Layout = "packed" if args.padding_free else "padded"
    if dataset is None or not dataset.examples:
        return plain
    if args.share_prompts != "false":
        reason = _reason_not_to(model, args, dataset, sharded)
        if reason is None:
            reason = _try(model, dataset, pad_token_id, "shared")
        if reason is None:
            return "shared"
        if args.share_prompts == "true":
            raise ValueError(f"share_prompts: {reason}")
        logger.info("prompts are not shared: %s", reason)
    if plain == "packed" and not sharded:
        if not is_flash(model.config) and _try(model, dataset, pad_token_id, plain) is None:
            return plain  # each sequence by itself, where a mask would have held all pairs of tokens
        check_layout(model, dataset.examples[:3], pad_token_id, plain)
    return plain


def _reason_not_to(model: nn.Module, args: FeedbackConfig, dataset: FeedbackDataset, sharded: bool) -> str | None:
    """Why prompts should not be shared, before the model is tried."""
    if args.batch_composition == "stratified":
        return "stratified batches keep classes in proportion, not prompts together"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "the load-balancing loss of the mixture of experts counts every token of every row"
    if sharded:
        return "the model is sharded over ranks and could not be checked"
    apart, shared = (
        sum(layout_tokens(batch, layout) for batch in _batches(dataset, args)) for layout in ("packed", "shared")
    )
    if shared > WORTH * apart and args.share_prompts == "auto":
        return f"it would save {1 - shared / apart:.0%} of the tokens"
    if apart - shared < FEWEST_TOKENS * len(dataset.examples) and args.share_prompts == "auto":
        return f"{(apart - shared) / len(dataset.examples):.0f} tokens a completion are too few to pay for smaller attention calls"
    logger.info("tokens %s -> %s (shared prompts)", f"{apart:,}", f"{shared:,}")
    return None


def _batches(dataset: FeedbackDataset, args: FeedbackConfig) -> Iterator[Sequence[Example]]:
    """Micro-batches as training with shared prompts would cut them."""
    sides = dataset.sides
    order = list(GroupedSampler([item[0].together for item in sides], args.data_seed))
    if args.tokens_per_batch is not None:
        batches = token_batches(sides, order, args.tokens_per_batch, layout="shared")
    else:
        size = args.per_device_train_batch_size
        batches = (order[i : i + size] for i in range(0, len(order), size))
    return ([example for i in batch for example in sides[i]] for batch in batches)


def _try(model: nn.Module, dataset: FeedbackDataset, pad_token_id: int, layout: Layout) -> str | None:
    """Let the model read segments if that changes nothing; -> None, or why not."""
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)  # Llama 4
    if chunk is not None and (longest := max(len(example.input_ids) for example in dataset.examples)) > chunk:
        return f"the model attends within chunks of {chunk} tokens, and a row has {longest}"
    try:
        use_segments(model)
        check_layout(model, dataset.examples[:3], pad_token_id, layout)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        use_segments(model, False)
        return one_line(error)
    return None
