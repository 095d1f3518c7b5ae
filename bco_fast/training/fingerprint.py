"""What a run is trained on: its model, its data and its options. Every checkpoint has it; resume refuses another run's.

    checkpoint-12/fingerprint.json    {"schema": 1, "model": {...}, "data": {...}, "options": {...}}

Rows are kept as digests, so the file tells nothing of their text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.dataset import Example, FeedbackDataset
from ..files import atomic_text
from ..reference.identity import adapter_settings

if TYPE_CHECKING:
    from .trainer import FeedbackTrainer

SCHEMA = 1
FILE = "fingerprint.json"
LIMIT = 1 << 20  # bytes; a fingerprint has about 4,000

_MAY_DIFFER = {
    "logging": (
        "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level "
        "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug"
    ),
    "saving": (
        "output_dir overwrite_output_dir save_strategy save_steps save_total_limit save_only_model "
        "save_on_each_node enable_jit_checkpoint resume_from_checkpoint restore_callback_states_from_checkpoint "
        "ignore_data_skip push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision"
    ),
    "evaluation": (
        "eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps per_device_eval_batch_size prediction_loss_only include_for_metrics "
        "batch_eval_metrics bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model "
        "greater_is_better do_train do_eval do_predict"
    ),
    "length: `differences` refuses fewer steps": ("max_steps num_train_epochs"),
    "place of the computation: rounding aside, numbers stay the same": (
        "use_cpu local_rank tf32 backend workspace_bytes cache_dir reference_tokens_per_batch "
        "activation_offloading long_context mlp_chunk_tokens layer_chunk_tokens layer_checkpoints gradient_checkpointing "
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs torch_compile torch_compile_backend "
        "torch_compile_mode torch_empty_cache_steps use_cache liger use_liger_kernel liger_kernel_config "
        "full_determinism dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
        "ddp_timeout fsdp_config parallelism_config generation_batch_size vllm_gpu_memory_utilization"
    ),
    "seen in the weights, the adapter or the rows themselves": (
        "model_dtype attn_implementation load_in_4bit load_in_8bit use_peft lora_r lora_alpha lora_dropout "
        "lora_target_modules lora_modules_to_save ref_adapter chat_template columns score_scale labels on_bad_row"
    ),
}
MAY_DIFFER = frozenset(name for names in _MAY_DIFFER.values() for name in names.split())
"""Options that a resumed run may have changed. All others must be those of the checkpoint."""


def fingerprint(trainer: FeedbackTrainer) -> dict:
    """Of a run that has not begun: the identity of the model is taken when the trainer is built."""
    identity, reference, dataset = trainer.identity, trainer.reference_identity, trainer.train_dataset
    model = trainer.accelerator.unwrap_model(trainer.model)
    prompts = getattr(trainer, "prompts", None)
    found = {
        "schema": SCHEMA,
        "model": {
            "weights": identity and identity.weights,
            "config": identity and identity.config,
            "dtype": identity and identity.dtype,
            "reference": reference and reference.digest,
            "reward": reward_name(getattr(trainer, "reward", None)),
            "trained parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
            "adapter": _adapter(model),
        },
        "data": _rows(dataset) if isinstance(dataset, FeedbackDataset) else _prompts(prompts or ()),
        "options": _options(trainer.args),
    }
    return json.loads(json.dumps(found, default=_plain))  # as it comes back from the disk


def _options(args) -> dict:
    options = {
        name: value for name, value in args.to_dict().items() if name not in MAY_DIFFER | {"logging_dir"}
    }  # of transformers 4
    options["gradient_accumulation_steps"] *= args.world_size  # another number of ranks may cut the same step
    steps = ("max_steps",) if args.max_steps > 0 else ("num_train_epochs",)
    return (
        options | {name: bool(options[name]) for name in ("fsdp", "deepspeed")} | {n: getattr(args, n) for n in steps}
    )


def _adapter(model) -> dict | None:
    adapters = {f"{name}.{key}": value for name, config in getattr(model, "peft_config", {}).items() for key, value in adapter_settings(config).items()}  # fmt: skip
    return {key: value for key, value in adapters.items() if not key.endswith(".inference_mode")} or None


def _plain(value):
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _rows(dataset: FeedbackDataset) -> dict:
    def judged(example: Example) -> bytes:
        return np.array([example.label, example.weight, example.score], dtype="<f8").tobytes()

    return {
        "rows": len(dataset),
        "tokens": _digest(example.key for example in dataset.examples),
        "labels": _digest(map(judged, dataset.examples)),
    }


def _prompts(prompts: Iterable[tuple[dict, list[int]]]) -> dict:
    """Of online training, whose rows do not exist yet."""
    tokens = [np.array(ids, dtype="<i8").tobytes() for _, ids in prompts]
    columns = [json.dumps(row, sort_keys=True, default=str).encode() for row, _ in prompts]
    return {"rows": len(tokens), "tokens": _digest(tokens), "labels": None, "columns": _digest(columns)}


def reward_name(reward) -> str | None:
    """The weights of a reward model; of a function its name, because one that raised may be mended and resumed with."""
    if reward is None or isinstance(getattr(reward, "identity", None), str):
        return reward and reward.identity
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


# ---- on the disk


def write_fingerprint(folder: Path, found: Mapping) -> None:
    with atomic_text(folder / FILE) as file:
        json.dump(found, file, indent=1)


def read_fingerprint(folder: Path) -> dict | None:
    """None where a checkpoint has none, because another Trainer or an earlier version saved it.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with (folder / FILE).open("rb") as file:
            text = file.read(LIMIT + 1)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text) if len(text) <= LIMIT else None
    except RecursionError:
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(part), dict) for part in ("model", "data", "options")
    ):
        raise ValueError("it is not a fingerprint")
    return found


