"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

import dataclasses

from .common import UsageError, _nearest, _Parser


def convert(arguments: list[str]) -> dict:
    """Write the rows of a public dataset as feedback."""
    from ..data.convert import FORMATS, RECIPES, convert_file

    parser = _Parser(prog="bco-fast convert", allow_abbrev=False, description="Write a dataset's rows as feedback.")
    parser.add_argument(
        "--data", required=True, help="JSONL, JSON, CSV or Parquet file, or the name of a dataset on the Hub"
    )
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--to", required=True, help="pairs, binary or score")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--threshold", type=float, help="score from which a completion is a thumbs up")
    parser.add_argument("--split", help="of a dataset on the Hub (default: train)")
    parser.add_argument(
        "--format", default="auto", choices=FORMATS,
        help="chat: every row as messages; text: none, conversations are left out; auto: one turn as text (default)",
    )  # fmt: skip
    parser.add_argument(
        "--on_bad_row", "--on-bad-row", default="error", choices=("error", "skip"),
        help="a row of another schema: error names it and writes nothing (default), skip leaves it out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.recipe not in RECIPES:
        raise UsageError(f"unknown recipe {options.recipe!r}{_nearest(options.recipe, RECIPES)}")
    try:
        report = convert_file(
            options.data, options.output, options.recipe, options.to, threshold=options.threshold, split=options.split,
            format=options.format, on_bad_row=options.on_bad_row,
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    return {**dataclasses.asdict(report), "output": options.output}
