"""What a run writes for people to read: run.json, its log, held_out.jsonl and the model card.

run.json            model, data, options and results; no secrets, no absolute paths; rewritten atomically at every save
trainer_state.json  the whole log, once the run has ended
held_out.jsonl      one line per held-out completion of the last evaluation: {"step", "item", "label", "reward", "logp",
                    "tokens"}; reward in reward units, logp summed, in nats; "set" names the dataset where there are several
README.md           the model card: in every checkpoint, and in the run's folder at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import platform
import re
import shutil
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from ..data.dataset import FeedbackDataset
from ..files import atomic_path, atomic_text, json_numbers
from ..losses.metrics import auc_interval
from ..models.attention import base_attention
from ..models.memory import peak_memory_mb
from .checkpoints import candidates
from .config import FeedbackConfig
from .model_card import model_card

logger = logging.getLogger("bco_fast")

STATE = "trainer_state.json"
SAMPLES = "samples.jsonl"
"""Of `evaluation.samples`."""
_MODELS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")

# Always recorded; other options only if they differ from their default.
_ALWAYS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "max_prompt_length", "max_completion_length", "seed",
)  # fmt: skip
# Secrets, and where a run is stored or sent, which concerns no reader of its card.
_PRIVATE = re.compile(
    r"token|secret|password|api_key|^hub_|^push_to|_dir$|^resume_from|^trackio|^local_rank$|^loss_type$|^beta$"
)
_LOCAL_PATH = re.compile(r"(?<![\w:/.])(?:~|\.\.?)?/[^\s,;:'\"]+|\b[A-Za-z]:\\[^\s,;'\"]+")
_PACKAGES = (
    "bco_fast", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "triton", "liger_kernel", "flash_attn", "kernels",
)  # fmt: skip


_COUNTS = ("rows", "up", "down", "skipped", "prompts_cut", "completions_cut")


class RunRecorder(TrainerCallback):
    """Writes these files on the first process: the card with every saved model, the others also after evaluations and at the end."""

    def __init__(self, train: FeedbackDataset | None, held_out: FeedbackDataset | Mapping[str, FeedbackDataset] | None):
        sets = held_out if isinstance(held_out, Mapping) else {"": held_out} if held_out is not None else {}
        self.sets = {name: _describe(dataset) for name, dataset in sets.items()}
        self.record: dict = {"data": {"train": _describe(train), "held_out": _together(self.sets)}, "held_out": {}}
        self.name = ""
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows_step = 0
        self.start: float | None = None
        self.earlier_seconds = 0.0
        self.trained = False

    def begin_evaluation(self, prefix: str, dataset: FeedbackDataset) -> None:
        """What comes is about this dataset. Its name is what follows "eval" in the prefix of its metrics."""
        self.name = prefix.removeprefix("eval").removeprefix("_")
        self.sets[self.name] = _describe(dataset)
        self.record["data"]["held_out"] = _together(self.sets)

    def keep(self, columns: Tensor, labels: Tensor) -> None:
        """Hold the rows of an evaluation until `on_evaluate` writes them.

        Args:
            columns: [items, sides, >= 6]: reward, logp, ..., and last the number of tokens.
            labels: [items, sides] bool.
        """
        self.rows[self.name] = columns, labels

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trained = False
        self.start = time.perf_counter()
        self.record["date"] = time.strftime("%Y-%m-%d", time.gmtime())
        if state.global_step:  # resumed: times add up
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self.earlier_seconds = float(json.loads((Path(args.output_dir) / "run.json").read_text())["seconds"])
        elif state.is_world_process_zero:  # of another run
            if (there := earlier_run(args.output_dir)) is not None:
                logger.warning("%s holds %s, which this run replaces", args.output_dir, there)
            for name in ("held_out.jsonl", SAMPLES):
                (Path(args.output_dir) / name).unlink(missing_ok=True)
        self._update(args, state, model)
        self._write_record(args, state)

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        numbers = {name: value for name, value in (metrics or {}).items() if isinstance(value, (int, float))}
        earlier = self.record["held_out"]  # of the other datasets
        if earlier.get("step") != state.global_step:
            earlier = {}
        self.record["held_out"] = earlier | {name: value for name, value in numbers.items() if math.isfinite(value)}
        self.record["held_out"]["step"] = state.global_step
        if not self.name and self.name in self.rows:  # one dataset, without a name
            self._note_auc(self.rows[self.name][1], state)
        self._update(args, state, model)
        self._write_record(args, state)
        if self.trained:
            self._write_state(args, state)
        if self.rows_step != state.global_step:
            self.rows, self.rows_step = {k: v for k, v in self.rows.items() if k == self.name}, state.global_step
        if self.name in self.rows and state.is_world_process_zero:
            _write_rows(Path(args.output_dir) / "held_out.jsonl", self.rows, state.global_step)

    def _note_auc(self, labels: Tensor, state) -> None:
        found = self.record["held_out"]
        auc, up, down = found.get("eval_rewards/auc"), int(labels.sum()), int((~labels.bool()).sum())
        if auc is None or not up or not down:
            return
        found["auc_low"], found["auc_high"] = low, high = auc_interval(auc, up, down)
        if state.is_world_process_zero:
            logger.info("held-out AUC %.3f, 95 %% interval %.3f to %.3f (%d up, %d down)", auc, low, high, up, down)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._update(args, state, model)
        self._write_record(args, state)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._update(args, state, model)
        self.start, self.earlier_seconds, self.trained = None, self.record["seconds"], True
        self._write_record(args, state)
        self._write_state(args, state)

    def write_card(
        self,
        folder: str | Path,
        args: FeedbackConfig,
        state: TrainerState,
        model: nn.Module,
        license: str | None = None,
    ) -> None:
        """Write README.md beside a model. It replaces PEFT's, which knows less and contains local paths.

        `save_model` calls it, not `on_save`, because the manifest of a checkpoint holds the card's checksum.
        """
        self._update(args, state, model)
        with atomic_text(Path(folder) / "README.md") as file:
            file.write(model_card(self.record, license))

    def _update(self, args: FeedbackConfig, state, model: nn.Module | None) -> None:
        record = self.record
        if model is not None and "model" not in record:
            record |= _describe_model(model)
        record |= {
            "loss_type": args.loss_type,
            "beta": args.beta,
            "reference": args.objective.reference,
            "data_kind": args.objective.data,
            "devices": args.world_size,
            "options": public_options(args),
            "versions": package_versions(),
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": state.epoch,
            "peak_memory_mb": round(max(peak_memory_mb(), record.get("peak_memory_mb", 0.0)), 1),
            "peak_memory_of": "GPU" if torch.cuda.is_available() else "process",
        }
        now = 0.0 if self.start is None else time.perf_counter() - self.start
        record["seconds"] = round(self.earlier_seconds + now, 1)

    def _write_record(self, args, state) -> None:
        if state.is_world_process_zero:
            with atomic_text(Path(args.output_dir) / "run.json") as file:
                json.dump(json_numbers(self.record), file, indent=1)

    def _write_state(self, args, state) -> None:
        """The whole log of a run that has ended, so that nobody takes it for an interrupted one."""
        if state.is_world_process_zero:
            with atomic_path(Path(args.output_dir) / STATE) as path:
                state.save_to_json(path)


def earlier_run(folder: str | Path) -> str | None:
    """What there is of a run in its output_dir, in words; None where there is nothing."""
    folder = Path(folder)
    checkpoints = [path for path in candidates(True, folder) if path.is_dir()]
    if (folder / STATE).is_file():
        return "a finished run"
    if checkpoints:
        return f"an interrupted run, up to {checkpoints[0].name}"
    if (folder / "rounds").is_dir() and any((folder / "rounds").glob("round-*.jsonl")):
        return "rounds of an online run"
    return next((f"a model ({name})" for name in _MODELS if (folder / name).is_file()), None)


def remove_run(folder: str | Path) -> None:
    """Delete what `earlier_run` finds, but not the model: the next one replaces it when it is whole."""
    folder = Path(folder)
    for name in (STATE, "run.json", "held_out.jsonl", SAMPLES):
        (folder / name).unlink(missing_ok=True)
    for path in [*candidates(True, folder), folder / "rounds"]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _write_rows(path: Path, rows: Mapping[str, tuple[Tensor, Tensor]], step: int) -> None:
    with atomic_text(path) as file:
        for name, (columns, labels) in rows.items():
            for item, (sides, side_labels) in enumerate(zip(columns.tolist(), labels.bool().tolist(), strict=True)):
                for (reward, logp, *_, tokens), label in zip(sides, side_labels, strict=True):
                    row = {"step": step, "item": item, "label": label, "reward": reward, "logp": logp}
                    row |= {"tokens": int(tokens)} | ({"set": name} if name else {})
                    file.write(json.dumps(json_numbers(row)) + "\n")


def _together(sets: Mapping[str, dict]) -> dict | None:
    """The description of all datasets; each by itself is in `sets`, where they have names."""
    if not sets or list(sets) == [""]:
        return sets.get("")
    every = list(sets.values())
    counts = {name: sum(part.get(name, 0) for part in every) for part in every for name in part if name in _COUNTS}
    return {**every[0], **counts, "sets": {name or "eval": part for name, part in sets.items()}}


def _describe(dataset: FeedbackDataset | None) -> dict | None:
    if dataset is None:
        return None
    up = sum(example.label for example in dataset.examples)
    counts = {"rows": len(dataset), "up": up, "down": len(dataset.examples) - up, "pairs": dataset.paired}
    counts |= {name: n for name, n in dataset.report.items() if name != "rows"} | dataset.form
    return counts | ({"source": dataset.source} if dataset.source else {})


def _describe_model(model: nn.Module) -> dict:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "model": public(str(getattr(base.config, "_name_or_path", "") or "")),
        "architecture": type(base).__name__,
        "attention": base_attention(base.config),
        "adapter": hasattr(model, "peft_config"),
        "parameters": sum(n for n, _ in sizes),
        "trained_parameters": sum(n for n, trained in sizes if trained),
    }


def public_options(args: FeedbackConfig) -> dict:
    """Hyper-parameters to publish: the most important ones always, others if they differ from their default."""
    options = {}
    for field in dataclasses.fields(args):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = getattr(args, field.name)
        if not field.init or _PRIVATE.search(field.name) or (value == default and field.name not in _ALWAYS):
            continue
        value = value.value if isinstance(value, Enum) else value
        if isinstance(value, (str, int, float, bool, list, dict)) and value not in ("", [], {}):
            options[field.name] = public(value)
    if options.get("desirable_weight") == 1.0:
        del options["desirable_weight"]
    return options


def public(value):
    """The value with local paths reduced to their last part, and without nested keys that name a secret."""
    if isinstance(value, dict):
        return {str(k): public(v) for k, v in value.items() if not _PRIVATE.search(str(k))}
    if isinstance(value, (list, tuple)):
        return [public(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return _LOCAL_PATH.sub(lambda match: PurePath(match.group().replace("\\", "/")).name, value)
    return value if isinstance(value, (int, float, bool, type(None))) else str(type(value).__name__)


def package_versions() -> dict[str, str]:
    """Of Python, and of the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
