"""Where a model's hidden states meet its lm-head: the head returns log-probabilities when targets are set.

The head runs inside the model's own forward, so the hooks of DDP, FSDP and PEFT fire as usual. Without targets the
model behaves as before: generation, saving and evaluation by others are untouched, parameter names included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from ..head.linear_logps import head_logps
from ..head.types import Backend, HeadOptions, HeadSpec, HeadStats
from .attention import is_flash, knows_segments, segment_mask
from .load import refuse_sharded

TARGETS = "logp_targets"
ROWS = "logp_rows"
ENTROPY = "logp_entropy"


class _Switch(NamedTuple):
    """Arithmetic that a model family applies to the logits after lm_head. The operator does it instead, so it is
    switched off in the model during calls that return log-probabilities."""

    owner: object
    name: str
    value: object
    neutral: object


@dataclass
class _HeadCall:
    """What the patched head needs; targets and rows only during a forward pass that wants log-probabilities."""

    options: HeadOptions
    logit_scale: float = 1.0
    softcap: float | None = None
    switches: list[_Switch] = field(default_factory=list)
    targets: Tensor | None = None
    rows: Tensor | None = None
    entropy: bool = False


class _LogpLinear(nn.Linear):
    """An lm-head. It is the original module under this class, so weights, ties, hooks and names stay what they were."""

    bco_fast: _HeadCall
    planned: Callable[[Tensor], Tensor] | None = None
    """The forward that a tensor-parallel plan has put before the class's, for logits."""

    def forward(self, hidden: Tensor) -> Tensor:
        call = self.bco_fast
        if call.targets is None:
            return super().forward(hidden) if self.planned is None else self.planned(hidden)
        ignore_index: int | None = -100
        if call.rows is not None:  # every row is asked for, so nothing has to be searched
            hidden, ignore_index = hidden.flatten(0, -2).index_select(0, call.rows), None
        spec = HeadSpec(call.logit_scale, call.softcap)
        # The entropy is only read: a gradient of 0 through it would cost as much as any other.
        how = {"ignore_index": ignore_index, "return_entropy": call.entropy, "entropy_grad": False}
        weight, bias, group = _own_vocabulary(self)
        out = head_logps(hidden, weight, call.targets, bias, spec, call.options, process_group=group, **how)
        return torch.stack(out, dim=-1) if call.entropy else out


def _own_vocabulary(head: nn.Linear) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """The head's weight and bias on this rank, and the ranks that share the vocabulary.

    Where a plan of tensor parallelism cuts the vocabulary, a plan that gathers the logits gathers none here: each rank
    sums over its own tokens. A weight that is cut otherwise is gathered.
    """
    weight, bias, group = head.weight, head.bias, None
    if isinstance(weight, DTensor):
        if weight.placements == (Shard(0),):
            group, weight = weight.device_mesh.get_group(), weight.to_local()
        else:
            weight = weight.full_tensor()
        if isinstance(bias, DTensor):
            bias = bias.full_tensor() if group is None else bias.to_local()
    return weight, bias, group


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _move_post_head(model: nn.Module, call: _HeadCall) -> None:
    """Find what the model does to its logits after lm_head, and hand it to the operator."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "final_logit_softcapping", None):  # Gemma 2
        call.softcap = float(text.final_logit_softcapping)
        call.switches.append(_Switch(text, "final_logit_softcapping", text.final_logit_softcapping, None))
    if getattr(text, "logits_scaling", 1.0) != 1.0:  # Granite divides
        call.logit_scale = 1.0 / float(text.logits_scaling)
        call.switches.append(_Switch(text, "logits_scaling", text.logits_scaling, 1.0))
    for owner in model.modules():  # Cohere multiplies; the model reads its own copy
        if isinstance(vars(owner).get("logit_scale"), (int, float)) and owner.logit_scale != 1.0:
            call.logit_scale = float(owner.logit_scale)
            call.switches.append(_Switch(owner, "logit_scale", owner.logit_scale, 1.0))


def _linears(model: nn.Module) -> list[nn.Module]:
    """The modules that may act as lm-head: one, or with PEFT's `modules_to_save` the original and each adapter's copy."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


