"""The parts of a layer that treat tokens independently, run over a few tokens at a time and recomputed in the backward.

Norms, projections and MLPs give each token its own result, so a part of the tokens gives a part of the result. What such
a module keeps for its backward (a Llama's MLP keeps 14 numbers for each number of its input) then exists for a few tokens
only; of the whole row it keeps its input. A module that reads the result of a norm keeps the norm's input instead, which
the layer keeps anyway, and repeats the norm.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

logger = logging.getLogger("bco_fast")

SOURCE = "_bco_fast_source"
"""Attribute of a norm's result: what it was made of."""


@dataclass
class _Source:
    norm: Tiles
    hidden: Tensor
    version: int


class Tiles:
    """One module's forward over a few tokens at a time."""

    def __init__(self, module: nn.Module, tokens: int):
        self.module, self.tokens, self.whole = module, tokens, module.forward
        self.is_norm = is_norm(module)
        self.most: int | None = None
        """Tiles to run at most: memory is counted on two of them, all others being alike."""

    def starts(self, total: int) -> list[int]:
        return list(range(0, total, self.tokens))[: self.most]

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Tensor:  # [B, T, ...]
        if args or kwargs or hidden.dim() < 3 or hidden.shape[1] <= self.tokens:
            return self.whole(hidden, *args, **kwargs)
        source = getattr(hidden, SOURCE, None)
        run, modules = self.whole, [self.module]
        if source is not None and source.version == hidden._version:
            hidden, modules = source.hidden, [self.module, source.norm.module]
            run = _after(source.norm.whole, run)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or hidden.requires_grad):
            return _over_tiles(run, hidden, self)
        if any(hasattr(p, "ds_id") for p in parameters):  # ZeRO-3's parameters are empty outside of their module's call
            parts = hidden.split(self.tokens, dim=1)
            return torch.cat([checkpoint(run, part, use_reentrant=False) for part in parts], dim=1)
        kept = _Kept.apply(hidden, hidden if hidden.requires_grad else parameters[0])
        out = _Tiled.apply(run, self, _Surroundings.now(modules, hidden), kept, hidden, *parameters)
        if self.is_norm:
            setattr(out, SOURCE, _Source(self, hidden, out._version))
        return out


def _after(first: Callable, then: Callable) -> Callable:
    return lambda part: then(first(part))


def _over_tiles(run: Callable[[Tensor], Tensor], hidden: Tensor, tiles: Tiles) -> Tensor:
    out = None
    for start in tiles.starts(hidden.shape[1]):
        here = slice(start, start + tiles.tokens)
        part = run(hidden[:, here])
        if out is None:
            out = part.new_empty((part.shape[0], hidden.shape[1], *part.shape[2:]))
        out[:, here] = part
    return out


