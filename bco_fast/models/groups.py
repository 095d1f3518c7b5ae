"""Checkpoints over groups of layers: fewer hidden states wait for the backward than the model has layers.

A group keeps its first layer's input. When the backward reaches it, it runs forward once more, keeps the inputs of its other
layers, and each layer is then recomputed as ever. The first groups wait longest and are the largest: if group g = 0, 1, ...
has P - g layers, then P hidden states exist at most, and P (P + 1) / 2 layers are covered: 8 hidden states for 32 layers.

A model calls its layers one by one, each with its own arguments. The layers of a group note theirs and hand the hidden
states on as they came; the last one runs all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .tiles import decoder_layers


def fewest_checkpoints(layers: int) -> int:
    """The least P with P (P + 1) / 2 >= layers."""
    return next(most for most in range(1, layers + 1) if most * (most + 1) >= 2 * layers)


def group_sizes(layers: int, most: int, *, offloaded: bool = False) -> list[int]:
    """Layers of each group, in order, so that `most` hidden states exist at most, in as many groups as that allows.

    Args:
        offloaded: what groups keep waits in host memory, so there are `most` groups of nearly equal size, whose other
            hidden states, on the device, are the fewest.

    Raises:
        ValueError: most is too small for these layers; names the least.
    """
    least = 1 if offloaded else fewest_checkpoints(layers)
    if most < least:
        raise ValueError(f"layer_checkpoints must be at least {least} for {layers} layers, not {most}")
    groups = min(most, layers)
    if offloaded:
        return [layers // groups + (index < layers % groups) for index in range(groups)]
    sizes, left = [], layers
    for index in range(groups):
        sizes.append(min(most - index, left - (groups - index - 1)))  # a layer is left for each of the others
        left -= sizes[-1]
    return sizes


@dataclass
class _Group:
    size: int
    calls: list[tuple[Callable, tuple, dict]] = field(default_factory=list)
    waiting: Tensor | None = None


class _Grouped:
    """The forward of a layer: while the model trains with checkpoints, the last layer of a group runs all of them."""

    def __init__(self, layer: nn.Module, alone: Callable, group: _Group, first: bool):
        self.layer, self.alone, self.group, self.first = layer, alone, group, first

    def __call__(self, *args, **kwargs):
        layer, group = self.layer, self.group
        if not (layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()):
            return self.alone(*args, **kwargs)
        hidden, *others = args or (kwargs.pop("hidden_states"),)
        if self.first:
            group.calls = []
        elif hidden is not group.waiting:
            raise RuntimeError(
                f"the model changes its hidden states between two {type(layer).__name__}s, which therefore cannot share a "
                "checkpoint: leave layer_checkpoints off"
            )
        group.calls.append((self.alone, tuple(others), kwargs))
        group.waiting = hidden
        if len(group.calls) < group.size:
            return hidden
        calls, group.calls, group.waiting = group.calls, [], None
        return checkpoint(functools.partial(_run, calls), hidden, use_reentrant=False)


def _run(calls: list[tuple[Callable, tuple, dict]], hidden: Tensor) -> Tensor:
    for layer, args, kwargs in calls:
        hidden = layer(hidden, *args, **kwargs)
    return hidden


def group_layers(model: nn.Module, most: int, *, offloaded: bool = False) -> list[int]:
    """Make the model's checkpoints keep `most` hidden states at most, where there were one for each layer; -> the layers
    of each group. It matters once gradient checkpointing, of the kind that is not reentrant, is on.

    Raises:
        ValueError: there are fewer than `fewest_checkpoints`, or the model's layers do not checkpoint themselves.
    """
    layers = decoder_layers(model)
    if layers is None or not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no list of layers that checkpoint themselves; leave layer_checkpoints off"
        )
    if "__call__" in vars(GradientCheckpointingLayer):
        raise ValueError(
            "layer_checkpoints needs a newer transformers, which checkpoints what is inside of a layer's hooks"
        )
    sizes = group_sizes(len(layers), most, offloaded=offloaded)
    rest = iter(layers)
    for size in sizes:
        group = _Group(size)
        for index in range(size):
            layer = next(rest)
            alone = layer.forward.alone if isinstance(layer.forward, _Grouped) else layer.forward
            layer.forward = _Grouped(layer, alone, group, index == 0) if size > 1 else alone
    return sizes
