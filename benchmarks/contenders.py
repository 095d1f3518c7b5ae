"""The fused head and its peers on the same inputs: what head_peers.py and gpu_suite.py run.

A contender is a function (hidden [N, D], weight [V, D], targets [N]) -> log-probabilities [N], or [1] where it gives a
sum only. Peers
are called as their packages ship them; what a peer does not offer is a `NotImplementedError` that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

WORKSPACE = 256 << 20
SPARSE_TOLERANCE = 2.0**-7
LOGITS = ("flat", "peaked")
LIFTS = {"peaked": (1, 3), "likely": (1.7, 3)}
"""Least and added lift of a target's hidden state, in rows of the weight."""


class Head:
    """One shape's inputs. Flat: logits are normal, so a target is as unlikely as any token. Peaked: a trained model's
    tokens; the target's logit is lifted by a random amount, and most targets are likely (their mean is about -1 nat). Likely:
    a large model's (about -0.2 nats of 128,256 tokens, where peaked ones have -1.4), of which a sparse backward keeps a tenth."""

    def __init__(
        self,
        shape: tuple[int, int, int, float | None],  # N, D, V, softcap
        device: str,
        dtype: torch.dtype,
        *,
        logits: str = "flat",
        workspace_bytes: int = WORKSPACE,
        weight: Tensor | None = None,  # [V, D], instead of one from the seed
    ):
        n, d, v, self.softcap = shape
        self.workspace_bytes = workspace_bytes
        self.stats = None  # of our last backward, where it may be sparse
        g = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(n, d, generator=g, device=device)
        self.targets = torch.randint(0, v, (n,), generator=g, device=device)
        self.upstream = torch.randn(n, generator=g, device=device)
        least, more = LIFTS.get(logits, (0, 0))
        lift = least + more * torch.rand(n, 1, generator=g, device=device)
        self.weight = head_weight(shape, device, dtype) if weight is None else weight
        if logits in LIFTS:
            self.hidden += lift * self.weight[self.targets].float()
        self.hidden = self.hidden.to(dtype)

    def step(self, logps: Callable, mode: str, *, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Forward and, but for mode "forward", backward; -> logps and gradients."""
        targets = self.targets[rows]
        if mode == "forward":
            with torch.no_grad():
                return {"logps": logps(self.hidden[rows], self.weight, targets)}
        hidden = self.hidden[rows].detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(mode == "trainable")
        out = logps(hidden, weight, targets)
        (out * self.upstream[rows][: len(out)]).sum().backward()
        grads = {"d_hidden": hidden.grad} | ({"d_weight": weight.grad} if mode == "trainable" else {})
        return {"logps": out.detach()} | grads

    def exact(self, rows: int, *, block: int = 64) -> Tensor:
        """Log-probabilities of the first rows, float64, in blocks that fit."""
        parts = []
        weight = self.weight.double()
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            logits = _capped(self.hidden[part].double() @ weight.T, self.softcap)
            parts.append(torch.log_softmax(logits, -1).gather(1, self.targets[part, None])[:, 0])
        return torch.cat(parts)


def head_weight(shape: tuple, device: str, dtype: torch.dtype) -> Tensor:
    """Logits of a standard normal hidden state have a standard deviation of 3."""
    _, d, v, _ = shape
    g = torch.Generator(device).manual_seed(1)
    return torch.randn(v, d, generator=g, device=device).mul_(3 / d**0.5).to(dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _without_softcap(head: Head, name: str) -> None:
    if head.softcap is not None:
        raise NotImplementedError(f"{name} has no softcap")


def plain(head: Head) -> Callable:
    def logps(hidden, weight, targets):
        logits = _capped(hidden @ weight.T, head.softcap)
        return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]

    return logps


def compiled(head: Head) -> Callable:
    return torch.compile(plain(head))


def ours(head: Head, *, backend: str = "auto", method: str | None = None, sparse_tolerance: float = 0.0) -> Callable:
    from bco_fast import HeadStats, fused_linear_logps
    from bco_fast.kernels import configs

    head.stats = HeadStats() if sparse_tolerance else None

    def logps(hidden, weight, targets):
        with mock.patch.object(configs, "forward_method", return_value=method) if method else nullcontext():
            return fused_linear_logps(
                hidden,
                weight,
                targets,
                softcap=head.softcap,
                backend=backend,
                workspace_bytes=head.workspace_bytes,
                sparse_tolerance=sparse_tolerance,
                stats=head.stats,
            )

    return logps


def ours_sparse(head: Head) -> Callable:
    return ours(head, sparse_tolerance=SPARSE_TOLERANCE)


def ours_bf16_units(head: Head) -> Callable:
    """With PyTorch's float32 matmuls on the CPU allowed to round to bfloat16, for the whole process (docs/kernels.md)."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return ours(head)


def torch_linear_cross_entropy(head: Head, *, chunked: bool = False) -> Callable:
    _without_softcap(head, "F.linear_cross_entropy")
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError("F.linear_cross_entropy came with PyTorch 2.13")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def logps(hidden, weight, targets):
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return logps


def torch_linear_cross_entropy_chunked(head: Head) -> Callable:
    return torch_linear_cross_entropy(head, chunked=True)


def trl(head: Head) -> Callable:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logps(hidden, weight, targets):
        arguments = (targets, 1.0, 8192, head.softcap, 1.0, ())  # its trainers' chunk
        return ChunkedLogProbFunction.apply(hidden, weight, None, *arguments)[0]

    return logps


def cut_cross_entropy(head: Head, *, filter_eps: str | None = None) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden, weight, targets):
        return -linear_cross_entropy(
            hidden, weight, targets, softcap=head.softcap, reduction="none", filter_eps=filter_eps
        )

    return logps


