"""What every launch of a Triton kernel needs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels import configs
from ...kernels.head_logps import head_logps_kernel
from ..types import HeadSpec

INTERPRETED = not isinstance(head_logps_kernel, triton.runtime.JITFunction)
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def constants(spec: HeadSpec, bias: Tensor | None) -> dict:
    """What happens to a logit after the matmul, as the kernels' constants."""
    return {
        "LOGIT_SCALE": spec.logit_scale,
        "SOFTCAP": spec.softcap or 1.0,
        "TEMPERATURE": spec.temperature,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": spec.softcap is not None,
    }


def here(config: configs.LaunchConfig) -> configs.LaunchConfig:
    """The config to launch with: the interpreter's cost is per tile, so its tiles are large."""
    return configs.INTERPRETED if INTERPRETED else config


def options(config: configs.LaunchConfig) -> dict:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As the matmuls want them. The interpreter truncates bf16 stores, and the CPU has no float32-out matmul of bf16."""
    if INTERPRETED and hidden.dtype.itemsize < 4:
        return hidden.float(), weight.float()
    return hidden, weight
