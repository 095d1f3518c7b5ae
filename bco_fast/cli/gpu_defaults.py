"""What the commands that train turn on by themselves on a GPU: bfloat16 and gradient checkpointing.

`TrainingArguments` has both off, for every machine. On a GPU that is the slow and large way to train a language model: float32
matmuls, and all activations kept. An option that is given, here or in a --config file, is left as it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch

logger = logging.getLogger("bco_fast")

OPTIONS = ("bf16", "gradient_checkpointing")


def gpu_defaults(values: dict, defaults: Mapping[str, object]) -> list[str]:
    """Fill in the options that are None; -> those that were turned on.

    Args:
        values: options of a config; None where the user has given none. Changed in place.
        defaults: of the config, for what stays off.
    """
    gpu = torch.cuda.is_available() and not values.get("use_cpu")
    # FSDP has checkpointing of its own, and refuses both
    sharded = values.get("fsdp") or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    fits = {
        "bf16": gpu and not values.get("fp16") and bfloat16(),
        "gradient_checkpointing": gpu and values.get("activation_checkpointing") is None and not sharded,
    }
    chosen = [name for name in OPTIONS if values[name] is None and fits[name]]
    for name in OPTIONS:
        if values[name] is None:
            values[name] = defaults[name]
    for name in chosen:
        # transformers 5 has a new name for gradient checkpointing, and warns of the old one
        renamed = name == "gradient_checkpointing" and "activation_checkpointing" in values
        values["activation_checkpointing" if renamed else name] = True
    if chosen:
        logger.info("on this GPU: %s (--OPTION false turns one off)", " ".join(f"--{name} true" for name in chosen))
    return chosen


def bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 itself."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def keep_what_fits(config, chosen: list[str], model) -> None:
    """Turn gradient checkpointing off again where nobody asked for it and the model cannot."""
    if "gradient_checkpointing" in chosen and not getattr(model, "supports_gradient_checkpointing", False):
        logger.info("%s has no gradient checkpointing, so it stays off", type(model).__name__)
        config.gradient_checkpointing = False
        if hasattr(config, "activation_checkpointing"):
            config.activation_checkpointing = False
