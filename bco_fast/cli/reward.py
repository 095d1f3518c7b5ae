"""`bco-fast reward`: a Bradley-Terry reward model from pairs, for `judge` and `online`."""

from __future__ import annotations

import time

from . import common
from .gpu_defaults import keep_what_fits
from .run_options import add_run_options, check_earlier_run, parse_run


def reward(arguments: list[str]) -> dict:
    start = time.perf_counter()

    from ..online.reward_training import RewardConfig, RewardTrainer, encode_pairs

    own = common.Parser(add_help=False)
    add_run_options(own)
    own.add_argument("--data", metavar="FILE", help="pairs: prompt, chosen, rejected; a file or a Hub name; required")
    own.add_argument("--eval_data", metavar="FILE", help="held-out pairs; default: a share of --data")
    own.add_argument(
        "--eval_fraction", type=float, default=0.1, help="share of the prompts that is held out; 0 for none"
    )
    about = "Train a reward model from pairs (Bradley-Terry)."
    options, config = parse_run("reward", about, own, ("model", "data"), RewardConfig, arguments)

    from ..data.rows import read_rows, split_by_prompt
    from ..data.sources import FeedbackError

    common.check_input("--data", options.data)
    common.check_input("--eval_data", options.eval_data)
    if not 0 <= options.eval_fraction < 1:
        raise common.UsageError(f"--eval_fraction must be between 0 and 1, not {options.eval_fraction}")
    common.check_writable("--output_dir", config.output_dir)
    check_earlier_run(config)
    reading = {"needs": "pairs", "on_bad_row": config.on_bad_row, "columns": config.columns}
    with common.usage_errors(ValueError):
        with common.usage_errors(FeedbackError, prefix="--data "):
            rows = read_rows(options.data, **reading)
        with common.usage_errors(FeedbackError, prefix="--eval_data "):
            held_out = read_rows(options.eval_data, **reading) if options.eval_data else []
        if not held_out and options.eval_fraction:
            rows, held_out = split_by_prompt(rows, options.eval_fraction)
        judge = _model(options.model, config)
        keep_what_fits(config, options.of_the_gpu, judge.model)
        encoded = [encode_pairs(part, judge) or None for part in (rows, held_out)]
        trainer = RewardTrainer(judge, config, *encoded)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    metrics = trainer.evaluate() if held_out else {}
    trainer.save_model(config.output_dir)
    trainer.save_state()
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "pairs": len(rows),
        "held_out_pairs": len(held_out),
        "held_out_accuracy": metrics.get("eval_accuracy"),
        "held_out_margin": metrics.get("eval_margin"),
        "output_dir": config.output_dir,
    }


def _model(path: str, config):
    """A sequence-classification model with one logit; of a causal language model, with a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from ..data.chat import with_template
    from ..models.load import code_options, load_tokenizer
    from ..online.rewards import SequenceReward

    with common.usage_errors(Exception, prefix=f"--model {path}: "):  # a damaged folder raises anything
        tokenizer = with_template(load_tokenizer(path, config.trust_remote_code), config.chat_template)
        loading = {"dtype": getattr(torch, config.model_dtype), "use_safetensors": True, "num_labels": 1}
        model = AutoModelForSequenceClassification.from_pretrained(
            path, **loading, **code_options(path, config.trust_remote_code)
        )
        return SequenceReward(model, tokenizer, max_length=config.max_length)
