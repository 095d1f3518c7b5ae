"""Log-probabilities of given tokens straight from hidden states and the lm-head weight; the logits never exist."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from . import autograd as _ops
from .types import HeadSpec, smallest_workspace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INDEX_DTYPES = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadStats:
    """Filled in by the backward of `fused_linear_logps(..., stats=stats)`; None before."""

    def __init__(self) -> None:
        self._report = torch.full((2,), math.nan, dtype=torch.float64)

    @property
    def rho(self) -> float | None:
        """Share of (row, vocabulary tile) cells that the backward computed, of the rows into which a gradient came; 1.0
        for the dense, exact backward."""
        return self._read(0)

    @property
    def certified(self) -> float | None:
        """Proved bound on the relative L1 error of the logits' gradient; 0.0 for the dense, exact backward."""
        return self._read(1)

    def clear(self) -> None:
        """As if no backward had filled it in."""
        self._report.fill_(math.nan)

    def _read(self, index: int) -> float | None:
        value = float(self._report[index])
        return None if math.isnan(value) else value

    def __repr__(self) -> str:
        return f"HeadStats(rho={self.rho}, certified={self.certified})"


def fused_linear_logps(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64 or int32
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: Literal["auto", "triton", "torch", "reference"] = "auto",
    workspace_bytes: int = 256 << 20,
    sparse_tolerance: float = 0.0,
    vocab_order: Tensor | None = None,  # [V] int64
    stats: HeadStats | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under an lm-head, without the [tokens, vocabulary] logits.

    The same as these lines, in float32 whatever the inputs are, with memory bounded by `workspace_bytes`:

        logits = hidden @ weight.T (+ bias), then * logit_scale, softcap * tanh(. / softcap), / temperature
        logps = log_softmax(logits, -1).gather(-1, targets)            0 where targets == ignore_index

    `targets[i]` is the token that `hidden[i]` predicts: shift before calling. Rows that are ignored cost nothing.
    With a frozen head (weight and bias without gradient) the forward also keeps
    d logp / d hidden, so forward and backward together cost 4NDV FLOP; otherwise they cost 8NDV, (2 + 6 rho)NDV with a
    `sparse_tolerance`, and 2NDV without gradient. The order of operations is that of the model families: Cohere and Granite scale, Gemma 2 caps.

    Args:
        hidden: last hidden states; float32, bfloat16, float16 or float64; any leading shape.
        weight: lm-head weight, the dtype and device of hidden. Under autocast both are cast to its dtype.
        targets: token ids in [0, V), or `ignore_index`; the leading shape of hidden.
        bias: lm-head bias. -inf masks a token out of the vocabulary.
        logit_scale: multiplies the logits (Cohere's logit_scale, 1 / Granite's logits_scaling); finite, not 0.
        softcap: final_logit_softcapping of Gemma 2, > 0; None for none.
        temperature: divides the logits last; > 0.
        return_entropy: also return the entropy of each row's distribution, in nats; differentiable.
        backend: "triton" (a GPU, or TRITON_INTERPRET=1), "torch" (any device), "reference" (float64, materialises the
            logits), or "auto": triton on a GPU that it supports, torch elsewhere. A named backend never falls back.
        workspace_bytes: hard cap on logits tiles, their gradients, partial products and statistics; at least 32 KiB
            and 64 bytes a hidden unit, with a `sparse_tolerance` 8 KiB a hidden unit. On top come the results, a few numbers a row, and 4ND bytes: on a GPU the
            float32 sums of the gradient of hidden, on the CPU a float32 copy of hidden (with low-precision inputs
            both). Where rows are ignored, the others are copied. With a `sparse_tolerance` also the mass table, 4 bytes
            for every row and 256 tokens of the vocabulary, and in the backward about 25 bytes for each that is kept.
        sparse_tolerance: 0.0 for the dense, exact backward. In (0, 1): the backward of a trainable head leaves out
            (row, 256 tokens) cells of the logits' gradient dZ, those of least mass, such that
            |dZ - dZ~|_1 <= sparse_tolerance |dZ|_1 is certain, and takes the dense way when that costs less. The
            forward is the same bit for bit. A frozen head and a gradient of the entropy are always exact.
        vocab_order: a permutation of the token ids, such as `bco_fast.frequency_order` of the training data. Cells are
            256 tokens of this order: where frequent tokens stand together, fewer are kept. Changes nothing else.
        stats: filled in by the backward.
        process_group: the vocabulary is sharded over its ranks: weight and bias hold this rank's rows, in rank order
            and of any sizes that stay the same; hidden and targets are the same on all ranks, and so are the results
            and the gradient of hidden. One all-gather of 4 numbers a token, one all-reduce of d hidden.

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
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # meta has none
        lower = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(lower), weight.to(lower)
        bias = None if bias is None else bias.to(lower)
    _check_tensors(hidden, weight, targets, bias)
    smallest = smallest_workspace(weight.shape[1], sparse=sparse_tolerance > 0.0)
    if workspace_bytes < smallest:
        raise ValueError(f"workspace_bytes must be at least {smallest} (one small tile), not {workspace_bytes}")
    spec = _check_options(logit_scale, softcap, temperature, backend, sparse_tolerance)
    _check_order(vocab_order, weight)
    if process_group is None:
        linear_logps = _ops.linear_logps
    else:
        from . import vocab_parallel as _parallel

        linear_logps = functools.partial(_parallel.linear_logps, group=process_group)
    logps, entropy = linear_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1).long(),
        bias,
        spec,
        ignore_index=ignore_index,
        entropy=return_entropy,
        backend=backend,
        workspace_bytes=workspace_bytes,
        sparse_tolerance=float(sparse_tolerance),
        vocab_order=vocab_order,
        stats=None if stats is None else stats._report,
    )
    logps = logps.view(targets.shape)
    return (logps, entropy.view(targets.shape)) if return_entropy else logps


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, not {hidden.dtype}")
    if weight.dtype != hidden.dtype:
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


def _check_options(
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    sparse_tolerance: float,
) -> HeadSpec:
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be finite and not 0, not {logit_scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be > 0 or None, not {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0, not {temperature}")
    if backend not in _ops.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_ops.BACKENDS)}, not {backend!r}")
    if not 0.0 <= sparse_tolerance < 1.0:
        raise ValueError(f"sparse_tolerance must be in [0, 1), not {sparse_tolerance}")
    if sparse_tolerance > 0.0 and backend == "reference":
        raise ValueError("backend='reference' is exact: it takes no sparse_tolerance")
    return HeadSpec(float(logit_scale), None if softcap is None else float(softcap), float(temperature))


def _check_order(order: Tensor | None, weight: Tensor) -> None:
    if order is None:
        return
    if order.dtype != torch.int64 or order.shape != weight.shape[:1] or order.device != weight.device:
        raise ValueError(
            f"vocab_order must be int64 [{weight.shape[0]}] on {weight.device}, not {order.dtype} {list(order.shape)} "
            f"on {order.device}"
        )
    if order.device.type == "cpu" and not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError("vocab_order is not a permutation of the token ids")


def frequency_order(
    counts: Tensor,  # [V]
) -> Tensor:  # [V] int64
    """The token ids by falling count or mass, ties in the order of the ids: a `vocab_order` for `fused_linear_logps`."""
    if counts.dim() != 1:
        raise ValueError(f"counts must be [V], not {list(counts.shape)}")
    return counts.argsort(descending=True, stable=True)
