"""`bco-fast online`: align a model on completions that it samples and a reward judges."""

from __future__ import annotations

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
    """-> (namespace of the options that are not fields of `OnlineConfig`, OnlineConfig)."""
    from ..online.config import OnlineConfig

    own = common.Parser(add_help=False)
    add_run_options(own)
    own.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSONL, JSON, CSV or Parquet with prompt, a string or chat messages; further columns reach the reward; "
        "required",
    )
    own.add_argument(
        "--reward",
        metavar="REWARD",
        help="module:function of Python, called as function(prompts=, completions=, **columns) -> numbers; or the folder "
        "or Hub name of a sequence-classification model; required",
    )
    own.add_argument(
        "--eval_prompts",
        metavar="FILE",
        help="held-out prompts, sampled after training and at --eval_steps; default: none",
    )
    about = "Align a language model on its own completions, judged by a reward (UNA's online setting)."
    return parse_run("online", about, own, ("model", "prompts", "reward"), OnlineConfig, arguments)


def online(arguments: list[str]) -> dict:
    """Everything is read before anything is written."""
    start = time.perf_counter()
    options, config = parse(arguments)

    from ..data.form import follow, trained_form
    from ..data.prompts import read_prompts
    from ..data.sources import FeedbackError
    from ..online.rewards import RewardError, load_reward
    from ..online.trainer import OnlineFeedbackTrainer

    config.resume_from_checkpoint = checkpoint_to_resume(config)
    common.check_input("--prompts", options.prompts)
    common.check_input("--eval_prompts", options.eval_prompts)
    common.check_writable("--output_dir", config.output_dir)
    check_earlier_run(config)
    with common.usage_errors(ValueError, TypeError, ImportError):
        with common.usage_errors(FeedbackError, prefix="--prompts "):
            prompts = read_prompts(options.prompts)
        with common.usage_errors(FeedbackError, prefix="--eval_prompts "):
            eval_prompts = read_prompts(options.eval_prompts) if options.eval_prompts else None
        with common.usage_errors(RewardError, prefix="--reward "):
            reward = load_reward(options.reward, config.trust_remote_code)
        model, tokenizer = common.load_model_and_tokenizer(options.model, config)
        keep_what_fits(config, options.of_the_gpu, model)
        follow(trained_form(options.model), prompts, tokenizer, "off")  # strings are read as text here
        trainer = OnlineFeedbackTrainer(
            model, config, prompts, reward, processing_class=tokenizer, eval_prompts=eval_prompts
        )
    with resumable(config):
        with common.usage_errors(ValueError, TypeError, ImportError):
            run(trainer, config.resume_from_checkpoint)
            metrics = trainer.evaluate() if eval_prompts else {}
        trainer.save_model(config.output_dir)
        trainer.save_state()
    rounds = [entry for entry in trainer.state.log_history if "round" in entry]
    return run_summary(trainer, start) | {
        "rounds": len(rounds),
        "reward_first": rounds[0]["reward"],
        "reward_last": rounds[-1]["reward"],
        "kl_last": rounds[-1].get("kl"),
        "held_out_reward": metrics.get("eval_reward"),
        "output_dir": config.output_dir,
    }
