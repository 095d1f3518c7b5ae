"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

from .common import UsageError, _Parser


def udm(arguments: list[str]) -> dict:
    """Underlying distribution matching: write a weight column."""
    from ..data.density_ratio import as_summary, describe, match_file

    parser = _Parser(
        prog="bco-fast udm", allow_abbrev=False, description="Weigh thumbs down to the prompts of thumbs up."
    )
    parser.add_argument("--data", required=True, help="thumbs up and down, JSONL, JSON, CSV or Parquet: prompt, label")
    parser.add_argument(
        "--embedder", help="tfidf, or the folder of a Hugging Face model; not needed with --state of tfidf"
    )
    parser.add_argument("--output", required=True, help="JSONL file to write; OUTPUT.udm.json is the state")
    parser.add_argument("--state", help="OUTPUT.udm.json of an earlier call: weigh by it, fit nothing")
    for bound, default in (("min", 0.5), ("max", 10.0)):
        name = f"{bound}_density_ratio"
        parser.add_argument(
            f"--{name}", f"--{name.replace('_', '-')}", type=float, help=f"of a thumbs down's weight; default {default}"
        )
    parser.add_argument("--seed", type=int, help="of the folds; default 0")
    options = vars(parser.parse_args(arguments))
    try:
        report = match_file(options.pop("data"), options.pop("output"), **options)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    print(describe(report))
    return as_summary(report)
