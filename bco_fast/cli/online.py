"""The command line of `bco-fast online`."""

from __future__ import annotations

import time

from .common import UsageError, _check_output, _checkpoint, _load_model, _parse_run, _Parser


def _own_parser() -> _Parser:
    """Options that are no field of `OnlineConfig`. What is required may come from --config too."""
    own = _Parser(prog="bco-fast online", add_help=False, allow_abbrev=False)
    own.add_argument("--config", help="YAML file of options, this one excepted; flags win over it")
    own.add_argument(
        "--model", metavar="PATH", help="folder of a Hugging Face causal language model, or a Hub name; required"
    )
    own.add_argument(
        "--prompts", metavar="FILE",
        help="JSONL or a JSON list of objects with prompt, a string or chat messages; further columns reach the reward; "
        "required",
    )  # fmt: skip
    own.add_argument(
        "--reward", metavar="REWARD",
        help="module:function of Python, called as function(prompts=, completions=, **columns) -> numbers, or the folder or "
        "Hub name of a sequence-classification model; required",
    )  # fmt: skip
    own.add_argument(
        "--eval_prompts", "--eval-prompts", metavar="FILE",
        help="held-out prompts, sampled after training and at --eval_steps; default: none",
    )  # fmt: skip
    return own


def online(arguments: list[str]) -> dict:
    """Align a model on completions that it samples and a reward judges. Everything is read before anything is written."""
    start = time.perf_counter()

    from ..online.config import OnlineConfig
    from ..online.prompts import read_prompts
    from ..online.rewards import RewardError, load_reward
    from ..online.trainer import OnlineFeedbackTrainer

    about = "Align a language model on its own completions, judged by a reward (UNA's online setting)."
    options, config = _parse_run(
        "online", about, _own_parser(), ("model", "prompts", "reward"), OnlineConfig, arguments
    )

    from ..models.memory import peak_memory_mb
    from ..training.checkpoints import CheckpointError

    config.resume_from_checkpoint = _checkpoint(config)
    _check_output(config.output_dir)
    try:
        prompts = read_prompts(options.prompts)
        eval_prompts = read_prompts(options.eval_prompts) if options.eval_prompts else None
        reward = load_reward(options.reward)
        model, tokenizer = _load_model(options.model, config)
        trainer = OnlineFeedbackTrainer(
            model, config, prompts, reward, processing_class=tokenizer, eval_prompts=eval_prompts
        )
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        metrics = trainer.evaluate() if eval_prompts else {}
    except (RewardError, CheckpointError, ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    trainer.save_model(config.output_dir)
    trainer.save_state()
    rounds = [entry for entry in trainer.state.log_history if "round" in entry]
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "rounds": len(rounds),
        "reward_first": rounds[0]["reward"],
        "reward_last": rounds[-1]["reward"],
        "kl_last": rounds[-1].get("kl"),
        "held_out_reward": metrics.get("eval_reward"),
        "output_dir": config.output_dir,
    }
