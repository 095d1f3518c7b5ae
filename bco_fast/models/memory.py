"""Activations that wait in host memory, and the memory that a process has taken."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

logger = logging.getLogger("bco_fast")

OFFLOAD_BYTES = 1 << 20


def peak_memory_mb() -> float:
    """Of the GPU where there is one, else of this process, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


class _Waiting:
    """A tensor in host memory, and the one that was saved before it, which the backward reads next."""

    def __init__(self, host: Tensor, device: torch.device, before: _Waiting | None):
        self.host, self.device, self.before = host, device, before
        self.back: Tensor | None = None
        self.ready = None


class offload_activations(torch.autograd.graph.saved_tensors_hooks):
    """Within it, what a batch saves for its backward waits in pinned host memory, but for small tensors and weights.

    With gradient checkpointing that is one hidden state per layer. Copies run on a stream of their own, beside the
    computation; in the backward each tensor is fetched while the layer before it is at work, so two are on the device.

    Args:
        shape: [B, T] of the batch. What does not begin with B, or has no T in the next two places, is a weight or small.
    """

    def __init__(self, shape: torch.Size, device_type: str = "cuda", min_bytes: int = OFFLOAD_BYTES):
        self.shape, self.device_type, self.min_bytes = shape, device_type, min_bytes
        self.bytes = 0
        """Moved to host memory so far."""
        self.last: _Waiting | None = None
        self.stream = None
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> offload_activations:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor | _Waiting:
        whole = tensor if tensor._base is None else tensor._base  # a matmul saves its input as [B * T, D]
        weight = isinstance(whole, nn.Parameter) or not any(map(self._of_batch, (tensor, whole)))
        if weight or tensor.device.type != self.device_type:
            return tensor
        size = tensor.numel() * tensor.element_size()
        if size < self.min_bytes:
            return tensor
        self.bytes += size
        with self._beside(tensor.device) as stream:
            self.last = _Waiting(self.host(tensor), tensor.device, self.last)
        if stream is not None:
            tensor.record_stream(stream)  # its memory is free once it has been read
        return self.last

    def _of_batch(self, tensor: Tensor) -> bool:
        rows, length = self.shape
        return tensor.dim() > 2 and tensor.shape[0] == rows and length in tensor.shape[1:3]

    def host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory."""
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type != "cpu")
        return copied.copy_(tensor, non_blocking=True)

    def _unpack(self, saved: Tensor | _Waiting) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        if saved.before is not None:
            self._fetch(saved.before)
        tensor, ready = saved.back, saved.ready
        saved.back = saved.ready = None
        if ready is not None:
            current = torch.get_device_module(saved.device).current_stream(saved.device)
            current.wait_event(ready)
            tensor.record_stream(current)
        return tensor

    def _fetch(self, saved: _Waiting) -> None:
        if saved.back is not None:
            return
        with self._beside(saved.device) as stream:
            saved.back = torch.empty_like(saved.host, device=saved.device).copy_(saved.host, non_blocking=True)
            saved.ready = None if stream is None else stream.record_event()

    @contextlib.contextmanager
    def _beside(self, device: torch.device) -> Iterator:
        """The stream of the copies, after what the computation has been given so far; None on a CPU."""
        if device.type == "cpu":
            yield None
            return
        module = torch.get_device_module(device)
        if self.stream is None:
            self.stream = module.Stream(device)
        self.stream.wait_stream(module.current_stream(device))
        with module.stream(self.stream):
            yield self.stream


def free_embeddings(model: nn.Module, checkpoint_kwargs: dict | None = None) -> None:
    """Frozen embeddings get no gradient: transformers asks for one wherever layers are checkpointed, which only its
    reentrant kind needs. It would keep the embedded row, and its gradient, through the whole backward."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (checkpoint_kwargs or {}).get("use_reentrant", False) and hasattr(base, "disable_input_require_grads"):
        base.disable_input_require_grads()


def offloading(shape: torch.Size, on: bool) -> contextlib.AbstractContextManager:
    """`offload_activations` for a batch of [B, T] tokens, if it is wanted."""
    return offload_activations(shape) if on else contextlib.nullcontext()
