"""From a checkpoint and a `FeedbackConfig` to the model that is trained: dtype, attention, quantisation, adapters.

A checkpoint is a stranger's folder. Weights are read from safetensors only, and Python code that lies beside them runs only
with `trust_remote_code`, which is logged; otherwise transformers would ask on standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.integrations import deepspeed

from .adapters import base_of, holds_adapter, put_on
from .multimodal import auto_class, outside_adapters

if TYPE_CHECKING:
    from ..training.config import FeedbackConfig

logger = logging.getLogger("bco_fast")

HUB_FLASH = ("kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3")
"""For any card from sm_80 on, and for Hopper."""


def code_options(path: str | os.PathLike, trust_remote_code: bool) -> dict[str, bool]:
    """Options of every `from_pretrained`: whether Python code of the folder may run."""
    if trust_remote_code:
        logger.warning("trust_remote_code: Python code of %s runs in this process", path)
    return {"trust_remote_code": bool(trust_remote_code)}


def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False):
    return AutoTokenizer.from_pretrained(path, **code_options(path, trust_remote_code))


def load_model(path: str | os.PathLike, config: FeedbackConfig | argparse.Namespace) -> nn.Module:
    """Load a language model as `config` says; every choice that "auto" makes is logged once.

    A folder that holds an adapter is its base with the adapter on it.

    Raises:
        ImportError: 4-bit or 8-bit loading without bitsandbytes; an adapter without peft.
        OSError, ValueError: of `from_pretrained`; the adapter's base is not there.
    """
    adapter = path if holds_adapter(path) else None
    path = path if adapter is None else base_of(adapter)
    options: dict = {"dtype": _dtype(config, adapter is not None)}
    attention = config.attn_implementation
    if attention == "flash":
        attention = flash_attention(_in_16_bits(config))
        logger.info("attention: %s", attention)
    elif attention is None and torch.cuda.is_available():
        fits = _in_16_bits(config) and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if fits else "sdpa"
        logger.info("attention: %s", attention)
    if attention is not None:
        options["attn_implementation"] = attention
    if config.load_in_4bit or config.load_in_8bit:
        options["quantization_config"] = _quantization(config)
    model = read_weights(path, config.trust_remote_code, **options)
    return model if adapter is None else put_on(model, adapter)


def read_weights(path: str | os.PathLike, trust_remote_code: bool, **options) -> nn.Module:
    """`from_pretrained` of the class that the checkpoint's config asks for, from safetensors."""
    code = code_options(path, trust_remote_code)
    revision = {"revision": options["revision"]} if "revision" in options else {}
    chosen = auto_class(AutoConfig.from_pretrained(path, **code, **revision))
    with whole_weights():
        return chosen.from_pretrained(path, **{"use_safetensors": True, **code, **options})


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Keep ZeRO-3 from sharding a model while it is loaded; DeepSpeed does it when training is prepared.

    The reference is identified by its whole weights. transformers shards whatever zero3_init_flag says, and has no other
    switch than the config it remembers.
    """
    remembered = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = remembered


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model that ZeRO-3 sharded while it was loaded: no rank has weights to check or to identify it by.

    Raises:
        ValueError: says how to load it.
    """
    if any(hasattr(p, "ds_id") and not p.numel() for p in model.parameters()):
        raise ValueError(
            "ZeRO-3 has sharded the model while it was loaded, so its weights cannot be identified: pass its path instead, "
            "or load it before the FeedbackConfig is made; DeepSpeed then shards it when training starts"
        )


def _dtype(config: FeedbackConfig, adapter: bool) -> torch.dtype | str:
    if config.model_dtype != "auto":
        return getattr(torch, config.model_dtype)
    if adapter or config.use_peft or config.load_in_4bit or config.load_in_8bit:
        return "auto"  # frozen weights stay as they were stored
    # AdamW's steps of 1e-6 vanish in bfloat16 weights; --bf16 computes in bfloat16 on top of float32 ones
    logger.info("weights: float32, because all of them are trained (model_dtype=bfloat16 keeps them small)")
    return torch.float32


def _in_16_bits(config: FeedbackConfig) -> bool:
    return config.bf16 or config.fp16 or config.model_dtype in ("bfloat16", "float16")


def flash_attention(in_16_bits: bool) -> str:
    """The FlashAttention for this card: the package where it is installed, else of the Hub, version 3 on Hopper.

    Raises:
        ValueError: the card or the dtype cannot do it.
        ImportError: neither the package nor Hugging Face's kernels library is installed.
    """
    if not in_16_bits:
        raise ValueError("attn_implementation flash computes in 16 bits: add bf16, fp16 or model_dtype bfloat16")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability < (8, 0):
        raise ValueError("attn_implementation flash needs a GPU from sm_80 on (A100, RTX 30): use sdpa")
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    if importlib.util.find_spec("kernels") is None:
        raise ImportError("attn_implementation flash needs kernels or flash-attn: pip install 'bco_fast[gpu]'")
    return HUB_FLASH[capability[0] == 9]


def _quantization(config: FeedbackConfig):
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],  # the head is what the fused operator reads
    )


def add_adapter(model: nn.Module, config: FeedbackConfig, peft_config=None, *, quiet: bool = False) -> nn.Module:
    """Wrap the model with `peft_config`, or LoRA as `config` says; the base without the adapter is then the reference."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("use_peft needs peft: pip install 'bco_fast[train]'") from None

    # Not peft's prepare_model_for_kbit_training: it makes everything that is not quantised float32. The head would lose
    # the tensor cores, and a cache that was built in the stored dtype would be another model's.
    if peft_config is None:
        names = [name.strip() for name in config.lora_target_modules.split(",")]
        saved = [name.strip() for name in config.lora_modules_to_save.split(",") if name.strip()]
        modules = {name for name, _ in model.named_modules()}
        for name in saved:  # peft ignores a name that fits nothing
            if not any(f".{module}".endswith(f".{name}") for module in modules):
                raise ValueError(f"lora_modules_to_save: the model has no module {name!r}")
        peft_config = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=names[0] if names == ["all-linear"] else names,
            modules_to_save=saved or None,
            task_type="CAUSAL_LM",
        )
    if peft_config.exclude_modules is None and (outside := outside_adapters(model)):
        peft_config.exclude_modules = outside
    try:
        model = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(f"lora_target_modules: {error}") from None
    trained, whole = model.get_nb_trainable_parameters()
    if not quiet:
        logger.info("adapter: %d of %d parameters are trained (%.2f %%)", trained, whole, 100 * trained / whole)
    return model
