"""`bco-fast shifts`: what training did to the tokens of a feedback file."""

from __future__ import annotations

import argparse

from . import common


def shifts(arguments: list[str]) -> dict:
    parser = common.Parser(
        prog="bco-fast shifts",
        description="Log-likelihood and logit shifts of the completions' tokens, policy minus reference.",
    )
    parser.add_argument("--model", required=True, help="the policy: folder of a causal language model, or a Hub name")
    parser.add_argument("--ref_model", required=True, help="the reference, with the same tokenizer")
    parser.add_argument("--data", required=True, help="feedback, as for train")
    parser.add_argument("--output_dir", required=True, help="for shifts.json and shifts.png")
    parser.add_argument("--max_length", type=int, default=1024, help="longest row, tokens")
    parser.add_argument(
        "--deciles_of", help="shifts.json of another policy: shares of the tokens in its deciles, as in BNF's Fig. 4"
    )
    parser.add_argument(
        "--tokens_per_batch", type=int, default=2048, help="padded positions whose logits are in memory at once"
    )
    common.add_model_options(parser, dtype="float32")  # bfloat16 logits are rounded to 8 bits, and shifts are small
    options = parser.parse_args(arguments)

    from ..data.rows import read_rows, unpair
    from ..data.sources import FeedbackError
    from ..data.tokenize import tokenize_rows
    from ..evaluation.shifts import SERIES, ShiftError, describe, read_deciles, write

    if options.tokens_per_batch < 1:
        raise common.UsageError(f"--tokens_per_batch must be at least 1, not {options.tokens_per_batch}")
    common.check_input("--data", options.data)
    common.check_writable("--output_dir", options.output_dir)
    with common.usage_errors(ShiftError, prefix="--deciles_of "):
        deciles = read_deciles(options.deciles_of) if options.deciles_of else []
    with common.usage_errors(ValueError, OSError):
        with common.usage_errors(FeedbackError, prefix="--data "):
            rows = unpair(read_rows(options.data, needs="texts"))
        tokenizer, other = (
            common.open_tokenizer(f"--{name}", getattr(options, name), options.trust_remote_code)
            for name in ("model", "ref_model")
        )
        if tokenizer.get_vocab() != other.get_vocab():
            raise common.UsageError(
                "--model and --ref_model have different tokenizers: their tokens cannot be compared"
            )
        examples = tokenize_rows(rows, tokenizer, max_length=options.max_length).examples
        report = _compare_models(options, tokenizer, examples, deciles)
        write(report, options.output_dir)
    print(describe(report), flush=True)
    summary: dict = {"rows": len(examples), "tokens": report["tokens"]["all"]}
    for series in SERIES:
        for name in ("up", "down"):
            part = report["shifts"][series][name] or {}
            figures = {f"{series}_{value}_{name}": part.get(value) for value in ("mean", "gini")}
            summary |= {key: None if value is None else round(value, 6) for key, value in figures.items()}
    summary |= {name: None if value is None else round(value, 6) for name, value in report["responses"].items()}
    return summary | {"output_dir": options.output_dir}


def _compare_models(options: argparse.Namespace, tokenizer, examples, deciles: list[float]) -> dict:
    import numpy as np

    from ..data.tokenizer import pad_or_eos, positions
    from ..evaluation.shifts import compare, token_values

    values, longest = [], max(map(len, examples))
    for path in (options.model, options.ref_model):  # one model in memory at a time
        model, _ = common.load_model_and_tokenizer(path, options, to_accelerator=True)
        if longest > (positions(model) or longest):
            raise common.UsageError(f"a row has {longest} tokens, but {path} has {positions(model)} positions")
        batches = {"pad_token_id": pad_or_eos(tokenizer), "tokens_per_batch": options.tokens_per_batch}
        values.append(token_values(model, examples, vocabulary=len(tokenizer), **batches))
        del model
    lengths = [len(e) - e.completion_start for e in examples]
    labels = np.repeat([e.label for e in examples], lengths)
    report = {"model": options.model, "ref_model": options.ref_model, "data": options.data, "rows": len(examples)}
    return report | compare(*values, labels, lengths=lengths, deciles=deciles)
