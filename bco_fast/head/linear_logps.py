"""Log-probabilities of given tokens straight from hidden states and the lm-head weight; the logits never exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import autograd
from .tiling import smallest_workspace
from .types import Backend, HeadInputs, HeadOptions, HeadSpec, HeadStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HeadOptions", "HeadSpec", "HeadStats", "fused_linear_logps", "head_logps"]

_INDEX_DTYPES = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def fused_linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    return_entropy: Literal[False] = False,
    backend: Backend = "auto",
    workspace_bytes: int = 256 << 20,
    sparse_tolerance: float = 0.0,
    stats: HeadStats | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor: ...
@overload
def fused_linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    return_entropy: Literal[True],
    backend: Backend = "auto",
    workspace_bytes: int = 256 << 20,
    sparse_tolerance: float = 0.0,
    stats: HeadStats | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]: ...
def fused_linear_logps(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64 or int32
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    backend: Backend = "auto",
    workspace_bytes: int = 256 << 20,
    sparse_tolerance: float = 0.0,
    stats: HeadStats | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under an lm-head, without the [tokens, vocabulary] logits.

    The same as these lines, in float32 whatever the inputs are, with memory bounded by `workspace_bytes`:

        logits = hidden @ weight.T (+ bias), then * logit_scale, softcap * tanh(. / softcap), / temperature
        logps = log_softmax(logits, -1).gather(-1, targets)            0 where targets == ignore_index

    `targets[i]` is the token that `hidden[i]` predicts: shift before calling. With a frozen head (weight and bias without
    gradient) the forward also computes d logp / d hidden, and forward and backward together take 4NDV FLOP. A trainable
    head takes 8NDV, or (2 + 6 kept_fraction) NDV with a `sparse_tolerance`; without gradient it is 2NDV.

    Args:
        hidden: last hidden states; float32, bfloat16, float16 or float64; any leading shape.
        weight: lm-head weight, the dtype and device of hidden. Autocast casts hidden, and float32 weights chunk by chunk:
            no second copy of them exists, and their gradient is float32, unrounded.
        targets: token ids in [0, V), or `ignore_index`; the leading shape of hidden.
        bias: lm-head bias. -inf masks a token out of the vocabulary.
        logit_scale: multiplies the logits (Cohere's logit_scale, 1 / Granite's logits_scaling); finite, not 0.
        softcap: final_logit_softcapping of Gemma 2, > 0; None for none.
        temperature: divides the logits last; > 0.
        ignore_index: rows with this target cost nothing and get 0; finding them reads one number back from the GPU in
            the forward and one in the backward. None: every row counts, and nothing is read back.
        return_entropy: also return the entropy of each row's distribution, in nats; differentiable.
        backend: "triton" (a GPU, or TRITON_INTERPRET=1), "torch" (any device), "reference" (float64, materialises the
            logits), or "auto": triton on a GPU that it supports, torch elsewhere. A named backend never falls back.
        workspace_bytes: hard cap on logits tiles, their gradients, partial products and statistics; at least 32 KiB
            and 64 bytes per hidden unit (8 KiB with a `sparse_tolerance`). Not included: the results, a few numbers a
            row, and 4ND bytes, which on a GPU are the float32 sums of the gradient of hidden, on the CPU a float32
            copy of hidden (with low-precision inputs both). Where rows are ignored, the others are copied. A
            `sparse_tolerance` adds the mass table, 4 bytes for every row and 256 tokens of the vocabulary, and in the
            backward about 25 bytes for each of these blocks that is kept.
        sparse_tolerance: 0.0 for the dense, exact backward. In (0, 1): the backward of a trainable head leaves out the
            (row, 256 tokens) blocks of the logits' gradient dZ with the least mass, such that
            |dZ - dZ~|_1 <= sparse_tolerance |dZ|_1 is guaranteed. It uses the dense backward where that is cheaper.
            The forward does not change. A frozen head and a gradient of the entropy are always exact.
        stats: filled in by the backward.
        process_group: the vocabulary is sharded over its ranks: weight and bias hold this rank's rows, in rank order.
            Shards may differ in size, but each must keep its size. hidden and targets are the same on all ranks, and
            so are the results and the gradient of hidden. One all-gather of 4 numbers a token, one all-reduce of
            d hidden.

    Returns:
        logps, in nats, the shape of targets; float32 (float64 for float64 inputs). With `return_entropy`
        (logps, entropy).

    Raises:
        TypeError: a dtype is not one of the above, or hidden and weight differ.
        ValueError: shapes or devices do not match, an option is out of range, or (CPU only) a value of hidden or
            weight is not finite.
        IndexError: (CPU only) a target is outside [0, V); names the row. On a GPU that row's logp is NaN.
        RuntimeError: the named backend cannot run here.
    """
    return head_logps(
        hidden,
        weight,
        targets,
        bias,
        HeadSpec(logit_scale, softcap, temperature),
        HeadOptions(backend, workspace_bytes, sparse_tolerance, stats),
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        process_group=process_group,
    )


