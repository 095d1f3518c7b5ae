"""Long context on one GPU: activations that wait in host memory, and MLPs that run over a few tokens at a time."""

from __future__ import annotations

import logging
import resource
import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger("bco_fast")

OFFLOAD_BYTES = 1 << 20


def peak_memory_mb() -> float:
    """Of the GPU where there is one, else of this process, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


class offload_activations(torch.autograd.graph.saved_tensors_hooks):
    """Within it, tensors saved for the backward wait in pinned host memory, but for weights and small ones.

    With gradient checkpointing what is saved is one hidden state per layer: 4 * tokens * D bytes each in float32. Copies
    run on the current stream, so they are ordered with the kernels that wrote and will read the tensor, and its memory
    can be used again at once.
    """

    def __init__(self, device_type: str = "cuda", min_bytes: int = OFFLOAD_BYTES):
        self.bytes = 0
        """Moved to host memory so far."""

        def pack(tensor: Tensor):
            weight = isinstance(tensor, nn.Parameter) or (tensor._base is not None and isinstance(tensor._base, nn.Parameter))  # fmt: skip
            size = tensor.numel() * tensor.element_size()
            if weight or tensor.device.type != device_type or size < min_bytes:
                return tensor
            host = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda"
            )  # fmt: skip
            host.copy_(tensor, non_blocking=True)
            self.bytes += size
            return tensor.device, host

        def unpack(saved):
            return saved if isinstance(saved, Tensor) else saved[1].to(saved[0], non_blocking=True)

        super().__init__(pack, unpack)

    def __enter__(self) -> offload_activations:
        super().__enter__()
        return self


def chunk_mlps(model: nn.Module, tokens: int) -> int:
    """Make every MLP run over `tokens` positions at a time, recomputed in the backward; -> how many were found.

    An MLP treats positions independently, so the result is the same; its inner activation, 3.5 times as wide as the
    hidden state in a Llama, exists for `tokens` positions only. An MLP is a decoder layer's `mlp` that takes and
    returns one tensor (a router's experts are not).

    Raises:
        ValueError: tokens < 1, or the model has no such module.
    """
    if tokens < 1:
        raise ValueError(f"mlp_chunk_tokens must be at least 1, not {tokens}")
    mlps = [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "mlp" and not any(hasattr(module, part) for part in ("experts", "router", "gate"))
    ]
    if not mlps:
        raise ValueError(f"{type(model).__name__} has no module named mlp to run in chunks; leave mlp_chunk_tokens off")
    for mlp in mlps:
        _chunk(mlp, tokens)
    return len(mlps)


def _chunk(mlp: nn.Module, tokens: int) -> None:
    whole = mlp.forward

    def forward(hidden: Tensor) -> Tensor:  # [B, T, D]
        if hidden.dim() != 3 or hidden.shape[1] <= tokens:
            return whole(hidden)
        parts = hidden.split(tokens, dim=1)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(whole, part, use_reentrant=False) for part in parts], dim=1)
        return torch.cat([whole(part) for part in parts], dim=1)

    mlp.forward = forward
