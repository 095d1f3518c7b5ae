"""Text-only training of checkpoints that also read images or sound: which class loads them, and what stays frozen.

Transformers loads Gemma 3 and 4, Qwen-VL, Mistral 3 and Llama 4 as `...ForConditionalGeneration`: a language model with its
lm-head, and beside it towers and projectors that text never reaches. Those get no gradient; they are frozen so that no
optimizer, adapter or all-reduce waits for one.
"""

from __future__ import annotations

import logging
import re

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

logger = logging.getLogger("bco_fast")

OTHER_INPUTS = ("vision_config", "audio_config")


def is_multimodal(config: PretrainedConfig) -> bool:
    return any(getattr(config, part, None) is not None for part in OTHER_INPUTS)


def auto_class(config: PretrainedConfig) -> type:
    """The class that loads every weight of a checkpoint, so that a saved one is whole."""
    if is_multimodal(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def other_modules(model: nn.Module) -> list[str]:
    """Names of the largest modules that hold neither the language model nor its head; none in a model of text alone.

    Raises:
        ValueError: the language model cannot be told from the rest.
    """
    if not is_multimodal(model.config):
        return []
    text = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    if any(part is model for part in text):
        raise ValueError(
            f"{type(model).__name__} reads more than text, and its language model cannot be told from the rest; "
            "load the language model alone"
        )
    inside = {id(module) for part in text for module in part.modules()}
    around = {id(module) for module in model.modules() if any(id(child) in inside for child in module.modules())}
    found: list[str] = []
    for name, module in model.named_modules():  # outer modules first
        if id(module) not in around and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def freeze_other_modules(model: nn.Module) -> None:
    """Freeze what text does not reach; the log names it."""
    names = other_modules(model)
    parameters = [p for name in names for p in model.get_submodule(name).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    if parameters:
        logger.info("text only: %s frozen, %d parameters", ", ".join(names), sum(p.numel() for p in parameters))


def outside_adapters(model: nn.Module) -> str | None:
    """A pattern of the modules that an adapter leaves out (PEFT's `exclude_modules`)."""
    names = other_modules(model)
    return rf"({'|'.join(map(re.escape, names))})(\..*)?" if names else None
