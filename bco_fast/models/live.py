"""How many bytes of tensors are alive, and the most there were in each phase of a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there were in each phase.

    Storages in `apart` (weights, gradients of weights, what waits in host memory) are counted by themselves.
    """

    def __init__(self, inside: Callable[[object, tuple], int] | None = None):
        super().__init__()
        self.inside = inside
        self.phase, self.now = "", 0
        self.peaks: dict[str, float] = {}
        self.begins: dict[str, float] = {}
        self.made: dict[str, float] = {}
        """Gradients of weights at the end of each phase."""
        self.host = self._gradients = 0
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if self.inside is not None:
            self._peak(self.inside(func, args))
        return out

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.begins.setdefault(phase, self.now)
        self.made[phase] = self._gradients
        self._peak(0)

    def leave_out(self, tensor: Tensor) -> None:
        """Count this tensor no longer: it is a weight, its gradient, or in host memory."""
        self._see(tensor)
        key = tensor.untyped_storage()._cdata
        self.now -= self._sizes[key]
        self._sizes[key] = 0

    def gradient(self, parameter: Tensor) -> None:
        self.leave_out(parameter.grad)
        self._gradients += parameter.grad.nbytes
        self.made[self.phase] = self._gradients

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._refs:
            return

        def freed(_, key: int = key) -> None:
            self.now -= self._sizes.pop(key)
            del self._refs[key]

        self._refs[key], self._sizes[key] = weakref.ref(storage, freed), storage.nbytes()
        self.now += self._sizes[key]
        self._peak(0)

    def _peak(self, more: int) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now + more)
