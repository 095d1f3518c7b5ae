"""Attention over one row of tokens that holds many sequences, some of which share a prompt.

A segment is a run of tokens and the prompt that it continues, if any (`data.batch.Segments`). It attends to its prompt
and to itself, causally aligned to the lower right. So a prompt that several completions share is computed once, packed
sequences need no FlashAttention to be kept apart, and no [T, T] mask exists.

A row may also continue the runs of a row that was computed before: their keys and values are kept for it, layer by layer.

The model's own attention function (SDPA, eager, FlashAttention) runs on each segment, so grouped queries, softcaps, sinks
and dropout are the model's. The segments travel as an attribute of a four-dimensional attention mask, because every model
hands such a mask to its layers untouched, also when a checkpointed layer runs again in the backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from ..data.batch import Segment, Segments

PREFIX = "segments|"
"""Of the name of an attention implementation that knows segments; what follows is the model's own."""


def segment_mask(segments: Segments, device: torch.device) -> Tensor:
    """The attention mask that carries segments to the layers."""
    segments.kept = {} if segments.continued else None
    mask = torch.empty((1, 1, 1, segments.parts[-1].stop), dtype=torch.bool, device=device)
    mask.segments = segments
    mask.masks = {}  # made by the first layer that needs them, used by all
    return mask


def base_attention(config: PreTrainedConfig) -> str:
    """The model's attention implementation, whether it knows segments or not."""
    return str(getattr(config, "_attn_implementation", None) or "eager").removeprefix(PREFIX)


def knows_segments(config: PreTrainedConfig) -> bool:
    return str(getattr(config, "_attn_implementation", "")).startswith(PREFIX)


def use_segments(model: nn.Module, on: bool = True) -> None:
    """Let the model's attention read segments. Batches without them are computed as before."""
    config = model.config
    base = base_attention(config)
    if on:
        AttentionInterface.register(PREFIX + base, _attention(base))
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part._attn_implementation = PREFIX + base if on else base


def _attention(base: str) -> Callable:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
    ):
        run = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
        if not hasattr(attention_mask, "segments"):
            return run(module, query, key, value, attention_mask, **options)
        for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            options.pop(name, None)  # they describe the whole row
        outputs = []
        segments = attention_mask.segments
        segments.visits.append(getattr(module, "layer_idx", None))
        before = key, value
        if segments.continues is not None:
            before = segments.continues.kept.pop(module)
        if segments.kept is not None:
            segments.kept[module] = key.detach(), value.detach()
        for segment in segments.parts:
            here = slice(segment.start, segment.stop)
            keys, values = key[:, :, here], value[:, :, here]
            if segment.prompt is not None:
                prompt = slice(*segment.prompt)
                keys = torch.cat([before[0][:, :, prompt], keys], dim=2)
                values = torch.cat([before[1][:, :, prompt], values], dim=2)
            mask = None  # FlashAttention is causal to the lower right, and reads the window itself
            if not base.startswith("flash"):
                window = options.get("sliding_window")
                mask = _mask(attention_mask.masks, segment, window, query, additive=base == "eager")
            outputs.append(run(module, query[:, :, here], keys, values, mask, **options)[0])
        return torch.cat(outputs, dim=1), None  # [1, T, heads, head size]

    return attention


def _mask(masks: dict, segment: Segment, window: int | None, query: Tensor, *, additive: bool) -> Tensor | None:
    """Which keys each query of a segment sees, [1, 1, queries, keys], as a summand; None for plain causal attention."""
    queries = segment.stop - segment.start
    offset = segment.prompt[1] - segment.prompt[0] if segment.prompt else 0
    windowed = window is not None and offset + queries > window
    if not (offset or windowed or additive):
        return None
    key = (queries, offset, window if windowed else None)
    if key not in masks:
        at = torch.arange(offset, offset + queries, device=query.device)[:, None]
        to = torch.arange(offset + queries, device=query.device)[None]
        hidden = to > at
        if windowed:
            hidden |= to <= at - window
        summand = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        masks[key] = summand.masked_fill_(hidden, torch.finfo(query.dtype).min)[None, None]
    return masks[key]
