"""A GPU that the CPU plays: every device that says cuda becomes the CPU, and torch.cuda answers like an H200.

A program for a rented GPU runs here line by line. Not shown: compiled kernels, device memory, and code that looks at the
device of a tensor.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

MEMORY = 140 << 30


def _here(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Redirect(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("cuda", "pin_memory"):  # methods of a tensor
            return args[0]
        return function(*map(_here, args), **{name: _here(value) for name, value in (kwargs or {}).items()})


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, _here(device))


def install() -> None:
    """For the rest of this process."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties, "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H200", "mem_get_info": (MEMORY, MEMORY), "memory_allocated": 0, "max_memory_allocated": 1 << 20,
        "memory_reserved": 0, "max_memory_reserved": 0, "is_bf16_supported": True, "is_current_stream_capturing": False, "get_rng_state_all": [], "get_rng_state": torch.get_rng_state(),
        "is_initialized": True, "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "set_device": None, "manual_seed_all": None,
        "manual_seed": None, "set_per_process_memory_fraction": None, "init": None, "ipc_collect": None, "set_rng_state_all": None, "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.Generator = _Generator
    _Redirect().__enter__()
