"""The command lines of `bco-fast generate`, `judge` and `shifts`."""

from __future__ import annotations

import logging
from pathlib import Path

from .common import UsageError, _Parser, _tokenizer

logger = logging.getLogger("bco_fast")


def judge(arguments: list[str]) -> dict:
    """Compare two files of completions by a reward."""
    parser = _Parser(prog="bco-fast judge", allow_abbrev=False, description="Compare two files of completions.")
    parser.add_argument("a", help="file of completions: AlpacaEval, Arena-Hard or JSONL")
    parser.add_argument("b", help="the file to compare it with")
    parser.add_argument(
        "--reward", required=True, help="folder of a sequence-classification model, or module:function of Python"
    )
    parser.add_argument("--prompts", help="question.jsonl, for files that hold question_ids but no prompts")
    parser.add_argument("--tokenizer", help="folder; counts tokens (default: the reward model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default: %(default)s)")
    options = parser.parse_args(arguments)

    from ..data.prompts import GenerationError, read_prompts
    from ..evaluation.judge import JudgeError, as_summary, describe, read_answers
    from ..evaluation.judge import judge as compare
    from ..online.rewards import RewardError, load_reward

    try:
        a, b = read_answers(options.a), read_answers(options.b)
        prompts = {p.id: p.text for p in read_prompts(options.prompts) if p.id is not None} if options.prompts else None
        reward = load_reward(options.reward)
        tokenizer = _tokenizer(options.tokenizer) if options.tokenizer else getattr(reward, "tokenizer", None)
        verdict = compare(
            a,
            b,
            reward,
            prompts=prompts,
            count_tokens=tokenizer and (lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])),
            resamples=options.resamples,
            seed=options.seed,
        )
    except (GenerationError, JudgeError, RewardError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    for path, alone in ((options.a, verdict.only_in_a), (options.b, verdict.only_in_b)):
        if alone:
            logger.warning("%s: %d completions have no counterpart and count nowhere", path, alone)
    print(describe(verdict, _names(options.a, options.b)), flush=True)
    return as_summary(verdict)


def _names(a: str, b: str) -> tuple[str, str]:
    names = Path(a).stem, Path(b).stem
    return ("A", "B") if names[0] == names[1] else (f"A {names[0]}", f"B {names[1]}")
