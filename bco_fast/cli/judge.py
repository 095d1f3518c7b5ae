"""`bco-fast judge`: two files of completions compared by a reward, or by a chat model behind an endpoint."""

from __future__ import annotations

from pathlib import Path

from .common import Parser, UsageError, add_code_option, check_input, check_output, logger, open_tokenizer, usage_errors


def judge(arguments: list[str]) -> dict:
    parser = Parser(prog="bco-fast judge", description="Compare two files of completions by a reward or a chat model.")
    parser.add_argument("a", help="file of completions: AlpacaEval, Arena-Hard or JSONL")
    parser.add_argument("b", help="the file to compare it with")
    parser.add_argument(
        "--reward", help="folder of a sequence-classification model, or module:function of Python (this or --endpoint)"
    )
    parser.add_argument("--endpoint", help="URL of an OpenAI-compatible API, as in https://api.openai.com/v1")
    parser.add_argument("--judge_model", help="the judge's name at the endpoint, as in gpt-4o-2024-08-06")
    parser.add_argument("--key_variable", default="OPENAI_API_KEY", help="environment variable that holds the key")
    parser.add_argument(
        "--verdicts",
        help="JSONL file that keeps verdicts, so that a stopped run goes on (default: A with .verdicts.jsonl)",
    )
    parser.add_argument("--judge_prompt", help="file with {question}, {answer_a}, {answer_b} (default: built in)")
    parser.add_argument("--workers", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one answer")
    parser.add_argument("--retries", type=int, default=5, help="further tries of a request that may still succeed")
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

    if (options.reward is None) is (options.endpoint is None):
        raise UsageError("give one of --reward and --endpoint")
    check_input("--prompts", options.prompts)
    with usage_errors(ValueError):
        a, b = read_answers(options.a), read_answers(options.b)
        with usage_errors(FeedbackError, prefix="--prompts "):
            rows = read_prompts(options.prompts) if options.prompts else []
        prompts = {id_of(row): row["prompt"] for row in rows if id_of(row) is not None}
        with usage_errors(RewardError, prefix="--reward "):
            reward = (
                _pairwise(options) if options.reward is None else load_reward(options.reward, options.trust_remote_code)
            )
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


def _pairwise(options):
    """The judge behind --endpoint."""
    from ..evaluation.endpoint import QUESTION, ChatEndpoint, PairwiseJudge, Verdicts

    if not options.judge_model:
        raise UsageError("--endpoint needs --judge_model")
    if options.retries < 0 or not 0 < options.timeout < float("inf"):
        raise UsageError(f"--retries must be >= 0 and --timeout > 0, not {options.retries} and {options.timeout}")
    kept = options.verdicts or f"{options.a}.verdicts.jsonl"
    check_output("--verdicts", kept, options.a)
    check_input("--judge_prompt", options.judge_prompt)
    prompt = Path(options.judge_prompt).read_text() if options.judge_prompt else QUESTION
    endpoint = ChatEndpoint(
        options.endpoint, options.judge_model, options.key_variable, options.timeout, options.retries
    )
    return PairwiseJudge(endpoint, Verdicts(kept), prompt=prompt, workers=options.workers)
