"""What a run expects to hold in memory, what a step took, and what to do when it does not fit."""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainerCallback

from ..data.sources import one_line
from ..models.count import Memory, checkpointed, count_step
from ..models.memory import free_embeddings, peak_memory_mb
from ..models.plan import GROUPS, STEP, USABLE, longest, stages
from .config import FeedbackConfig

if TYPE_CHECKING:
    from .trainer import FeedbackTrainer

logger = logging.getLogger("bco_fast")

SAVING = ("gradient_checkpointing", "layer_chunk_tokens", "activation_offloading", "layer_checkpoints")
"""Options that `stages` turns on."""
WORTH_COUNTING = 2e9
"""Bytes. A smaller run fits everywhere, and counting takes seconds."""
MOMENTS = {"forward": "forward", "head": "head", "layer": "one layer", "ends": "embeddings"}


def describe(memory: Memory) -> str:
    """One line: the sum, and its parts."""
    parts = ", ".join(
        f"{MOMENTS.get(name, name)} {size / 1e9:.2f}" for name, size in memory.parts.items() if size > 5e6
    )
    host = f"; {memory.host / 1e9:.2f} GB in host memory" if memory.host else ""
    return f"{memory.total / 1e9:.2f} GB ({parts}){host}"


def micro_batch(args: FeedbackConfig) -> dict[str, int]:
    """The largest micro-batch that the options allow: `tokens` of each of `rows`."""
    if args.tokens_per_batch is not None:
        return {"tokens": args.tokens_per_batch, "rows": 1}
    return {"tokens": args.max_length, "rows": args.per_device_train_batch_size}


def usable_bytes(device: torch.device) -> float:
    """Of this device, before anything is on it."""
    if device.type == "cuda":
        return USABLE * torch.cuda.mem_get_info(device)[1]
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")) if device.type == "cpu" else float("inf")


def usable_host_bytes() -> float:
    """For what this process offloads: nine tenths of what is free, shared out over the processes of this machine."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return 0.9 * free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _countable(model: nn.Module, args: FeedbackConfig) -> bool:
    if args.fsdp or args.deepspeed or not hasattr(model, "config"):
        return False
    text, batch = model.config.get_text_config(), micro_batch(args)
    kept = 400 * batch["tokens"] * batch["rows"] * text.hidden_size * text.num_hidden_layers
    return 16 * sum(p.numel() for p in model.parameters()) + kept > WORTH_COUNTING


def _where(model: nn.Module, args: FeedbackConfig) -> dict:
    adapters = getattr(model, "peft_config", None) or {}
    return {
        "device": "cpu" if args.device.type == "cpu" else "cuda",
        "peft_config": next(iter(adapters.values()), None),
    }


def turn_on_what_fits(model: nn.Module, args: FeedbackConfig, budget: float | None = None) -> None:
    """`long_context="auto"`: set the options that a step of the largest micro-batch needs, and say so.

    Args:
        budget: bytes; the device's by default.
    """
    budget = usable_bytes(args.device) if budget is None else budget
    batch, stage, switched = micro_batch(args), None, []
    where = {"host": usable_host_bytes(), "rows": batch["rows"]} | _where(model, args)
    for stage, options in stages(model.config, args, batch["tokens"], budget, **where):
        if stage.switch is not None:
            if stage.switch.option == GROUPS and (args.fsdp or args.deepspeed):
                break  # it runs layers out of turn
            switched.append(f"{stage.switch.option}={stage.switch.value}")
            for name in ("activation_checkpointing", *SAVING):
                if hasattr(args, name):
                    setattr(args, name, getattr(options, name))
    logger.info(
        "long_context=auto: %s; a step of %d tokens takes %s of %.2f GB",
        "turned on " + ", ".join(switched) if switched else "nothing to turn on",
        batch["tokens"] * batch["rows"], describe(stage.memory), budget / 1e9,
    )  # fmt: skip
    if stage.memory.total > budget:
        logger.warning(
            "long_context=auto: that is too much; lower max_length or the micro-batch, or see `bco-fast plan`"
        )


class MemoryWatch(TrainerCallback):
    """Says at the start of a run what a step is expected to take, and after the second step, the first with the
    optimizer's state, what it took."""

    def __init__(self, trainer: FeedbackTrainer):
        self.trainer = trainer
        self.expected: Memory | None = None
        self.steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if checkpointed(args):
            free_embeddings(
                model, getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
            )
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            logger.info("memory: PYTORCH_ALLOC_CONF=%s", os.environ.get("PYTORCH_ALLOC_CONF", ""))
        self.steps = 0
        if not _countable(model, args):
            return
        options, batch = copy.copy(args), micro_batch(args)
        options.activation_offloading = args.activation_offloading and args.device.type != "cpu"
        try:
            self.expected = count_step(model.config, options, **batch, **_where(model, args))
        except Exception as error:  # of a stranger's model code; training does not need the count
            logger.info("memory: not counted (%s)", one_line(error)[:200])
            return
        logger.info("memory: a step is expected to take %s", describe(self.expected))

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.expected is None or self.steps != 2:
            return
        of = "allocated" if args.device.type == "cuda" else "resident, libraries included"
        logger.info(
            "memory: a step took %.2f GB (%s), expected %.2f GB", peak_memory_mb() / 1e3, of, self.expected.total / 1e9
        )

    def log(self) -> dict[str, float]:
        """For a log line of a run on a GPU: the most that training has allocated and reserved so far, GB. What is reserved
        beyond what is allocated is fragmentation."""
        if self.trainer.args.device.type != "cuda":
            return {}
        most = {
            "memory/allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
            "memory/reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }
        return {name: round(value, 3) for name, value in most.items()}


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def advice(trainer: FeedbackTrainer) -> str:
    """What to change after a step did not fit."""
    args, batch = trainer.args, micro_batch(trainer.args)
    model = trainer.accelerator.unwrap_model(trainer.model)
    begins = f"out of memory at {batch['rows']} x {batch['tokens']} tokens a micro-batch"
    if batch["rows"] > 1:
        begins += "; --per_device_train_batch_size 1 with more --gradient_accumulation_steps takes less"
    try:
        budget = usable_bytes(args.device)
        where = {"host": usable_host_bytes(), "rows": batch["rows"]} | _where(model, args)
        *_, (stage, options) = stages(model.config, args, batch["tokens"], budget, **where)
        if stage.switch is not None and stage.memory.total <= budget:
            flags = [
                f"--{n} {str(getattr(options, n)).lower()}" for n in SAVING if getattr(options, n) != getattr(args, n)
            ]
            return f"{begins}. Turn on {' '.join(flags)} (or --long_context auto): a step then takes {describe(stage.memory)}"
        fits = longest(model.config, options, budget, **where) // STEP * STEP
        return f"{begins}. With every switch of `bco-fast plan` on, --max_length {fits} fits"
    except Exception:  # the count is advice; the error that brought us here is what must be told
        return f"{begins}: lower --max_length, or see `bco-fast plan`"
