"""`bco-fast udm`: underlying distribution matching, a weight column for a feedback file."""

from __future__ import annotations

from .common import Parser, check_input, check_output, usage_errors


def udm(arguments: list[str]) -> dict:
    from ..data.density_ratio import as_summary, describe, match_file

    parser = Parser(
        prog="bco-fast udm", description="Weigh thumbs down so that their prompts match those of thumbs up."
    )
    parser.add_argument("--data", required=True, help="thumbs up and down, JSONL, JSON, CSV or Parquet: prompt, label")
    parser.add_argument(
        "--embedder", help="tfidf, or the folder of a Hugging Face model; not needed with a tfidf --state"
    )
    parser.add_argument("--output", required=True, help="JSONL file to write; OUTPUT.udm.json is the state")
    parser.add_argument("--state", help="OUTPUT.udm.json of an earlier call: take its weights' model, fit nothing")
    parser.add_argument("--min_density_ratio", type=float, help="lowest weight of a thumbs down (default: 0.5)")
    parser.add_argument("--max_density_ratio", type=float, help="highest weight of a thumbs down (default: 10)")
    parser.add_argument("--seed", type=int, help="of the folds (default: 0)")
    options = vars(parser.parse_args(arguments))
    for name in ("data", "state"):
        check_input(f"--{name}", options[name])
    check_output("--output", options["output"], options["data"])
    with usage_errors(ValueError, OSError, ImportError):
        report = match_file(options.pop("data"), options.pop("output"), **options)
    print(describe(report))
    return as_summary(report)
