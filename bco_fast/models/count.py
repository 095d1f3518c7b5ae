"""What an optimizer step holds in memory, counted before a weight is read.

A model of two decoder layers runs forward and backward on fake tensors, which have shapes and no memory, through the
model's own code, adapters, checkpoints and tiles. A dispatch mode adds up the storages that are alive; the layers that were
left out are added as copies of the second. So no formula has to follow what a model family or a switch does.

Not seen from Python, and added: the workspace of the fused head, and what FlashAttention's backward allocates on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from ..head.tiling import CPU_TILE_BYTES
from .attention import PREFIX
from .groups import Lookups, group_sizes
from .live import Live
from .load import add_adapter
from .memory import free_embeddings, offload_activations
from .patch import ROWS, TARGETS, patch_model
from .tiles import Tiles, decoder_layers, is_norm, tile_layers, tile_mlps

if TYPE_CHECKING:
    from ..training.config import FeedbackConfig

LAYERS = 2
"""Of the model that is run: the first is the last to be recomputed, the second stands for all others."""
LOW = torch.bfloat16.itemsize

MOMENTS = {"sgd": 0.0, "adafactor": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0}
"""Numbers that an optimizer keeps of each trained one; two where it is not named here."""


@dataclass
class Memory:
    """Bytes of a step at its fullest moment, and what of it the moment is made of."""

    moment: str
    """forward, head, layer (its recomputation and backward) or ends (embeddings)"""
    parts: dict[str, float]
    """weights, optimizer, gradients, checkpoints (what the layers keep) and the moment's own tensors, by its name"""
    host: float
    """In host memory: offloaded activations and paged optimizer states."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class _Trace:
    """One micro-batch of a model of `LAYERS` layers."""

    weights: float
    """Of the whole model."""
    moments: float
    host_moments: float
    layer_gradients: float
    gradients: float
    """Of the whole model."""
    activations: dict[str, float] = field(default_factory=dict)
    """The most there were in each phase."""
    made: dict[str, float] = field(default_factory=dict)
    """Gradients of weights that existed at the end of each phase."""
    kept_forward: float = 0.0
    """What a layer leaves behind while the forward runs, and while the backward does."""
    kept: float = 0.0
    largest: float = 0.0
    """The largest gradient."""
    host_layer: float = 0.0
    """Offloaded by each layer, and altogether."""
    host: float = 0.0
    looked_up: bool = False
    """Whether the first layer's input is what the embeddings return."""


def count_step(config: PretrainedConfig, options: FeedbackConfig | Namespace, tokens: int, **where) -> Memory:
    """Count one optimizer step; see `count_steps`."""
    return count_steps(config, options, tokens, [getattr(options, "layer_checkpoints", None)], **where)[0]


def count_steps(
    config: PretrainedConfig,
    options: FeedbackConfig | Namespace,
    tokens: int,
    checkpoints: Iterable[int | None],
    *,
    rows: int = 1,
    completion: int | None = None,
    device: str = "cuda",
    peft_config=None,
) -> list[Memory]:
    """Count one optimizer step, from the second on, when the optimizer has its state, for each number of checkpoints.

    Args:
        config: of a causal language model of transformers.
        options: what of `FeedbackConfig` decides about memory.
        tokens: of each of the `rows` of a micro-batch, padding included.
        checkpoints: in place of the options' `layer_checkpoints`.
        completion: how many of them are scored, in each row; all by default.
        device: "cuda" or "cpu", where it would run.
        peft_config: of the adapter, in place of the one that `options` describe.

    Raises:
        ValueError: the model cannot be counted; names the reason.
    """
    try:
        trace = _trace(config, options, tokens, rows, completion or tokens - 1, device, peft_config)
    except (DataDependentOutputException, UnsupportedOperatorException, DynamicOutputShapeException) as error:
        name = (config.architectures or [type(config).__name__])[0]
        raise ValueError(f"{name} cannot be counted: what it computes depends on values ({error})") from None
    layers = config.get_text_config().num_hidden_layers
    made, offloaded = [], options.activation_offloading
    for most in checkpoints:
        grouped = most is not None and checkpointed(options)
        sizes = group_sizes(layers, most, offloaded=offloaded) if grouped else [1] * layers
        own = [min(size, most - index) if grouped and not offloaded else size for index, size in enumerate(sizes)]
        made.append(_fullest(trace, sizes, own, grouped and trace.looked_up, options.gradient_accumulation_steps > 1))
    return made