# The hooks find their head through the module they are called on, so that a deep copy of a model uses its own.
def _set_targets(model: nn.Module, args: tuple, kwargs: dict):
    if TARGETS not in kwargs:
        return None
    asked = {"targets": kwargs.pop(TARGETS), "rows": kwargs.pop(ROWS, None), "entropy": kwargs.pop(ENTROPY, False)}
    for linear in _linears(model):
        if not isinstance(linear, _LogpLinear):  # FSDP2 makes a subclass of its class
            raise TypeError(_refusal(model, linear))
        vars(linear.bco_fast).update(asked)
        for switch in linear.bco_fast.switches:
            setattr(switch.owner, switch.name, switch.neutral)
    return args, kwargs


def _clear_targets(model: nn.Module, args: tuple, output) -> None:
    for linear in _linears(model):
        if isinstance(linear, _LogpLinear) and linear.bco_fast.targets is not None:
            vars(linear.bco_fast).update(targets=None, rows=None, entropy=False)
            for switch in linear.bco_fast.switches:
                setattr(switch.owner, switch.name, switch.value)


def _refusal(model: nn.Module, head: nn.Module | None) -> str:
    return (
        f"the lm-head of {type(model).__name__} is {type(head).__name__}, not a plain nn.Linear: a quantised head or an "
        "adapter on it cannot be fused. Leave lm_head out of quantisation and of the adapter's targets "
        '(modules_to_save=["lm_head"] trains it whole).'
    )


