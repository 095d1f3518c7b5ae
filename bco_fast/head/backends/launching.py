"""How a Triton kernel is launched: its configuration, its constants, the device."""

from __future__ import annotations

import contextlib

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
    """What the kernels must know of a logit after the matmul."""
    return {
        "bias_ptr": bias,
        "LOGIT_SCALE": spec.logit_scale,
        "SOFTCAP": spec.softcap or 1.0,
        "TEMPERATURE": spec.temperature,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": spec.softcap is not None,
    }


def here(config: configs.LaunchConfig) -> configs.LaunchConfig:
    """The config to launch with. The interpreter pays per tile, so its tiles are large."""
    return configs.INTERPRETED if INTERPRETED else config


def launch(kernel, grid: tuple[int, ...], config: configs.LaunchConfig, device: torch.device, **arguments) -> None:
    """Launch on the tensors' device, which need not be the current one."""
    blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
    arguments |= {name: size for name, size in blocks.items() if name in kernel.arg_names}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=config.num_warps, num_stages=config.num_stages)
