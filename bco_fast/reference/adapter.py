"""A reference that is another adapter on the base of the model that is trained."""

from __future__ import annotations

import argparse
import os

from torch import nn

from ..data.sources import one_line
from ..models.adapters import CONFIG, holds_adapter
from ..models.attention import base_attention
from ..models.load import load_model
from .identity import reference_id


def check_adapter_folder(option: str, path: str | os.PathLike) -> None:
    """Raises `ValueError` if the folder holds no adapter; the message begins with the option."""
    if not holds_adapter(path):
        raise ValueError(f"{option} {path}: no adapter there (no file {CONFIG})")


def load_reference_adapter(option: str, path: str | os.PathLike, policy: nn.Module, config) -> nn.Module:
    """The base of `policy`, loaded a second time, with the adapter of a folder on it.

    Args:
        option: that named the path; errors begin with it.
        policy: whose dtype and attention the reference gets, and whose base it must be on.
        config: a `FeedbackConfig` or a namespace with its options of loading.

    Raises:
        ValueError: the folder holds no adapter, it or its base cannot be loaded, or the base has other weights.
    """
    check_adapter_folder(option, path)
    dtype = next(policy.parameters()).dtype
    how = argparse.Namespace(
        model_dtype=str(dtype).removeprefix("torch.") if dtype.is_floating_point else "auto",
        attn_implementation=base_attention(policy.config), load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit, trust_remote_code=config.trust_remote_code, use_peft=True,
        bf16=config.bf16, fp16=config.fp16,
    )  # fmt: skip
    try:
        model = load_model(path, how)
    except Exception as error:  # a damaged folder raises anything
        raise ValueError(f"{option} {path}: {one_line(error)[:300]}") from None
    if reference_id(model).weights != reference_id(policy).weights:
        raise ValueError(
            f"{option} {path}: its base, {model.config._name_or_path}, has other weights than the base of the model"
        )
    return model.requires_grad_(False)
