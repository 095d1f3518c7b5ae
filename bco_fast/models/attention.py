"""Attention over one row of tokens that holds many sequences, some of which share a prompt.

A segment is a run of tokens and the prompt that it continues, if any (`data.batch.Segments`). It attends to its prompt
and to itself, causally aligned to the lower right. So a prompt that several completions share is computed once, packed
sequences need no FlashAttention to be kept apart, and no [T, T] mask exists.

A row may also continue the runs of a row that was computed before: their keys and values are kept for it, layer by layer.

The model's own attention function (SDPA, eager) runs on each segment, so grouped queries, softcaps, sinks and dropout are
the model's; FlashAttention takes all of them in one call, with the lengths of queries and keys. The segments travel as an attribute of a four-dimensional attention mask, because every model
hands such a mask to its layers untouched, also when a checkpointed layer runs again in the backward.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from ..data.batch import Segment, Segments

PREFIX = "segments|"
"""Of the name of an attention implementation that knows segments; what follows is the model's own."""


def segment_mask(segments: Segments, device: torch.device, *, regather: bool = False) -> Tensor:
    """The attention mask that carries segments to the layers.

    Args:
        segments, device: of the row of tokens.
        regather: gather the keys and values of a prompt and its completion again in the backward. Otherwise every
            completion would keep a copy of its prompt's, as if that were not shared. Of no use where whole layers are
            computed again.
    """
    segments.kept = {} if segments.continued else None
    mask = torch.empty((1, 1, 1, segments.parts[-1].stop), dtype=torch.bool, device=device)
    mask.segments = segments
    mask.regather = regather
    mask.masks = {}  # made by the first layer that needs them, used by all
    return mask


def base_attention(config: PretrainedConfig) -> str:
    """The model's attention implementation, whether it knows segments or not."""
    return str(getattr(config, "_attn_implementation", None) or "eager").removeprefix(PREFIX)


def is_flash(config: PretrainedConfig) -> bool:
    """Whether the model's attention is FlashAttention of any version, from a package or from the Hub."""
    return "flash" in base_attention(config)