def _check_kind(model: nn.Module) -> None:
    """Refuse by name what is not a causal language model."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; bco_fast trains causal language models")
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"{name} uses {adapter.peft_type.value}: virtual tokens shift every position, which is not supported; "
                "use LoRA"
            )


def patch_model(
    model: nn.Module,
    *,
    backend: Backend = "auto",
    workspace_bytes: int = 256 << 20,
    sparse_tolerance: float = 0.0,
    stats: HeadStats | None = None,
    verify: bool = True,
) -> nn.Module:
    """Make a Hugging Face causal model return token log-probabilities when it is called with `logp_targets`.

        logps = model(input_ids, attention_mask=mask, logp_targets=targets, use_cache=False).logits     # [B, T]

    `logp_targets[b, t]` is the token that position t predicts, -100 where none is asked for. With `logp_rows` [K], the
    positions of the flattened hidden states that predict, targets and result are [K] (`data.batch` makes both). With
    `logp_entropy=True` the result gets a last dimension of 2, log-probabilities and entropies, the latter without
    gradient. Any other call is unchanged. The model is patched in place; patching it again only updates the options.

    A model that transformers loaded with a tensor-parallel plan keeps its vocabulary cut over the ranks: targets must be
    the same on all of them, and so are the results.

    Args:
        model: a causal language model whose output embedding is a plain `nn.Linear`; one that also reads images or sound
            is used on text.
        backend, workspace_bytes, sparse_tolerance, stats: see `fused_linear_logps`.
        verify: compare with the model's own logits on four tokens, and refuse a model that does something to its
            logits which this library does not know.

    Returns:
        The same model.

    Raises:
        TypeError: the model has no lm-head, or it is not a plain `nn.Linear` (quantised, or with an adapter on it).
        ValueError: the model is an encoder-decoder, prompt-tuned, or was sharded by ZeRO-3 while it was loaded; or the
            log-probabilities are not those of its logits.
    """
    _check_kind(model)
    refuse_sharded(model)
    linears = _linears(model)
    for linear in linears:
        if type(linear) not in (nn.Linear, _LogpLinear):
            raise TypeError(_refusal(model, linear))
    options = HeadOptions(backend, workspace_bytes, sparse_tolerance, stats)
    fresh = [linear for linear in linears if type(linear) is nn.Linear]
    for linear in linears:
        if linear not in fresh:
            linear.bco_fast.options = options
    if not fresh:
        return model
    call = _HeadCall(options)
    _move_post_head(model, call)
    known = not any(p.is_meta for p in model.parameters())
    if verify and known:
        _verify_logits(model, linears[-1], call)
    for linear in fresh:
        linear.__class__ = _LogpLinear
        linear.bco_fast = call
        linear.planned = vars(linear).pop("forward", None)
    model.register_forward_pre_hook(_set_targets, with_kwargs=True)
    model.register_forward_hook(_clear_targets, always_call=True)
    return model


@torch.no_grad()
def _verify_logits(model: nn.Module, head: nn.Linear, call: _HeadCall) -> None:
    """Compare the model's logits with what we know of its head, both in float32 and from the same hidden states.

    Through the whole model in bfloat16, the rounding of logits near 30 would hide a wrong scale of 0.9.
    """
    raw: list[Tensor] = []

    def in_float32(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        bias = torch.zeros((), device=output.device) if head.bias is None else _whole(head.bias).float()
        pieces = [F.linear(args[0].float(), part.float()) for part in _whole(head.weight).split(1 << 13)]
        raw.append(torch.cat(pieces, dim=-1) + bias)  # the weight is never copied whole in float32
        return raw[0]

    training, hook = model.training, head.register_forward_hook(in_float32)
    model.eval()
    try:
        tokens = torch.arange(1, 5, device=head.weight.device)[None] % head.weight.shape[0]
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
        model.train(training)
    ours = raw[0] * call.logit_scale
    if call.softcap is not None:
        ours = call.softcap * torch.tanh(ours / call.softcap)
    if logits.shape != ours.shape or not (logits.log_softmax(-1) - ours.log_softmax(-1)).abs().max() <= 1e-4:
        raise ValueError(
            f"{type(model).__name__} does something to its logits after lm_head that bco_fast does not know: its "
            "log-probabilities and ours differ by more than 1e-4. Please open an issue with its name."
        )


class HeadOutput(NamedTuple):
    """What one forward pass of a patched model says about the targets."""

    logps: Tensor
    """[K], or the shape of the targets where the batch has no rows; float32, nats."""
    entropy: Tensor | None
    """The same shape."""
    aux_loss: Tensor | None
    """The load-balancing loss of a mixture of experts, unweighted, if its config asks for it (output_router_logits)."""


def forward_logps(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    return_entropy: bool = False,
) -> HeadOutput:
    """Run a patched model on a batch of the form that `data.batch` describes.

    Our batches are padded on the right, where causal attention does not look, so attention runs without a mask, with the
    kernels that need none; only the load-balancing loss of a mixture of experts reads it. A batch from another trainer may
    have targets [B, T], -100 where none is asked for, in place of rows and targets [K]; its mask is passed on.
    """
    config = getattr(model, "module", model).config  # of what DDP or DeepSpeed wraps
    names = ["input_ids", "position_ids"]
    if "rows" not in batch or getattr(config, "output_router_logits", False):
        names += ["attention_mask"]
    segmented = "segments" in batch and knows_segments(config)
    if is_flash(config) and not segmented:
        names += ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"]
    inputs = {name: batch[name] for name in names if name in batch}
    if segmented:
        whole_layers = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        device = batch["input_ids"].device
        inputs["attention_mask"] = segment_mask(batch["segments"], device, regather=not whole_layers)
    asked = {TARGETS: batch["targets"]} | ({ROWS: batch["rows"]} if "rows" in batch else {})
    if return_entropy:
        asked[ENTROPY] = True
    out = model(**inputs, use_cache=False, **asked)
    logps, entropy = out.logits.unbind(-1) if return_entropy else (out.logits, None)
    return HeadOutput(logps, entropy, getattr(out, "aux_loss", None))


def completion_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probabilities alone; see `forward_logps`."""
    return forward_logps(model, batch).logps


def logp_budget(model: nn.Module, *, autocast: bool = False) -> float:
    """How far two computations of a mean log-probability per token may lie apart, in nats.

    Batches of another shape round differently: by a few units in the last place of the computation's dtype, on logits of
    any size.
    """
    return 0.05 if autocast or next(model.parameters()).dtype.itemsize < 4 else 1e-3