def cut_cross_entropy_filtered(head: Head) -> Callable:
    return cut_cross_entropy(head, filter_eps="auto")


def liger(head: Head) -> Callable:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    def logps(hidden, weight, targets):  # one sum: its backward takes no per-token gradient
        out = Liger.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum", head.softcap)
        return -(out[0] if isinstance(out, tuple) else out)[None]

    return logps


def liger_kto(head: Head) -> Callable:
    """Chunked KTO, the batch as sequences of 64 tokens, no reference: its loss, not log-probabilities. Of means, because
    the sums of random tokens saturate the loss, and a CPU is slow at gradients that underflow."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    _without_softcap(head, "LigerFusedLinearKTOLoss")
    loss = LigerFusedLinearKTOLoss(use_ref_model=False, average_log_prob=True)

    def logps(hidden, weight, targets):
        sequences = max(len(hidden) // 64, 1)
        length = len(hidden) // sequences
        hidden, targets = hidden[: sequences * length], targets[: sequences * length]
        labels = torch.arange(sequences, device=hidden.device) % 2 == 0
        tokens = hidden.view(sequences, length, -1)
        out = loss(tokens, weight, targets.view(sequences, length), preference_labels=labels)
        return -(out[0] if isinstance(out, tuple) else out)[None]

    return logps


PEERS = {
    "PyTorch": plain,
    "PyTorch, compiled": compiled,
    "F.linear_cross_entropy": torch_linear_cross_entropy,
    "F.linear_cross_entropy, chunked": torch_linear_cross_entropy_chunked,
    "TRL 1.16 ChunkedLogProb": trl,
    "Liger fused linear CE": liger,
    "Liger chunked KTO": liger_kto,
    "Cut Cross-Entropy": cut_cross_entropy_filtered,
    "Cut Cross-Entropy, exact": cut_cross_entropy,
}
OURS = {"bco_fast": ours, "bco_fast, sparse 2^-7": ours_sparse, "bco_fast, bf16 matmuls": ours_bf16_units}
CONTENDERS = OURS | PEERS
DTYPES = {"bco_fast, bf16 matmuls": "bfloat16"}
"""Contenders of one dtype only."""
ENVIRONMENTS = {"TRL 1.16 ChunkedLogProb": "trl-1.16"} | {
    name: "kernels" for name in PEERS if name.startswith(("Liger", "Cut Cross-Entropy"))
}
"""Peers that have an environment of their own, made by `make venv-peers`."""


def described(error: BaseException) -> str:
    """What a row says of a contender that did not run."""
    lines = str(error).strip().splitlines() or [""]
    first = " ".join(lines[: 1 + lines[0].endswith(":")])[:200]  # the compiler's say what failed, then why
    return f"missing: {first}" if isinstance(error, ImportError) else f"{type(error).__name__}: {first}"


def errors(logps: Tensor, exact: Tensor) -> dict[str, float]:
    """Against float64, in nats: per token, and of sums over windows of 256 and 4096 tokens where there are as many."""
    error = logps[: len(exact)].double() - exact
    found = {"logp_rms_error": float(error.square().mean().sqrt()), "logp_max_error": float(error.abs().max())}
    for window in (256, 4096):
        if len(error) >= window:
            sums = error[: len(error) // window * window].view(-1, window).sum(1)
            found[f"sum_{window}_error"] = float(sums.abs().max())
    return {name: float(f"{value:.4g}") for name, value in found.items()}
