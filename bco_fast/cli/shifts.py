"""The command lines of `bco-fast generate`, `judge` and `shifts`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import UsageError, _model_and_tokenizer, _model_options, _Parser, _tokenizer


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

    from ..data.rows import read_rows, unpair
    from ..data.sources import FeedbackError
    from ..data.tokenize import tokenize_rows
    from ..evaluation.shifts import SERIES, ShiftError, describe, write

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

    from ..evaluation.shifts import ShiftError, compare, token_values

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