def head_logps(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64 or int32
    bias: Tensor | None,  # [V]
    spec: HeadSpec,
    options: HeadOptions,
    *,
    ignore_index: int | None = None,
    return_entropy: bool = False,
    entropy_grad: bool = True,
    return_top1: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`fused_linear_logps` with its options in two records.

    Args:
        return_top1: return also whether the target is the most likely token, bool, in the shape of targets; with any
            backend but the reference, and without a process group. Of tokens that are equally likely, each is.
        entropy_grad: False where the entropy is only read: it then carries no gradient, and a frozen head saves
            nothing to recompute it from.
    """
    _check_types(hidden=hidden, weight=weight, targets=targets, **({} if bias is None else {"bias": bias}))
    autocast = not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type)
    if autocast:
        lower = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(lower)
        if weight.dtype != torch.float32:  # float32 master weights are cast chunk by chunk
            weight = weight.to(lower)
    _check_tensors(hidden, weight, targets, bias, autocast)
    spec.check()
    smallest = smallest_workspace(weight.shape[1], sparse=options.sparse_tolerance > 0.0)
    if options.workspace_bytes < smallest:
        raise ValueError(f"workspace_bytes must be at least {smallest} (one small tile), not {options.workspace_bytes}")
    scale, softcap, temperature = spec
    spec = HeadSpec(float(scale), None if softcap is None else float(softcap), float(temperature))
    inputs = HeadInputs(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1).long(), bias, spec)
    how = {"ignore_index": ignore_index, "entropy": return_entropy}
    if process_group is None:
        logps, entropy, row_sum = autograd.linear_logps(inputs, options, entropy_grad=entropy_grad, **how)
    else:
        from . import vocab_parallel

        logps, entropy = vocab_parallel.linear_logps(inputs, options, group=process_group, **how)
    out = (logps.view(targets.shape),)
    if return_entropy:
        out += ((entropy if entropy_grad else entropy.detach()).view(targets.shape),)
    if return_top1:  # the largest probability is e^0 / row_sum
        out += ((logps.detach() + row_sum.log() >= -8 * torch.finfo(logps.dtype).eps).view(targets.shape),)
    return out if len(out) > 1 else out[0]


def _check_types(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            advice = f": pass its .{name}" if isinstance(getattr(tensor, name, None), Tensor) else ""
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}{advice}")


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, autocast: bool) -> None:
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, not {hidden.dtype}")
    if weight.dtype != hidden.dtype and not (autocast and weight.dtype == torch.float32):
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them")
    if targets.dtype not in _INDEX_DTYPES:
        raise TypeError(f"targets must be int64 or int32 token ids, not {targets.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must be [V, D] with V, D > 0, not {list(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} disagree about D")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets {list(targets.shape)} must have the leading shape of hidden {list(hidden.shape)}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}], not {list(bias.shape)}")
        if not bias.dtype.is_floating_point:
            raise TypeError(f"bias must be floating point, not {bias.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} and {name} on {tensor.device}")
