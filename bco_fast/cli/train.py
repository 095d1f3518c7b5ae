"""`bco-fast train`: align a model from a file of thumbs up and down."""

from __future__ import annotations

import time

from . import common
from .run_options import (
    add_run_options,
    check_earlier_run,
    checkpoint_to_resume,
    parse_run,
    resumable,
    run,
    run_summary,
)


def parse(arguments: list[str]):
    """-> (namespace of the options that are not fields of `FeedbackConfig`, FeedbackConfig)."""
    from ..training.config import FeedbackConfig

    own = common.Parser(add_help=False)
    add_run_options(own)
    own.add_argument(
        "--data",
        metavar="FILE",
        help="feedback: prompt, completion and label or score; or prompt, chosen, rejected; weight is optional. A file "
        "(JSONL, JSON, CSV, Parquet) or a Hub name, owner/dataset:split; required",
    )
    own.add_argument("--eval_data", metavar="FILE", help="held-out feedback; default: a share of --data")
    own.add_argument(
        "--eval_fraction",
        type=float,
        default=0.1,
        help="share of the prompts of --data that is held out when --eval_data is not given; 0 for none",
    )
    about = "Align a language model from thumbs up and down."
    return parse_run("train", about, own, ("model", "data"), FeedbackConfig, arguments)


def train(arguments: list[str]) -> dict:
    """Everything is read and checked before anything is written."""
    start = time.perf_counter()
    options, config = parse(arguments)

    from ..data.rows import read_rows, split_by_prompt, unpair
    from ..data.sources import FeedbackError
    from ..data.tokenize import tokenize_rows

    common.check_input("--data", options.data)
    common.check_input("--eval_data", options.eval_data)
    if not 0 <= options.eval_fraction < 1:
        raise common.UsageError(f"--eval_fraction must be between 0 and 1, not {options.eval_fraction}")
    config.resume_from_checkpoint = checkpoint_to_resume(config)
    common.check_writable("--output_dir", config.output_dir)
    check_earlier_run(config)
    if config.cache_dir is not None and config.objective.reference:
        common.check_writable("--cache_dir", config.cache_dir)
    reading = {name: getattr(config, name) for name in ("on_bad_row", "columns", "score_scale", "labels")}
    names = ("max_length", "max_prompt_length", "max_completion_length", "on_bad_row")
    limits = {name: getattr(config, name) for name in names}
    with common.usage_errors(ValueError):
        needs = config.objective.data
        with common.usage_errors(FeedbackError, prefix="--data "):
            rows = read_rows(options.data, needs=needs, **reading)
        with common.usage_errors(FeedbackError, prefix="--eval_data "):
            held_out = read_rows(options.eval_data, needs=needs, **reading) if options.eval_data else []
        if not held_out and options.eval_fraction:
            rows, held_out = split_by_prompt(rows, options.eval_fraction)
        if needs != "pairs":
            rows, held_out = unpair(rows, config.pairing_ratio), unpair(held_out)
        if needs == "labels":
            _check_classes(config.loss_type, rows, held_out)
        model, tokenizer = common.load_model_and_tokenizer(options.model, config)
        progress = not config.disable_tqdm
        datasets = [
            tokenize_rows(part, tokenizer, progress=progress, **limits) if part else None for part in (rows, held_out)
        ]
    return run_training(model, tokenizer, config, *datasets, start=start)


def _check_classes(loss_type: str, rows, held_out) -> None:
    from ..data.labels import log_classes

    for name, part in (("training rows", rows), ("held-out rows", held_out)):
        if part:
            log_classes(name, [row.label for row in part])
    thumbs = {row.label for row in rows}
    if len(thumbs) == 1 and loss_type != "sft":
        only = "up" if thumbs.pop() else "down"
        raise common.UsageError(
            f"--data: all {len(rows)} training rows are thumbs {only}; {loss_type} compares the two"
        )


def run_training(model, tokenizer, config, train_dataset, eval_dataset, *, start: float) -> dict:
    """Train, evaluate, save; -> what `train` prints."""
    from ..reference.cache import CacheError
    from ..training.trainer import FeedbackTrainer

    remote = [Exception] if config.push_to_hub else []  # of half a dozen kinds
    with (
        common.usage_errors(ValueError, TypeError, ImportError, CacheError),
        common.usage_errors(*remote, prefix="--push_to_hub: "),
    ):
        trainer = FeedbackTrainer(model, config, train_dataset, eval_dataset, processing_class=tokenizer)
    with resumable(config):
        run(trainer, config.resume_from_checkpoint)
        metrics = trainer.evaluate() if eval_dataset is not None else {}
        trainer.save_model(config.output_dir)
        trainer.save_state()
    report = trainer.reference_report
    return run_summary(trainer, start) | {
        "rows": len(train_dataset),
        "cache_rows": report.rows,
        "cache_hits": report.hits,
        "cache_computed": report.computed,
        "delta": round(trainer.delta, 4),
        "held_out_rows": 0 if eval_dataset is None else len(eval_dataset),
        "held_out_margin": metrics.get("eval_rewards/margins"),
        "held_out_auc": metrics.get("eval_rewards/auc"),
        "output_dir": config.output_dir,
    }