def knows_segments(config: PretrainedConfig) -> bool:
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
    flash = "flash" in base

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
    ):
        run = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
        if not hasattr(attention_mask, "segments"):
            with _named(module.config, base, flash):
                return run(module, query, key, value, attention_mask, **options)
        for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            options.pop(name, None)  # they describe the whole row
        segments, masks = attention_mask.segments, attention_mask.masks
        segments.visits.append(getattr(module, "layer_idx", None))
        before = (None, None) if segments.continues is None else segments.continues.kept.pop(module)
        if segments.kept is not None:
            segments.kept[module] = key.detach(), value.detach()
        keys, values = (_paths(segments, own, other) for own, other in zip((key, value), before, strict=True))
        if flash:
            together = [list(itertools.chain.from_iterable(paths)) for paths in (keys, values)]
            with _named(module.config, base, flash), _Gathered(attention_mask.regather) as gathered:
                lengths = _lengths(masks, segments, query.device)
                return run(module, query, *map(gathered, together), None, **options, **lengths)
        outputs = []
        queries = query.split([part.stop - part.start for part in segments.parts], dim=2)
        for segment, own, *path in zip(segments.parts, queries, keys, values, strict=True):
            mask = _mask(masks, segment, options.get("sliding_window"), query, additive=base == "eager")
            with _Gathered(attention_mask.regather and segment.prompt is not None) as gathered:
                layer = gathered.spread_over(module, query.shape[1] // key.shape[1])
                outputs.append(run(layer, own, *map(gathered, path), mask, **options)[0])
        return torch.cat(outputs, dim=1), None  # [1, T, heads, head size]

    return attention


class _Gathered(torch.autograd.graph.saved_tensors_hooks):
    """Called with pieces of keys or values, it joins them. Where attention saves the result for its backward, it keeps the
    pieces, which others keep anyway, and joins them again then."""

    def __init__(self, on: bool):
        self.on = on and torch.is_grad_enabled()
        self.groups = 1
        self.made: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        """By address. The tensor stays with it, or another one could get the address before all is saved."""
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> _Gathered:
        if self.on:
            super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.on:
            super().__exit__(*exception)
            self.made.clear()

    def spread_over(self, module: nn.Module, groups: int) -> object:
        """The layer, for its attention function. Where that would copy each key for a group of query heads, the copies are
        made here, so that they are not kept either."""
        if not self.on or getattr(module, "num_key_value_groups", 1) != groups:
            return module
        self.groups = groups
        return _Ungrouped(module)

    def __call__(self, pieces: list[Tensor]) -> Tensor:
        joined = _join(pieces, self.groups)
        if self.on:
            again = functools.partial(_join, [piece.detach() for piece in pieces], self.groups)
            self.made[joined.untyped_storage().data_ptr()] = joined, again
        return joined

    def _pack(self, saved: Tensor) -> object:
        _, again = self.made.get(saved.untyped_storage().data_ptr(), (None, None))
        return saved if again is None else (again, saved.shape, saved.stride(), saved.storage_offset())

    @staticmethod
    def _unpack(packed: object) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        again, *view = packed
        return again().as_strided(*view)


class _Ungrouped:
    """A layer whose every query head has keys of its own."""

    num_key_value_groups = 1

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __getattr__(self, name: str) -> object:
        return getattr(self.layer, name)


def _join(pieces: list[Tensor], groups: int) -> Tensor:
    """[1, heads, n, size] each, end to end and every head `groups` times."""
    joined = torch.cat(pieces, dim=2)
    return joined if groups == 1 else joined.repeat_interleave(groups, dim=1)


@contextlib.contextmanager
def _named(config: PretrainedConfig, base: str, flash: bool) -> Iterator[None]:
    """transformers loads FlashAttention by the name in the layer's config, which here must be its own."""
    name = config._attn_implementation
    if flash:
        config._attn_implementation = base
    try:
        yield
    finally:
        if flash:
            config._attn_implementation = name


def _paths(segments: Segments, own: Tensor, before: Tensor | None) -> list[list[Tensor]]:
    """Keys or values [1, heads, T, size] cut into what each segment attends to: its prompt, if it has one, and itself.

    Cut by one split, whose backward is one concatenation: slices would each fill a gradient of the whole row with zeros.
    """
    pieces = own.split([part.stop - part.start for part in segments.parts], dim=2)
    prompts = {(part.start, part.stop): piece for part, piece in zip(segments.parts, pieces, strict=True)}
    paths = []
    for part, piece in zip(segments.parts, pieces, strict=True):
        if part.prompt is None:
            paths.append([piece])
        else:
            paths.append([prompts[part.prompt] if before is None else before[:, :, slice(*part.prompt)], piece])
    return paths


def _prompt_length(segment: Segment) -> int:
    return segment.prompt[1] - segment.prompt[0] if segment.prompt else 0


def _lengths(masks: dict, segments: Segments, device: torch.device) -> dict:
    """What FlashAttention must know of the segments: where the queries of each begin, and its keys. It aligns its causal mask
    to the lower right, and applies the window itself."""
    if "lengths" not in masks:
        queries = [part.stop - part.start for part in segments.parts]
        keys = [n + _prompt_length(part) for n, part in zip(queries, segments.parts, strict=True)]
        q, k = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (queries, keys)
        )
        masks["lengths"] = {
            "cu_seq_lens_q": q,
            "cu_seq_lens_k": k,
            "max_length_q": max(queries),
            "max_length_k": max(keys),
        }
    return masks["lengths"]


def _mask(masks: dict, segment: Segment, window: int | None, query: Tensor, *, additive: bool) -> Tensor | None:
    """Which keys each query of a segment sees, [1, 1, queries, keys], as a summand; None for plain causal attention."""
    queries = segment.stop - segment.start
    offset = _prompt_length(segment)
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
