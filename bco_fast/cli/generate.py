"""`bco-fast generate`: a model's completions of a prompts file."""

from __future__ import annotations

from pathlib import Path

from .common import Parser, add_model_options, check_input, check_output, load_model_and_tokenizer, usage_errors


def generate(arguments: list[str]) -> dict:
    parser = Parser(prog="bco-fast generate", description="Write completions of prompts to a file.")
    parser.add_argument("--model", required=True, help="folder of a Hugging Face causal language model, or a Hub name")
    parser.add_argument(
        "--prompts",
        required=True,
        help="JSONL, JSON, CSV or Parquet with prompt, instruction, turns or conversation_input",
    )
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument(
        "--format",
        choices=["alpaca_eval", "arena_hard", "mt_bench", "wild_bench", "jsonl"],
        default="jsonl",
        help="of the file",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling; 0 for greedy decoding")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus of sampling, (0, 1]")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest completion, tokens")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts sampled together")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--chat",
        choices=["auto", "on", "off"],
        default="auto",
        help="use the chat template; auto: as the model was trained (run.json), else if there is one",
    )
    parser.add_argument("--generator", help="the model's name in the file (default: the last part of --model)")
    add_model_options(parser)
    options = parser.parse_args(arguments)

    from ..data.form import follow, trained_form
    from ..data.prompts import read_prompts
    from ..data.sources import FeedbackError
    from ..evaluation.generate import GenerationError, Sampling, check_format, generate_turns, write_completions

    check_input("--prompts", options.prompts)
    check_output("--output", options.output, options.prompts)
    names = ("temperature", "top_p", "max_new_tokens", "batch_size", "seed")
    with usage_errors(ValueError, OSError):
        sampling = Sampling(**{name: getattr(options, name) for name in names})
        with usage_errors(FeedbackError, prefix="--prompts "):
            prompts = read_prompts(options.prompts, turns=True)
        with usage_errors(GenerationError, prefix=f"--format {options.format}: "):
            check_format(prompts, options.format)
        model, tokenizer = load_model_and_tokenizer(options.model, options, to_accelerator=True)
        chat = follow(trained_form(options.model), prompts, tokenizer, options.chat)
        answers = generate_turns(model, tokenizer, prompts, sampling, chat=chat, progress=True)
        names = {"generator": options.generator or Path(options.model).name, "dataset": Path(options.prompts).stem}
        write_completions(options.output, prompts, answers, options.format, **names)
    completions = [answer for turns in answers for answer in turns]
    return {
        "completions": len(completions),
        "mean_tokens": round(sum(c.tokens for c in completions) / len(completions), 2),
        "ended": sum(c.ended for c in completions),
        "output": str(Path(options.output)),
    }
