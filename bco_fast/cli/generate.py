"""The command lines of `bco-fast generate`, `judge` and `shifts`."""

from __future__ import annotations

from pathlib import Path

from .common import UsageError, _model_and_tokenizer, _model_options, _Parser


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

    from ..data.prompts import GenerationError, read_prompts
    from ..evaluation.generate import Sampling, check_format, write_completions
    from ..evaluation.generate import generate as draw

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
