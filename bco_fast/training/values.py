"""Ranges of options, most of which `TrainingArguments` leaves unchecked: a wrong value would end in a traceback hours
later, or train something else than what was meant.

Every error begins with the option's name. None of these checks needs a model or data.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os

import torch
from accelerate.utils import DynamoBackend

from ..losses.divergence import DIVERGENCES

AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "save_total_limit": 1,
    "max_length": 2,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "reference_tokens_per_batch": 1,
    "tokens_per_batch": 1,
    "mlp_chunk_tokens": 1,
    "layer_chunk_tokens": 1,
    "layer_checkpoints": 1,
    "lora_r": 1,
    "workspace_bytes": 32768,  # the smallest tile of the fused head
}
NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "logging_steps", "save_steps", "eval_steps",
    "eval_delay", "label_smoothing_factor", "neftune_noise_alpha", "sft_weight", "gamma", "lam", "alpha", "nll_weight", "desirable_weight",
    "undesirable_weight",
)  # fmt: skip
POSITIVE = ("beta", "slic_delta", "num_train_epochs", "exo_epsilon", "discopop_tau")
BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout", "sparse_tolerance", "shift_decay", "discopop_tau")
SEEDS = ("seed", "data_seed")
INTERVALS = {"save_strategy": "save_steps", "eval_strategy": "eval_steps"}
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")

_TRACKERS = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""What to install for report_to, where the package has another name."""


def check_numbers(config) -> None:
    """Refuse a number out of its range, NaN among them. None, for a default, is no number.

    Args:
        config: a `FeedbackConfig`, or a namespace with some of its options.

    Raises:
        ValueError: names the option.
    """

    def check(names, allowed, text: str) -> None:
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, (int, float)) and not allowed(value):
                raise ValueError(f"{name} must be {text}, not {value}")

    for name, least in AT_LEAST.items():
        check([name], lambda value, least=least: value >= least, f"at least {least}")
    check(NOT_NEGATIVE, lambda value: 0 <= value < math.inf, ">= 0")
    check(POSITIVE, lambda value: 0 < value < math.inf, "> 0")
    check(BELOW_ONE, lambda value: 0 <= value < 1, "in [0, 1)")
    check(["label_smoothing", "exo_epsilon"], lambda value: 0 <= value < 0.5, "in [0, 0.5)")
    check(["pairing_ratio"], lambda value: 0 <= value <= 1, "in [0, 1]")
    check(["max_steps"], lambda value: value > 0 or value == -1, "at least 1, or -1 for num_train_epochs")
    check(["f_alpha_divergence_coef"], math.isfinite, "finite")
    if (chosen := getattr(config, "f_divergence_type", DIVERGENCES[0])) not in DIVERGENCES:
        raise ValueError(f"f_divergence_type must be one of {', '.join(DIVERGENCES)}, not {chosen!r}")
    check(SEEDS, lambda value: 0 <= value < 2**32, "in [0, 2^32)")


def check_others(config) -> None:
    """Refuse what needs a package or a GPU that is not here, and options that do not fit one another.

    Raises:
        ValueError: names the option.
    """
    for strategy, steps in INTERVALS.items():
        if getattr(config, strategy) == "steps" and not getattr(config, steps):
            raise ValueError(f"{steps} must be > 0 where {strategy} is steps")
    if config.dataloader_persistent_workers and not config.dataloader_num_workers:
        raise ValueError("dataloader_persistent_workers needs dataloader_num_workers > 0")
    if config.backend == "triton" and config.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend triton needs a GPU: use torch or auto on a CPU, or set TRITON_INTERPRET=1")
    if config.fsdp and config.parallel_mode.value != "distributed":
        raise ValueError("fsdp needs several processes: start the command with accelerate launch or torchrun")
    for name, asked in (("use_liger_kernel", config.use_liger_kernel), ("liger", config.liger == "true")):
        if asked and importlib.util.find_spec("liger_kernel") is None:
            raise ValueError(f"{name} needs liger-kernel: pip install 'bco_fast[gpu]'")
        if asked and config.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"{name} needs a GPU: leave it out on a CPU, or set TRITON_INTERPRET=1")
    if config.layer_checkpoints is not None:
        _check_layer_checkpoints(config)
    if config.use_peft and importlib.util.find_spec("peft") is None:
        raise ValueError("use_peft needs peft: pip install 'bco_fast[train]'")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(config, name) and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"{name} needs bitsandbytes: pip install bitsandbytes")
    _check_reports(config.report_to)
    _check_optimizer(config)
    _check_scheduler(config)


def check_texts(config) -> None:
    """Refuse text that `TrainingArguments` would refuse without the option's name: mappings, and torch.compile's backend.

    Raises:
        ValueError: names the option.
    """
    compiler = config.torch_compile_backend
    if compiler is not None and compiler.upper() not in DynamoBackend.__members__:
        known = ", ".join(name.lower() for name in DynamoBackend.__members__ if name != "NO")
        raise ValueError(f"torch_compile_backend must be one of {known}, not {compiler!r}")
    for name in config._VALID_DICT_FIELDS:
        value = getattr(config, name)
        if isinstance(value, str) and (value.startswith("{") or name.endswith("_kwargs")):
            try:
                fits = isinstance(json.loads(value), dict)
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(f"{name} must be a JSON object, not {value!r}")


def _check_layer_checkpoints(config) -> None:
    if config.fsdp or config.deepspeed:
        raise ValueError(
            "layer_checkpoints runs layers out of turn, which fsdp and deepspeed cannot follow: leave one out"
        )
    given = getattr(config, "activation_checkpointing_kwargs", None) or config.gradient_checkpointing_kwargs or {}
    if given.get("use_reentrant"):
        raise ValueError("layer_checkpoints needs checkpoints that are not reentrant: leave use_reentrant out")
    on = config.gradient_checkpointing or getattr(config, "activation_checkpointing", None)
    if not on and config.long_context == "off":
        raise ValueError("layer_checkpoints needs gradient_checkpointing: turn that on as well")


def _check_reports(names: list[str]) -> None:
    from transformers.integrations import integration_utils as integrations

    known = integrations.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise ValueError(f"report_to must be none or of {', '.join(sorted(known))}, not {name!r}")
        if name not in integrations.get_available_reporting_integrations():
            try:
                known[name]()  # says what is missing
            except (RuntimeError, ImportError):
                raise ValueError(f"report_to {name} needs a package: pip install {_TRACKERS.get(name, name)}") from None


def _check_optimizer(config) -> None:
    for part in filter(None, map(str.strip, (config.optim_args or "").split(","))):
        if "=" not in part:
            raise ValueError(f"optim_args must read name=value,name=value, not {config.optim_args!r}")
    if config.optim in PLAIN_OPTIMIZERS:
        return
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(config)
    except ImportError as error:
        raise ValueError(f"optim {config.optim.value}: {error}") from None
    except ValueError as error:
        if "import" in str(error):
            raise ValueError(f"optim {config.optim.value}: {error}") from None
        # some ask for the model, which comes later


def _check_scheduler(config) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    given = dict(config.lr_scheduler_kwargs or {})
    try:
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=given,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_kwargs {given} do not fit {config.lr_scheduler_type.value}: {error}") from None
