"""One training run by name, on any number of ranks: what the rank tests and their launchers compare.

torchrun --nproc_per_node 2 tests/training/ranked.py OUTPUT NAME [NAME ...]
"""

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path

import fsdp_on_cpu
import tiny
import torch
from small_runs import TOKENIZER, config
from torch.distributed.tensor import DTensor

from bco_fast import FeedbackTrainer
from bco_fast.models.load import whole_weights

ROWS = 4  # of a micro-batch
SHAPES = {
    "padded": {},
    "packed": {"padding_free": True},
    "tokens": {"tokens_per_batch": 48},
    "shared": {"share_prompts": "true", "tokens_per_batch": 64},
}
OPTIONS = {"bco": {"reduction": "class_mean"}, "kto": {"desirable_weight": "auto"}}


def cases(name):
    """ "kto-packed-3-lora-21" -> objective, shape, micro-batches of a step, adapter, rows."""
    loss_type, shape, accumulation, weights, rows = name.split("-")
    return loss_type, SHAPES[shape], int(accumulation), weights == "lora", int(rows), shape


def run(name, world, folder, *, scale=None, after=None, steps=5, **options):
    """Train for five steps, evaluate; -> log lines, metrics and weights. `scale` micro-batches stand in for that many ranks."""
    loss_type, shape, accumulation, lora, rows, kind = cases(name)
    with whole_weights():
        model = tiny.model()
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"):  # rank 0 alone reads the weights, where the trainer loads them
        model = _saved(model, Path(folder))
    torch.manual_seed(0)
    data, held_out = tiny.feedback_for(loss_type, rows), tiny.feedback_for(loss_type, 7, seed=5)
    if kind == "shared":  # a second completion of every prompt
        swapped = [
            {**row, "completion": other["completion"]} for row, other in zip(data, data[1:] + data[:1], strict=True)
        ]
        data = [row for two in zip(data, swapped, strict=True) for row in two] if loss_type != "dpo" else data + data
    adapter = {"use_peft": True, "lora_r": 4, "lora_alpha": 8} if lora else {}
    args = config(
        Path(folder) / name, loss_type=loss_type, max_steps=steps, **({} if "tokens_per_batch" in shape else {"per_device_train_batch_size": ROWS}),
        per_device_eval_batch_size=2, gradient_accumulation_steps=accumulation * (scale or 1), optim=os.environ.get("RANKED_OPTIM", "sgd"),
        learning_rate=0.3 if lora else 0.02, max_grad_norm=0.0, seed=3, **shape, **adapter, **OPTIONS.get(loss_type, {}),
        **options,
    )  # fmt: skip
    trainer = FeedbackTrainer(model, args, data, held_out, processing_class=TOKENIZER)
    if after is not None:
        after(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    left_out = ("runtime", "per_second", "preparation_time")
    lines = [{k: v for k, v in e.items() if not k.endswith(left_out)} for e in trainer.state.log_history if "loss" in e]
    weights = {n: p for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters() if p.requires_grad}
    with gathered(list(weights.values())):
        weights = {n: whole(p).detach().double().flatten().tolist() for n, p in weights.items()}
    found = {
        "lines": lines,
        "metrics": {k: v for k, v in metrics.items() if not k.endswith(left_out)},
        "weights": {n.removeprefix("module."): w for n, w in weights.items()},
        "layout": trainer.layout,
        "computed": trainer.reference_report.computed,
    }
    del trainer
    gc.collect()  # DDP's reducer must go before its process group
    return found


def _saved(model, folder):
    path = folder / "model"
    if not path.exists() and int(os.environ.get("RANK", "0")) == 0:
        model.save_pretrained(folder / "being written")
        (folder / "being written").rename(path)
    while not path.exists():
        time.sleep(0.05)
    return str(path)


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def gathered(parameters):
    """ZeRO-3 leaves no rank with a whole parameter."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def of_ranks(rank, world, folder, names, options, fsdp=False):
    if fsdp:
        fsdp_on_cpu.install()
    return {name: run(name, world, folder, **options) for name in names}


def main():
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    if os.environ.get("FSDP_ON_CPU"):
        fsdp_on_cpu.install()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found = of_ranks(rank, world, folder, names, {})
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
