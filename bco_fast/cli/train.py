"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

import time
from pathlib import Path

from .common import UsageError, _check_output, _checkpoint, _load_model, _parse_run, _Parser


def _own_train_parser() -> _Parser:
    """Options of `train` that are no field of `FeedbackConfig`. What is required may come from --config too."""
    own = _Parser(prog="bco-fast train", add_help=False, allow_abbrev=False)
    own.add_argument("--config", help="YAML file of options, this one excepted; flags win over it")
    own.add_argument(
        "--model", metavar="PATH", help="folder of a Hugging Face causal language model, or a Hub name; required"
    )
    own.add_argument(
        "--data", metavar="FILE",
        help="feedback: prompt, completion and label or score; or prompt, chosen, rejected; weight is optional. A file "
        "(JSONL, JSON, CSV, Parquet) or a Hub name, owner/dataset:split; required",
    )  # fmt: skip
    own.add_argument("--eval_data", "--eval-data", help="held-out feedback; default: a share of --data")
    own.add_argument(
        "--eval_fraction", "--eval-fraction", type=float, default=0.1,
        help="share of the prompts of --data that is held out when --eval_data is not given; 0 for none",
    )  # fmt: skip
    return own


def _parse_train(arguments: list[str]):
    """-> (namespace of our own options, FeedbackConfig)."""
    from ..training.config import FeedbackConfig

    about = "Align a language model from thumbs up and down."
    return _parse_run("train", about, _own_train_parser(), ("model", "data"), FeedbackConfig, arguments)


def train(arguments: list[str]) -> dict:
    """Align a model from a file of thumbs up and down. Everything is read and checked before anything is written."""
    start = time.perf_counter()
    options, config = _parse_train(arguments)

    from ..data.rows import read_rows, split_by_prompt, unpair
    from ..data.sources import FeedbackError, is_hub_name
    from ..data.tokenize import tokenize_rows

    for flag, path in (("--data", options.data), ("--eval_data", options.eval_data)):
        if path is not None and not is_hub_name(path) and not Path(path).is_file():
            raise UsageError(f"{flag} {path}: no such file")
    config.resume_from_checkpoint = _checkpoint(config)
    _check_output(config.output_dir)
    try:
        reading = {
            "needs": config.objective.data,
            "on_bad_row": config.on_bad_row,
            "columns": config.columns,
            "score_scale": config.score_scale,
        }
        rows = read_rows(options.data, **reading)
        held_out = read_rows(options.eval_data, **reading) if options.eval_data else []
        if not held_out and options.eval_fraction:
            rows, held_out = split_by_prompt(rows, options.eval_fraction)
        if config.objective.data != "pairs":
            rows, held_out = unpair(rows, config.pairing_ratio), unpair(held_out)
        model, tokenizer = _load_model(options.model, config)
        limits = {
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "on_bad_row": config.on_bad_row,
            "progress": not config.disable_tqdm,
        }
        datasets = [tokenize_rows(part, tokenizer, **limits) if part else None for part in (rows, held_out)]
    except (FeedbackError, ValueError) as error:
        raise UsageError(str(error)) from None
    return run_training(model, tokenizer, config, *datasets, start=start)


def run_training(model, tokenizer, config, train_dataset, eval_dataset, *, start: float) -> dict:
    """Train, evaluate, save; -> what `train` prints."""
    from ..models.memory import peak_memory_mb
    from ..reference.cache import CacheError
    from ..training.checkpoints import CheckpointError
    from ..training.trainer import FeedbackTrainer

    try:
        trainer = FeedbackTrainer(model, config, train_dataset, eval_dataset, processing_class=tokenizer)
    except (CacheError, ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    metrics = trainer.evaluate() if eval_dataset is not None else {}
    trainer.save_model(config.output_dir)
    trainer.save_state()
    report = trainer.reference_report
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": round(peak_memory_mb(), 1),
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