def _fullest(trace: _Trace, sizes: list[int], own: list[int], looked_up: bool, accumulated: bool) -> Memory:
    """Of all moments of a step with groups of these sizes. In the backward of group g, the g groups before it have kept
    their input, and its own layers own[g] hidden states.

    looked_up: the first layer's input is made again from the token ids.
    """
    groups, layers = len(sizes), sum(sizes)
    moments = []

    def add(phase: str, kept: int, behind: int = 0, inner: int = 0) -> None:
        if phase not in trace.activations:
            return
        forward = phase in ("forward", "head")
        each = trace.kept_forward if forward else trace.kept
        gradients = trace.made[phase] + behind * trace.layer_gradients
        if accumulated:
            gradients = trace.gradients + (0 if forward else trace.largest)
        in_trace = {"forward": 1, "head": LAYERS, "layer 1": LAYERS, "layer 0": 1}.get(phase, 0)
        name = phase.split()[0]
        parts = {"weights": trace.weights, "optimizer": trace.moments, "gradients": gradients}
        parts |= {
            "checkpoints": kept * each + inner * trace.host_layer,
            name: trace.activations[phase] - in_trace * each,
        }
        host = trace.host_moments + trace.host + (groups - LAYERS - looked_up) * trace.host_layer
        moments.append(Memory(name, parts, host))

    add("forward", groups - 1)
    add("head", groups - looked_up)
    for index, size in enumerate(sizes):
        add("layer 1", index + own[index] - looked_up, layers - sum(sizes[: index + 1]), size - 1)
    add("layer 0", 1, layers - LAYERS)
    add("ends", 0, layers - LAYERS)
    return max(moments, key=lambda memory: memory.total)


def small_model(
    config: PretrainedConfig, options: FeedbackConfig | Namespace, device: str, peft_config=None, layers: int = LAYERS
) -> nn.Module:
    """A model of that config with few layers, prepared as training would, on the meta device."""
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = layers
    if getattr(config.get_text_config(), "layer_types", None):
        config.get_text_config().layer_types = config.get_text_config().layer_types[-layers:]
    attention = options.attn_implementation or getattr(config, "_attn_implementation", None) or "sdpa"
    attention = attention.removeprefix(PREFIX)
    attention = attention if attention == "eager" else _register(f"counted_{device}", device != "cpu")
    dtype = weights_dtype(config, options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if options.use_peft or peft_config is not None:
            model = add_adapter(model, options, peft_config, quiet=True)
    patch_model(model, backend="torch", workspace_bytes=options.workspace_bytes, verify=False)
    if options.mlp_chunk_tokens is not None:
        tile_mlps(model, options.mlp_chunk_tokens)
    if options.layer_chunk_tokens is not None:
        tile_layers(model, options.layer_chunk_tokens)
    for module in model.modules():
        if isinstance(module.forward, Tiles):
            module.forward.most = 2
    if checkpointed(options):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        free_embeddings(model)
    return model.train()


def _to_fake(model: nn.Module) -> None:
    """From the meta device to fake tensors of the CPU, which autocast and attention treat as those of a real one."""
    made: dict[int, Tensor] = {}  # tied weights stay one

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            given = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if given else empty
        return made[id(tensor)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})


