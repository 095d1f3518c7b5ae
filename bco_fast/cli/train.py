"""`bco-fast train`: align a model from a file of thumbs up and down."""

from __future__ import annotations

import random
import time

from . import common
from .gpu_defaults import keep_what_fits
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
    own.add_argument(
        "--max_samples",
        type=int,
        help="rows of --data, and of --eval_data, to take at most, drawn alike for every seed (default: all)",
    )
    own.add_argument(
        "--sample_prompts",
        metavar="FILE",
        help="at most 64 different prompts, whose completions are logged before, during and after training, as prompts of `bco-fast "
        "generate` (default: none)",
    )
    own.add_argument("--sample_every", type=int, help="optimizer steps between samples (default: a quarter of the run)")
    own.add_argument(
        "--sample_tokens", type=int, help="longest sample, tokens (default: 128, at most half of the model's positions)"
    )
    about = "Align a language model from thumbs up and down."
    return parse_run("train", about, own, ("model", "data"), FeedbackConfig, arguments)


def train(arguments: list[str]) -> dict:
    """Everything is read and checked before anything is written."""
    start = time.perf_counter()
    options, config = parse(arguments)

    from ..data.sources import name_of
    from ..data.tokenize import tokenize_rows
    from ..reference.adapter import check_adapter_folder

    common.check_input("--data", options.data)
    common.check_input("--eval_data", options.eval_data)
    if not 0 <= options.eval_fraction < 1:
        raise common.UsageError(f"--eval_fraction must be between 0 and 1, not {options.eval_fraction}")
    if options.max_samples is not None and options.max_samples < 1:
        raise common.UsageError(f"--max_samples must be at least 1, not {options.max_samples}")
    samples = _samples(options)
    config.resume_from_checkpoint = checkpoint_to_resume(config)
    common.check_writable("--output_dir", config.output_dir)
    check_earlier_run(config)
    if config.ref_adapter is not None:
        with common.usage_errors(ValueError):
            check_adapter_folder("--ref_adapter", config.ref_adapter)
    if config.cache_dir is not None and config.objective.reference:
        common.check_writable("--cache_dir", config.cache_dir)
    with common.usage_errors(ValueError):
        rows, held_out, rows_read = _rows(options, config)
        model, tokenizer = common.load_model_and_tokenizer(options.model, config)
        keep_what_fits(config, options.of_the_gpu, model)
        names = ("max_length", "max_prompt_length", "max_completion_length", "on_bad_row")
        limits = {name: getattr(config, name) for name in names} | {"progress": not config.disable_tqdm}
        datasets = [tokenize_rows(part, tokenizer, **limits) if part else None for part in (rows, held_out)]
        for dataset, source in zip(datasets, (options.data, options.eval_data or options.data), strict=True):
            if dataset is not None:
                dataset.source = name_of(source)
        if rows_read is not None:
            datasets[0].report["rows_read"] = rows_read
        if samples is not None:
            with common.usage_errors(ValueError, prefix=f"--sample_prompts {options.sample_prompts}: "):
                samples.encode(tokenizer, datasets[0].form)
    return run_training(model, tokenizer, config, *datasets, start=start, samples=samples)


def _rows(options, config) -> tuple[list, list, int | None]:
    """Training rows, held-out rows, and how many rows --data has if --max_samples leaves some out."""
    from ..data.rows import read_rows, split_by_prompt, unpair
    from ..data.sources import FeedbackError

    reading = {name: getattr(config, name) for name in ("on_bad_row", "columns", "score_scale", "labels")}
    needs, rows_read = config.objective.data, None
    with common.usage_errors(FeedbackError, prefix="--data "):
        rows = read_rows(options.data, needs=needs, **reading)
    with common.usage_errors(FeedbackError, prefix="--eval_data "):
        held_out = read_rows(options.eval_data, needs=needs, **reading) if options.eval_data else []
    if (most := options.max_samples) is not None:
        rows_read = len(rows) if most < len(rows) else None
        common.logger.info("--max_samples: %d of %d rows of --data", min(most, len(rows)), len(rows))
        rows, held_out = (_drawn(part, most) for part in (rows, held_out))
    if not held_out and options.eval_fraction:
        rows, held_out = split_by_prompt(rows, options.eval_fraction)
    if needs != "pairs":
        rows, held_out = unpair(rows, config.pairing_ratio), unpair(held_out)
    if needs == "labels":
        _check_classes(config.loss_type, rows, held_out)
    return rows, held_out, rows_read


def _drawn(rows: list, most: int) -> list:
    """So many of the rows, in their order: the same ones whatever the seed, so that runs over seeds share a reference."""
    if most >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]  # noqa: S311 - not a secret


def _samples(options):
    """What --sample_prompts asks for; None without it."""
    from ..data.sources import FeedbackError
    from ..evaluation.generate import GenerationError
    from ..evaluation.samples import PromptSamples

    if options.sample_prompts is None:
        for name in ("sample_every", "sample_tokens"):
            if getattr(options, name) is not None:
                raise common.UsageError(f"--{name} needs --sample_prompts")
        return None
    common.check_input("--sample_prompts", options.sample_prompts)
    numbers = {"every": options.sample_every, "max_new_tokens": options.sample_tokens}
    with common.usage_errors(GenerationError), common.usage_errors(FeedbackError, prefix="--sample_prompts "):
        return PromptSamples(options.sample_prompts, **numbers)


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


def run_training(model, tokenizer, config, train_dataset, eval_dataset, *, start: float, samples=None) -> dict:
    """Train, evaluate, save; -> what `train` prints.

    Args:
        samples: `PromptSamples`, or None.
    """
    from ..reference.cache import CacheError
    from ..training.trainer import FeedbackTrainer

    remote = [Exception] if config.push_to_hub else []  # of half a dozen kinds
    with (
        common.usage_errors(ValueError, TypeError, ImportError, CacheError),
        common.usage_errors(*remote, prefix="--push_to_hub: "),
    ):
        trainer = FeedbackTrainer(model, config, train_dataset, eval_dataset, processing_class=tokenizer)
        if samples is not None:
            samples.attach(trainer)
    with resumable(config):
        run(trainer, config.resume_from_checkpoint)
        evaluated = trainer.recorder.record["held_out"].get("step") == trainer.state.global_step
        if eval_dataset is not None and (not evaluated or config.load_best_model_at_end):
            trainer.evaluate()
        trainer.save_model(config.output_dir)
        trainer.save_state()
    report, held_out = trainer.reference_report, trainer.recorder.record["held_out"]
    return run_summary(trainer, start) | {
        "rows": len(train_dataset),
        "cache_rows": report.rows,
        "cache_hits": report.hits,
        "cache_computed": report.computed,
        "delta": round(trainer.delta, 4),
        "held_out_rows": 0 if eval_dataset is None else len(eval_dataset),
        "held_out_margin": held_out.get("eval_rewards/margins"),
        "held_out_auc": held_out.get("eval_rewards/auc"),
        "held_out_auc_95": [held_out["auc_low"], held_out["auc_high"]] if "auc_low" in held_out else None,
        "output_dir": config.output_dir,
    }
