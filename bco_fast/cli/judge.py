"""`bco-fast judge`: two files of completions compared by a reward."""

from __future__ import annotations

from pathlib import Path

from .common import Parser, add_code_option, check_input, logger, open_tokenizer, usage_errors


def judge(arguments: list[str]) -> dict:
    parser = Parser(prog="bco-fast judge", description="Compare two files of completions by a reward.")
    parser.add_argument("a", help="file of completions: AlpacaEval, Arena-Hard or JSONL")
    parser.add_argument("b", help="the file to compare it with")
    parser.add_argument(
        "--reward", required=True, help="folder of a sequence-classification model, or module:function of Python"
    )
    parser.add_argument(
        "--prompts", help="question.jsonl, for files that hold question_ids but no prompts (default: none)"
    )
    parser.add_argument("--tokenizer", help="folder; counts tokens (default: the reward model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
    add_code_option(parser)
    options = parser.parse_args(arguments)

    from ..data.prompts import id_of, read_prompts
    from ..data.sources import FeedbackError
    from ..data.tokenizer import text_ids
    from ..evaluation.judge import as_summary, describe, read_answers
    from ..evaluation.judge import judge as compare
    from ..online.rewards import RewardError, load_reward

    check_input("--prompts", options.prompts)
    with usage_errors(ValueError):
        a, b = read_answers(options.a), read_answers(options.b)
        with usage_errors(FeedbackError, prefix="--prompts "):
            rows = read_prompts(options.prompts) if options.prompts else []
        prompts = {id_of(row): row["prompt"] for row in rows if id_of(row) is not None}
        with usage_errors(RewardError, prefix="--reward "):
            reward = load_reward(options.reward, options.trust_remote_code)
        tokenizer = getattr(reward, "tokenizer", None)
        if options.tokenizer is not None:
            tokenizer = open_tokenizer("--tokenizer", options.tokenizer, options.trust_remote_code)
        count = tokenizer and (lambda text: len(text_ids(tokenizer, [text])[0]))
        bootstrap = {"resamples": options.resamples, "seed": options.seed}
        verdict = compare(a, b, reward, prompts=prompts, count_tokens=count, **bootstrap)
    for path, alone in ((options.a, verdict.only_in_a), (options.b, verdict.only_in_b)):
        if alone:
            logger.warning("%s: %d completions have no counterpart and are not counted", path, alone)
    names = Path(options.a).stem, Path(options.b).stem
    labels = ("A", "B") if names[0] == names[1] else (f"A {names[0]}", f"B {names[1]}")
    print(describe(verdict, labels), flush=True)
    return as_summary(verdict)
