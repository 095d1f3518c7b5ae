"""A YAML file written for TRL's KTO script, as options of `bco-fast train`.

A file with `model_name_or_path` or `dataset_name` is taken for one of TRL's. Keys that both know stay; the others are
renamed, logged as without effect, or refused: none is ignored silently.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger("bco_fast")

MARKS = ("model_name_or_path", "dataset_name")

RENAMED = {"model_name_or_path": "model", "dtype": "model_dtype", "torch_dtype": "model_dtype"}

DEFAULTS = {"loss_type": "kto", "learning_rate": 1e-6, "gradient_checkpointing": True, "disable_dropout": True}
"""Defaults of TRL's KTOConfig that differ from ours."""

WITHOUT_EFFECT = {
    "precompute_ref_log_probs": "the reference is always computed once and cached",
    "precompute_ref_batch_size": "reference_tokens_per_batch sets the size of the reference's batches",
    "dataset_num_proc": "rows are tokenized in this process",
    "pad_to_multiple_of": "the model never reads padding",
    "max_completion_length": "max_length and max_prompt_length decide",
    "train_sampling_strategy": "mismatched completions do not depend on the order of the rows",
    "gradient_checkpointing_use_reentrant": "checkpointing is never reentrant",
    "ignore_bias_buffers": "it was a debugging option",
    "lora_task_type": "the model is always a causal language model",
    "bnb_4bit_quant_type": "4-bit weights are always NF4",
    "use_bnb_nested_quant": "4-bit weights are always quantised twice",
}

REFUSED = {
    "sync_ref_model": "the reference is constant, its log-probabilities are cached",
    "trust_remote_code": "give the flag --trust_remote_code instead, if you would run that folder as a program",
    "use_rslora": "use peft_config= in Python",
    "use_dora": "use peft_config= in Python",
    "dataset_streaming": "rows are read and checked before training",
    "dataset_config": "download that configuration and give the file",
    "model_init_kwargs": "use model_dtype and attn_implementation",
}
"""Refused when set to anything but the default (false, null or empty)."""


def from_trl(options: Mapping[str, object]) -> dict[str, object]:
    """Options of `bco-fast train`; a mapping without TRL's marks comes back unchanged.

    Raises:
        ValueError: a key that cannot be honoured; names it and the reason.
    """
    if not any(mark in options for mark in MARKS):
        return dict(options)
    given = {name: value for name, value in options.items() if not name.startswith("dataset_")}
    ours: dict[str, object] = dict(DEFAULTS)
    for name, reason in REFUSED.items():
        if options.get(name):
            raise ValueError(f"{name}: {reason}")
        given.pop(name, None)
    for name, reason in WITHOUT_EFFECT.items():
        if name in options:
            logger.info("%s has no effect: %s", name, reason)
            given.pop(name, None)
    if given.pop("model_revision", "main") not in (None, "main"):
        raise ValueError("model_revision: download that revision and give its folder")
    for name in ("lora_target_modules", "lora_modules_to_save"):
        if isinstance(given.get(name), list):
            given[name] = ",".join(map(str, given[name]))
    ours |= {RENAMED.get(name, name): value for name, value in given.items()}
    return ours | _data(options)


def _data(options: Mapping[str, object]) -> dict[str, object]:
    name = options.get("dataset_name")
    if name is None:
        return {}
    train, test = options.get("dataset_train_split", "train"), options.get("dataset_test_split", "test")
    data: dict[str, object] = {"data": name if train == "train" else f"{name}:{train}"}
    if str(options.get("eval_strategy", "no")) not in ("no", "False"):
        data["eval_data"] = f"{name}:{test}"
    else:
        data["eval_fraction"] = 0.0  # TRL's script trains on all of the split
    return data
