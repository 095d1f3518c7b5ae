"""Train under Ray Train: the workers are the ranks, checkpoints are reported to Ray, and a run whose worker died goes on.

    pip install "ray[train]"
    python examples/ray_train.py --model PATH --data feedback.jsonl --output_dir /shared/out --workers 8 --gpus 1

`--output_dir` and `--cache_dir` must be on storage that every worker sees. Ray restarts all workers when one dies; they
resume from the newest whole checkpoint in `--output_dir`.
"""

import argparse
import os
from pathlib import Path

import ray
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import AutoTokenizer, TrainerCallback

from bco_fast import FeedbackConfig, FeedbackTrainer


class Report(TrainerCallback):
    """Reports every checkpoint to Ray, with the last logged values. Every worker must report; rank 0 hands it over."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        values = {name: value for entry in state.log_history for name, value in entry.items()}
        checkpoint = train.Checkpoint.from_directory(folder) if train.get_context().get_world_rank() == 0 else None
        train.report(values, checkpoint=checkpoint)


def train_one_worker(settings: dict) -> None:
    # Ray's torch backend has set RANK, WORLD_SIZE and the process group, which the Trainer takes over.
    args = FeedbackConfig(**settings["options"])
    trainer = FeedbackTrainer(
        settings["model"],
        args,
        settings["data"],
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[Report()],
    )
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")))
    trainer.save_model(str(Path(args.output_dir, "final")))


def main(arguments: list[str] | None = None) -> train.Result:
    parser = argparse.ArgumentParser(description="Align a model from feedback under Ray Train.")
    for name in ("model", "data", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--cache_dir", help="of the reference; default: reference/ in --output_dir")
    parser.add_argument("--workers", type=int, default=2, help="ranks")
    parser.add_argument("--gpus", type=float, default=0, help="of a worker; 0: train on the CPU")
    parser.add_argument("--loss_type", default="bco")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of prompt and completion")
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--failures", type=int, default=3, help="how often Ray restarts the workers")
    given = parser.parse_args(arguments)
    options = {
        "output_dir": os.path.abspath(given.output_dir),
        "cache_dir": os.path.abspath(given.cache_dir or Path(given.output_dir, "reference")),
        "loss_type": given.loss_type,
        "max_length": given.max_length,
        "max_steps": given.max_steps,
        "save_strategy": "steps",
        "save_steps": given.save_steps,
        "use_cpu": not given.gpus,
        "disable_tqdm": True,
        "report_to": "none",
    }
    settings = {"model": os.path.abspath(given.model), "data": os.path.abspath(given.data), "options": options}
    trainer = TorchTrainer(
        train_one_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if given.gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=given.workers,
            use_gpu=bool(given.gpus),
            resources_per_worker={"GPU": given.gpus} if given.gpus else {"CPU": 1},
        ),
        run_config=train.RunConfig(
            name="bco_fast",
            storage_path=os.path.join(options["output_dir"], "ray"),
            failure_config=train.FailureConfig(max_failures=given.failures),
        ),
    )
    return trainer.fit()


if __name__ == "__main__":
    ray.init(ignore_reinit_error=True)
    print(main())
