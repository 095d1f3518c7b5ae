"""A folder that holds an adapter and no model, as training with `use_peft` leaves it: found, put on its base, merged."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger("bco_fast")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OPTIONS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_NAMES = {"lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save"}


def holds_adapter(path: str | os.PathLike) -> bool:
    return Path(path, CONFIG).is_file()


def base_of(path: str | os.PathLike) -> str:
    """The base model of the adapter in a folder: a path, or a Hub name.

    A relative path was relative to the folder where training was started. So it is looked for beside the adapter, then in
    each folder above, and last in the current one.

    Raises:
        ValueError: the adapter names no base, or one that is not there; its weights are not in safetensors.
    """
    folder = Path(path).absolute()
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{CONFIG} without {WEIGHTS}: the adapter's weights must be in safetensors")
    recorded = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not recorded:
        raise ValueError(f"{CONFIG} names no base model: set base_model_name_or_path in it")
    for above in (folder, *folder.parents, Path.cwd()):
        if (above / recorded).is_dir():
            return str(above / recorded)
    if recorded.count("/") > 1 or recorded.startswith((".", "/", "~")):
        raise ValueError(f"the adapter's base {recorded} is not there: correct base_model_name_or_path in {CONFIG}")
    return recorded


def put_on(base: nn.Module, path: str | os.PathLike) -> nn.Module:
    """The base with the adapter of a folder, which can be trained on."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise ImportError(f"{path} is an adapter, which needs peft: pip install 'bco_fast[train]'") from None

    config = PeftConfig.from_pretrained(path)
    config.base_model_name_or_path = base.config._name_or_path
    config.inference_mode = False
    model = PeftModel.from_pretrained(base, path, config=config, is_trainable=True)
    logger.info("%s is an adapter on %s", path, base.config._name_or_path)
    return model


def merged(model: nn.Module) -> nn.Module:
    """The base with the adapter added to its weights, in their dtype.

    Raises:
        ValueError: a merged weight is not finite.
    """
    with torch.no_grad():
        return model.merge_and_unload(safe_merge=True)


def check_options(model: nn.Module, options) -> None:
    """Refuse options of a new adapter that differ from those of the one that the model has.

    Args:
        options: a `FeedbackConfig`; its defaults are no wish.

    Raises:
        ValueError: names the option.
    """
    fields = type(options).__dataclass_fields__
    (adapter, *_) = model.peft_config.values()
    for name, key in (_OPTIONS | _NAMES).items():
        wanted, found = getattr(options, name), getattr(adapter, key, None)
        if name in _NAMES:
            same = {part.strip() for part in wanted.split(",") if part.strip()} == set(found or ())
        else:
            same = wanted == found
        if wanted != fields[name].default and not same:
            shown = ",".join(sorted(found)) if isinstance(found, (set, list)) else found
            raise ValueError(f"{name}: the adapter that is trained further has {shown}, not {wanted}; leave it out")