# ---- comparing

_WORDS = {
    "weights": "the weights that training starts from differ",
    "config": "the config of the model differs",
    "reference": "the reference model differs",
    "reward": "the reward differs",
    "tokens": "the tokens of the training rows differ",
    "labels": "the labels, weights or scores of the training rows differ",
    "columns": "the further columns of the prompts differ",
}  # fmt: skip


def differences(then: Mapping, now: Mapping, *, planned: int | None = None) -> list[str]:
    """What a checkpoint was trained with and this run is not, in words; nothing if it may be resumed.

    Args:
        then, now: fingerprints.
        planned: the steps that the checkpoint's run had before it.
    """
    found = []
    for part in ("model", "data"):
        a, b = then[part], now[part]
        for name in b:
            old, new = a.get(name), b[name]
            unknown = name not in a or (name in _WORDS and name != "reference" and None in (old, new))
            if old == new or unknown:
                continue
            if name == "adapter":
                found += _changed(old or {}, new or {}) if old and new else [_was("an adapter", bool(old), bool(new))]
            elif name == "weights" and a.get("dtype") != b.get("dtype"):
                continue  # the same numbers have other bits there
            elif name in _WORDS:
                found.append(_WORDS[name])
            else:
                found.append(_was(name, old, new))
    steps = ("max_steps", "num_train_epochs")
    old, new = ({k: v for k, v in side["options"].items() if k not in steps} for side in (then, now))
    return _changed(old, new) + found + _fewer_steps(then["options"], now["options"], planned)


def _changed(old: Mapping, new: Mapping) -> list[str]:
    """Names that only one version knows are no difference."""
    return [_was(name, old[name], new[name]) for name in new if name in old and old[name] != new[name]]


def _fewer_steps(old: Mapping, new: Mapping, planned: int | None) -> list[str]:
    if "max_steps" in new:
        before = old.get("max_steps", planned)
        return [_was("max_steps", before, new["max_steps"])] if before and new["max_steps"] < before else []
    if "max_steps" in old:
        return [f"max_steps was {old['max_steps']} and is not given"]
    before, after = old.get("num_train_epochs", 0), new["num_train_epochs"]
    return [_was("num_train_epochs", before, after)] if after < before else []


def _was(name: str, old, new) -> str:
    old, new = (text if len(text) <= 60 else f"{text[:57]}..." for text in (json.dumps(old), json.dumps(new)))
    return f"{name} was {old} and is {new}"