def weights_dtype(config: PretrainedConfig, options: FeedbackConfig | Namespace) -> torch.dtype:
    """Of a model that `load_model` loads."""
    if options.model_dtype != "auto":
        return getattr(torch, options.model_dtype)
    stored = getattr(config, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return stored if options.use_peft or options.load_in_4bit or options.load_in_8bit else torch.float32


def checkpointed(options: FeedbackConfig | Namespace) -> bool:
    return bool(getattr(options, "activation_checkpointing", None) or options.gradient_checkpointing)


def _trace(config, options, tokens: int, rows: int, completion: int, device: str, peft_config) -> _Trace:
    model = small_model(config, options, device, peft_config)
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        _to_fake(model)
        layers = decoder_layers(model)
        live = Live(functools.partial(_inside, device))
        for tensor in (*model.parameters(), *model.buffers()):
            live.leave_out(tensor)
        trace = _parameters(model, layers, config.get_text_config().num_hidden_layers, options)
        marks = _watch(live, layers, model)
        shape = torch.Size((rows, tokens))
        saved = _Offloaded(live, shape) if options.activation_offloading else contextlib.nullcontext()
        low = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else None
        with live:
            live.enter("forward")
            ids = torch.zeros(rows, tokens, dtype=torch.int64)
            places = torch.zeros(rows * completion, dtype=torch.int64)
            with saved, torch.autocast("cpu", low, enabled=low is not None):
                wanted = {TARGETS: places, ROWS: places}
                loss = model(input_ids=ids, use_cache=False, **wanted).logits.sum()
            loss.backward()
        trace.activations = {phase: peak for phase, peak in live.peaks.items() if phase}
        trace.made = live.made
        trace.kept_forward = marks["after"] - marks["between"]
        trace.kept = live.begins["layer 1"] - live.begins["layer 0"] if "layer 0" in live.begins else 0.0
        trace.host_layer, trace.host = marks["host after"] - marks["host between"], live.host
        trace.looked_up = marks["looked up"]
    return trace


class _Offloaded(offload_activations):
    """Host memory that is counted."""

    def __init__(self, live: Live, shape: torch.Size):
        super().__init__(shape, "cpu")
        self.live = live

    def host(self, tensor: Tensor) -> Tensor:
        copied = super().host(tensor)
        self.live.leave_out(copied)
        self.live.host += copied.nbytes
        return copied


def _watch(live: Live, layers: nn.ModuleList, model: nn.Module) -> dict[str, float]:
    """Marks the phases of a step; -> bytes between the layers and after them, filled in while it runs."""
    marks: dict[str, float] = {}
    lookups = Lookups(model)

    def after(index: int):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(lambda _: live.enter(f"layer {index}"))
            if index == LAYERS - 1:
                live.enter("head")

        return hook

    def before(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        marks["looked up"] = lookups.of(hidden) is not None
        if hidden.requires_grad:
            hidden.register_hook(lambda _: live.enter("ends"))

    for index, layer in enumerate(layers):
        layer.register_forward_hook(after(index))
    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    layers[1].register_forward_pre_hook(lambda *_: marks.update({"between": live.now, "host between": live.host}))
    last = next((m for m in model.get_decoder().children() if is_norm(m)), model.get_output_embeddings())
    last.register_forward_pre_hook(lambda *_: marks.update({"after": live.now, "host after": live.host}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(live.gradient)
    return marks


def _parameters(model: nn.Module, layers: nn.ModuleList, count: int, options) -> _Trace:
    """Weights, gradients and moments of the whole model, whose other layers are like the second."""
    ours, repeated = {id(p): p for p in model.parameters()}, {id(p): p for p in layers[1].parameters()}
    linear = {id(m.weight) for m in layers[1].modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    share = 0.516 / LOW if options.load_in_4bit else 1 / LOW if options.load_in_8bit else 1.0

    def of_all(size: Callable[[Tensor], float]) -> float:
        return sum(size(p) * (1 + (count - LAYERS) * (key in repeated)) for key, p in ours.items())

    linear |= {id(p) for p in layers[0].parameters() if p.dim() == 2 and not p.requires_grad}
    weights = of_all(lambda p: p.nbytes * (share if id(p) in linear else 1.0))
    weights += sum(buffer.nbytes for buffer in model.buffers())
    gradients = of_all(lambda p: p.nbytes * p.requires_grad)
    numbers = of_all(lambda p: p.numel() * p.requires_grad)
    name = getattr(options.optim, "value", options.optim)
    kept = next((n for kind, n in MOMENTS.items() if kind in name), 2.0)
    moments = kept * (0.5 * numbers if "4bit" in name else numbers if "8bit" in name else gradients)
    return _Trace(
        weights,
        0.0 if name.startswith("paged") else moments,
        moments if name.startswith("paged") else 0.0,
        sum(p.nbytes for p in repeated.values() if p.requires_grad),
        gradients,
        largest=max((p.nbytes for p in ours.values() if p.requires_grad), default=0),
    )


class _Attention(torch.autograd.Function):
    """What FlashAttention keeps and allocates, with nothing computed: no more on a CPU, and on a GPU, in the backward,
    float32 sums of dq, and dk and dv of each query head before those that share a key are added up."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, gpu: bool) -> Tensor:  # [B, heads, T, head size]
        out = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
        ctx.gpu = gpu
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *_ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32) if ctx.gpu else None
        each = [torch.empty_like(query) for _ in range(2)] if ctx.gpu and query.shape[1] != key.shape[1] else None
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        del sums, each
        return *grads, None


def _register(name: str, gpu: bool) -> str:
    def attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options):
        return _Attention.apply(query, key, value, gpu).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **options: None)
    return name


def _inside(device: str, func, args: tuple) -> int:
    """Bytes that the fused head allocates and frees before it returns."""
    name = func.name()
    if not name.startswith("bco_fast::linear_logps"):
        return 0
    (hidden, weight), workspace = (args[2][:2], args[8]) if name.endswith("backward") else (args[:2], args[9])
    n, d = hidden.shape
    low = 4 * n * d * (hidden.dtype.itemsize < 4)  # sums in float32
    if device != "cpu":
        return min(workspace, 8 * n * len(weight)) + low
    return min(workspace, 3 * CPU_TILE_BYTES, 12 * n * len(weight)) + 4 * n * d + low
