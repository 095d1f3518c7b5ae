"""Checkpoints over groups of layers: fewer hidden states wait for the backward than the model has layers.

A group keeps its first layer's input. When the backward reaches it, it runs forward once more, keeps the inputs of its other
layers, and each layer is then recomputed as ever. The first groups wait longest and are the largest: if group g = 0, 1, ...
has P - g layers, then P hidden states exist at most, and P (P + 1) / 2 layers are covered: 8 hidden states for 32 layers.
For fewer still, a group is made of groups in the same way: its forward then runs twice more, and P (P + 1) (P + 2) / 6 layers
are covered, 5 hidden states for 32 layers (Griewank & Walther 2000, "revolve").

The input of the first layer need not wait: where it is what the embeddings return, it is looked up again.

A model calls its layers one by one, each with its own arguments. The layers of a group note theirs and hand the hidden
states on as they came; the last one runs all of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .tiles import decoder_layers

RUNS = 3
"""Forwards of a layer in the backward, at most, its own recomputation included."""


def _covered(most: int, runs: int) -> int:
    """Layers that `most` hidden states are enough for, if each runs forward up to `runs` times in the backward."""
    return math.comb(most + runs - 1, runs)


def fewest_checkpoints(layers: int, runs: int = RUNS) -> int:
    """The least number of hidden states that covers the layers in so many runs."""
    return next(most for most in range(1, layers + 1) if _covered(most, runs) >= layers)


def group_sizes(layers: int, most: int, *, offloaded: bool = False) -> list[int]:
    """Layers of each group, in order, so that `most` hidden states exist at most, in as many groups as that allows.

    Group g may itself be cut by `group_sizes(size, most - g)`, if it has more than `most - g` layers.

    Args:
        offloaded: what groups keep waits in host memory, so there are `most` groups of nearly equal size, whose other
            hidden states, on the device, are the fewest.

    Raises:
        ValueError: most is too small for these layers; names the least.
    """
    fewest = 1 if offloaded else fewest_checkpoints(layers)
    if most < fewest:
        raise ValueError(f"layer_checkpoints must be at least {fewest} for {layers} layers, not {most}")
    groups = min(most, layers)
    if offloaded:
        return [layers // groups + (index < layers % groups) for index in range(groups)]
    runs = next(runs for runs in range(1, RUNS + 1) if _covered(most, runs) >= layers)
    # so much is left for each of the others, or more layers than need be would run as often as that
    least = [_covered(most - index, runs - 2) if runs > 2 else 1 for index in range(groups)]
    sizes, left = [], layers
    for index in range(groups):
        sizes.append(min(_covered(most - index, runs - 1), left - sum(least[index + 1 :])))
        left -= sizes[-1]
    return sizes


@dataclass
class _Looked:
    """What an embedding was asked for, and a reference to its answer that does not keep it."""

    ids: Tensor
    answer: weakref.ref
    version: int


class Lookups:
    """Watches the model's embeddings, whose answer can be had again from the token ids."""

    def __init__(self, model: nn.Module):
        self.embedding, self.last = model.get_input_embeddings(), None
        if isinstance(self.embedding, nn.Embedding) and self.embedding.max_norm is None:
            self.embedding.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        others = any(not isinstance(getattr(hook, "__self__", None), Lookups) for hook in hooks)  # they may add noise
        self.last = None if others or len(args) != 1 else _Looked(args[0], weakref.ref(out), out._version)

    def of(self, hidden: Tensor) -> Callable[[], Tensor] | None:
        """What makes these hidden states again, if they are the embeddings' last answer, unchanged."""
        last = self.last
        if last is None or last.answer() is not hidden or last.version != hidden._version:
            return None
        return functools.partial(self._again, last.ids)

    def _again(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.embedding.forward(ids)


def _made_again(hidden: Tensor, again: Callable[[], Tensor] | None) -> contextlib.AbstractContextManager:
    """Within it, whoever saves hidden for a backward gets it from `again` then, so that it need not wait."""
    if again is None:
        return contextlib.nullcontext()

    made = hidden.untyped_storage()._cdata, hidden.shape  # not hidden itself, which the hooks would keep

    def pack(tensor: Tensor) -> object:
        return again if (tensor.untyped_storage()._cdata, tensor.shape) == made else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved if isinstance(saved, Tensor) else saved())


Call = tuple[Callable, tuple, dict]
"""Of a layer: its forward, and its arguments but the hidden states."""


@dataclass
class _Group:
    size: int
    most: int
    """Hidden states that exist at most in its backward, without those of other groups."""
    calls: list[Call] = field(default_factory=list)
    waiting: Tensor | None = None
    again: Callable[[], Tensor] | None = None


class _Grouped:
    """The forward of a layer: while the model trains with checkpoints, the last layer of a group runs all of them."""

    def __init__(self, layer: nn.Module, alone: Callable, group: _Group, first: bool, lookups: Lookups | None):
        self.layer, self.alone, self.group, self.first, self.lookups = layer, alone, group, first, lookups

    def __call__(self, *args, **kwargs):
        layer, group = self.layer, self.group
        if not (layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()):
            return self.alone(*args, **kwargs)
        hidden, *others = args or (kwargs.pop("hidden_states"),)
        if self.first:
            group.calls = []
            group.again = self.lookups.of(hidden) if self.lookups is not None else None
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
        return _checkpointed(calls, group.most, group.again, hidden)


def _checkpointed(calls: list[Call], most: int, again: Callable[[], Tensor] | None, hidden: Tensor) -> Tensor:
    if len(calls) == 1:
        ((layer, args, kwargs),) = calls
        with _made_again(hidden, again):
            return layer(hidden, *args, **kwargs)
    # Nothing in its place: `_run` makes it itself, or `checkpoint` would hold it while the whole group runs again.
    with _made_again(hidden, again and functools.partial(torch.empty, 0, dtype=hidden.dtype, device=hidden.device)):
        return checkpoint(functools.partial(_run, calls, most, again), hidden, use_reentrant=False)


def _run(calls: list[Call], most: int, again: Callable[[], Tensor] | None, hidden: Tensor) -> Tensor:
    if again is not None and not hidden.numel():
        hidden = again().requires_grad_(hidden.requires_grad)
    start = 0
    for index, size in enumerate(group_sizes(len(calls), most)):
        part = calls[start : start + size]
        hidden = _checkpointed(part, most - index, again if start == 0 else None, hidden)
        start += size
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
    lookups = Lookups(model)
    for number, size in enumerate(sizes):
        group = _Group(size, size if offloaded else most - number)
        for index in range(size):
            layer = next(rest)
            alone = layer.forward.alone if isinstance(layer.forward, _Grouped) else layer.forward
            first = lookups if number == index == 0 else None
            layer.forward = _Grouped(layer, alone, group, index == 0, first) if size > 1 or first else alone
    return sizes
