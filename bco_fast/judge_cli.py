"""The command lines of `bco-fast generate`, `judge` and `shifts`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .cli import UsageError, _load_model, _Parser

logger = logging.getLogger("bco_fast")


def _model_options(parser: _Parser, dtype: str = "auto") -> None:
    parser.add_argument(
        "--model_dtype", "--model-dtype", choices=["auto", "float32", "bfloat16", "float16"], default=dtype,
        help="of the weights; auto: as they are stored (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--attn_implementation", "--attn-implementation")
    parser.add_argument(
        "--chat_template",
        "--chat-template",
        help="in place of the tokenizer's: the path of a Jinja file, or the template",
    )


def _model_and_tokenizer(path: str, options: argparse.Namespace):
    """On the accelerator if there is one."""
    import torch

    # use_peft: the weights are frozen, so "auto" leaves them in their stored dtype
    config = argparse.Namespace(
        model_dtype=options.model_dtype,
        attn_implementation=options.attn_implementation,
        chat_template=options.chat_template,
        use_peft=True,
        load_in_4bit=False,
        load_in_8bit=False,
        bf16=False,
        fp16=False,
    )
    model, tokenizer = _load_model(path, config)
    return model.to(torch.accelerator.current_accelerator() or torch.device("cpu")), tokenizer


def generate(arguments: list[str]) -> dict:
    """Write a model's completions of a prompts file."""
    parser = _Parser(
        prog="bco-fast generate", allow_abbrev=False, description="Write completions of prompts to a file."
    )
    parser.add_argument("--model", required=True, help="folder of a Hugging Face causal language model, or a Hub name")
    parser.add_argument(
        "--prompts", required=True, help="JSON list or JSONL with instruction, prompt, or Arena-Hard's turns"
    )
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--format", default="jsonl", help="alpaca_eval, arena_hard or jsonl (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 for greedy (default: %(default)s)")
    parser.add_argument("--top_p", "--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--chat", choices=["auto", "on", "off"], default="auto", help="use the chat template (default: if there is one)"
    )
    parser.add_argument("--generator", help="the model's name in the file (default: the last part of --model)")
    _model_options(parser)
    options = parser.parse_args(arguments)

    from .generation import GenerationError, Sampling, check_format, read_prompts, write_completions
    from .generation import generate as draw

    output = Path(options.output)
    if output.exists() and (output.is_dir() or (Path(options.prompts).exists() and output.samefile(options.prompts))):
        raise UsageError(f"--output {output} is {'a folder' if output.is_dir() else 'the prompts file'}")
    names = ("temperature", "top_p", "max_new_tokens", "batch_size", "seed")
    try:
        sampling = Sampling(**{name: getattr(options, name) for name in names})
        prompts = read_prompts(options.prompts)
        check_format(prompts, options.format)
        model, tokenizer = _model_and_tokenizer(options.model, options)
        completions = draw(
            model, tokenizer, [prompt.text for prompt in prompts], sampling, chat=options.chat, progress=True
        )
        write_completions(
            output,
            prompts,
            completions,
            options.format,
            generator=options.generator or Path(options.model).name,
            dataset=Path(options.prompts).stem,
        )
    except (GenerationError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    return {
        "completions": len(completions),
        "mean_tokens": round(sum(c.tokens for c in completions) / len(completions), 2),
        "ended": sum(c.ended for c in completions),
        "output": str(output),
    }


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

    from .generation import GenerationError, read_prompts
    from .judge import JudgeError, as_summary, describe, read_answers
    from .judge import judge as compare
    from .rewards import RewardError, load_reward

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


def shifts(arguments: list[str]) -> dict:
    """Report what training did to the tokens of a feedback file."""
    parser = _Parser(
        prog="bco-fast shifts",
        allow_abbrev=False,
        description="Log-likelihood and logit shifts of the completions' tokens, policy minus reference.",
    )
    parser.add_argument("--model", required=True, help="the policy: folder of a causal language model, or a Hub name")
    parser.add_argument("--ref_model", "--ref-model", required=True, help="the reference, with the same tokenizer")
    parser.add_argument("--data", required=True, help="feedback, as for train")
    parser.add_argument("--output_dir", "--output-dir", required=True, help="for shifts.json and shifts.png")
    parser.add_argument("--max_length", "--max-length", type=int, default=1024, help="tokens of a row")
    parser.add_argument(
        "--tokens_per_batch", "--tokens-per-batch", type=int, default=2048,
        help="padded positions whose logits are in memory at a time (default: %(default)s)",
    )  # fmt: skip
    _model_options(parser, dtype="float32")  # bfloat16 logits are rounded to 8 bits, and shifts are small
    options = parser.parse_args(arguments)

    from .data import FeedbackError, read_rows, tokenize_rows, unpair
    from .shifts import SERIES, ShiftError, describe, write

    if Path(options.output_dir).exists() and not Path(options.output_dir).is_dir():
        raise UsageError(f"--output_dir {options.output_dir} is a file")
    try:
        rows = unpair(read_rows(options.data))
        tokenizers = {path: _tokenizer(path) for path in (options.model, options.ref_model)}
        tokenizer = tokenizers[options.model]
        if tokenizer.get_vocab() != tokenizers[options.ref_model].get_vocab():
            raise ShiftError("--model and --ref_model have different tokenizers: their tokens cannot be compared")
        examples = tokenize_rows(rows, tokenizer, max_length=options.max_length).examples
        report = _compare_models(options, tokenizer, examples)
        write(report, options.output_dir)
    except (FeedbackError, ShiftError, ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    print(describe(report), flush=True)
    summary: dict = {"rows": len(examples), "tokens": report["tokens"]["all"]}
    for series in SERIES:
        for name in ("up", "down"):
            part = report["shifts"][series][name] or {}
            summary |= {f"{series}_{value}_{name}": _rounded(part.get(value)) for value in ("mean", "gini")}
    return summary | {"output_dir": options.output_dir}


def _compare_models(options: argparse.Namespace, tokenizer, examples) -> dict:
    import numpy as np

    from .shifts import ShiftError, compare, token_values

    values = []
    for path in (options.model, options.ref_model):  # one model in memory at a time
        model, _ = _model_and_tokenizer(path, options)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions and max(map(len, examples)) > positions:
            raise ShiftError(f"a row has {max(map(len, examples))} tokens, but {path} has {positions} positions")
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        values.append(
            token_values(
                model,
                examples,
                pad_token_id=pad,
                vocabulary=len(tokenizer),
                tokens_per_batch=options.tokens_per_batch,
            )
        )
        del model
    labels = np.repeat([e.label for e in examples], [len(e) - e.completion_start for e in examples])
    report = {"model": options.model, "ref_model": options.ref_model, "data": options.data, "rows": len(examples)}
    return report | compare(*values, labels)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _names(a: str, b: str) -> tuple[str, str]:
    names = Path(a).stem, Path(b).stem
    return ("A", "B") if names[0] == names[1] else (f"A {names[0]}", f"B {names[1]}")


def _tokenizer(path: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{path}: no tokenizer ({' '.join(str(error).split())})") from None