@dataclass
class _Surroundings:
    """Autocast and random numbers of a forward, for its repetition in the backward."""

    device: torch.device
    autocast: torch.dtype | None
    random: tuple | None

    @classmethod
    def now(cls, modules: list[nn.Module], hidden: Tensor) -> _Surroundings:
        kind, random = hidden.device.type, None
        if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for module in modules for m in module.modules()):
            random = torch.get_rng_state(), *get_device_states(hidden)
        return cls(hidden.device, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None, random)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        # Without the cache: it would hand a copy made under no_grad, without a graph, to the backward's forward.
        kind = self.device.type
        cast = torch.autocast(kind, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
        with cast, torch.random.fork_rng([self.device] if kind != "cpu" else [], enabled=self.random is not None):
            if self.random is not None:
                torch.set_rng_state(self.random[0])
                set_device_states(*self.random[1:], device_type=kind)
            yield


class _Kept(torch.autograd.Function):
    """Saves hidden before it is used; the result is empty, and passes no gradient.

    A checkpointed layer is recomputed up to the last tensor that it saves. Saved by the function that uses it, that is, once
    the function has run, hidden would make the recomputation end behind the layer's MLP, whose result nobody needs.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, differentiable: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        return None, None


class _Tiled(torch.autograd.Function):
    """run(hidden) in tiles, of which `kept` has kept hidden; the backward repeats each tile.

    The gradients of parameters are returned, not added in place, so that hooks of DDP and FSDP see each once.
    """

    @staticmethod
    def forward(ctx, run, tiles: Tiles, surroundings: _Surroundings, kept: Tensor, hidden: Tensor, *parameters: Tensor):
        ctx.run, ctx.tiles, ctx.surroundings, ctx.parameters = run, tiles, surroundings, parameters
        ctx.kept = kept.grad_fn
        with surroundings.again():
            return _over_tiles(run, hidden, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (hidden,) = ctx.kept.saved_tensors
        needs = ctx.needs_input_grad[4:]
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        wanted = [p for p, needed in zip(ctx.parameters, needs[1:], strict=True) if needed]
        sums: list[Tensor | None] = [None] * len(wanted)
        with ctx.surroundings.again():
            for start in ctx.tiles.starts(hidden.shape[1]):
                here = slice(start, start + ctx.tiles.tokens)
                part = hidden[:, here].detach().requires_grad_(needs[0])
                with torch.enable_grad():
                    out = ctx.run(part)
                inputs = [part, *wanted] if needs[0] else wanted
                grads = list(torch.autograd.grad(out, inputs, grad[:, here], allow_unused=True))
                if needs[0]:
                    d_hidden[:, here] = grads.pop(0)
                for i, found in enumerate(grads):
                    if found is not None:
                        sums[i] = found if sums[i] is None else sums[i].add_(found)
                del part, out, grads  # else they would exist beside the next tile
        left = iter(sums)
        return None, None, None, None, d_hidden, *(next(left) if needed else None for needed in needs[1:])


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not list(module.children())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")


def _is_mlp(name: str, module: nn.Module) -> bool:
    """A decoder layer's `mlp` that takes and returns one tensor; a router's experts are not."""
    return name == "mlp" and not any(hasattr(module, part) for part in ("experts", "router", "gate"))


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The model's stack of layers."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    return next(stacks, None)


def tile_mlps(model: nn.Module, tokens: int) -> int:
    """Make every MLP run over `tokens` positions at a time, recomputed in the backward; -> how many were found.

    Raises:
        ValueError: tokens < 1, or the model has no such module.
    """
    if tokens < 1:
        raise ValueError(f"mlp_chunk_tokens must be at least 1, not {tokens}")
    mlps = [module for name, module in model.named_modules() if _is_mlp(name.rsplit(".", 1)[-1], module)]
    if not mlps:
        raise ValueError(f"{type(model).__name__} has no module named mlp to run in chunks; leave mlp_chunk_tokens off")
    for mlp in mlps:
        _tile(mlp, tokens)
    return len(mlps)


def tile_layers(model: nn.Module, tokens: int) -> int:
    """Make norms, projections and MLPs run over `tokens` positions at a time, recomputed in the backward; -> how many.

    Attention itself is left as it is, and so are the experts of a mixture and whatever else mixes tokens.

    Raises:
        ValueError: tokens < 1, or the model's layers were not found.
    """
    if tokens < 1:
        raise ValueError(f"layer_chunk_tokens must be at least 1, not {tokens}")
    layers = decoder_layers(model)
    if layers is None:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers; leave layer_chunk_tokens off")
    found = [part for layer in layers for part in _pointwise(layer)]
    after = [m for m in model.get_decoder().children() if is_norm(m)]
    for module in (*found, *after):
        _tile(module, tokens)
    return len(found) + len(after)


def _pointwise(module: nn.Module) -> Iterator[nn.Module]:
    for name, part in module.named_children():
        if is_norm(part) or _is_linear(part) or _is_mlp(name, part):
            yield part
        elif not any(hasattr(part, inner) for inner in ("experts", "router", "gate")):
            yield from _pointwise(part)


def _tile(module: nn.Module, tokens: int) -> None:
    if isinstance(module.forward, Tiles):
        module.forward.tokens = tokens
    else:
        module.forward = Tiles(module, tokens)
